#include "collectives/engine/quantise.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime/base/check.h"
#include "runtime/tensor/dtype.h"
#include "runtime/tensor/e4m3.h"

// A body that is inlined into one function per instruction set and vectorised there.
#define SHOAL_INLINE inline __attribute__((always_inline))

namespace shoal {
namespace {

constexpr float kInt8Max = 127.0f;
// Below it a scale or its inverse would leave the range of normal numbers.
constexpr uint32_t kZeroBelow = std::bit_cast<uint32_t>(0x1p-118f);
constexpr uint32_t kInfinity = 0x7f800000u;

SHOAL_INLINE uint32_t Magnitude(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffffu; }

// Adding this makes the unit of the last place 1, and so rounds to the nearest integer, ties to even.
constexpr float kRounder = 0x1.8p23f;

SHOAL_INLINE int8_t ToInt8(float scaled) {
  return static_cast<int8_t>(std::bit_cast<uint32_t>(scaled + kRounder) - std::bit_cast<uint32_t>(kRounder));
}

// Returns the block's scale.
template <WireFormat format>
SHOAL_INLINE float QuantiseBlock(const float* in, int64_t count, std::byte* codes) {
  uint32_t largest = 0;  // As an integer, so that a NaN is larger than an infinity, and that than all else.
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, Magnitude(in[i]));
  constexpr float kMax = format == WireFormat::kInt8 ? kInt8Max : kE4m3Max;
  if (largest < kZeroBelow || largest >= kInfinity) {
    std::memset(codes, 0, count);
    return largest < kZeroBelow ? 0.0f : std::bit_cast<float>(0x7fc00000u);
  }
  const float inverse = kMax / std::bit_cast<float>(largest);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (format == WireFormat::kInt8) {
      codes[i] = static_cast<std::byte>(ToInt8(in[i] * inverse));
    } else {
      codes[i] = static_cast<std::byte>(ToE4m3(in[i] * inverse));
    }
  }
  return std::bit_cast<float>(largest) / kMax;
}

template <WireFormat format>
SHOAL_INLINE void DequantiseBlock(const std::byte* codes, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (format == WireFormat::kInt8) {
      out[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
    } else {
      out[i] = FromE4m3(static_cast<uint8_t>(codes[i])) * scale;
    }
  }
}

int64_t Blocks(int64_t elements) { return (elements + kWireBlock - 1) / kWireBlock; }

template <WireFormat format>
SHOAL_INLINE void QuantiseBlocks(const float* in, int64_t elements, std::byte* wire) {
  auto* const scales = reinterpret_cast<float*>(wire);
  std::byte* const codes = wire + Blocks(elements) * sizeof(float);
  for (int64_t begin = 0, block = 0; begin < elements; begin += kWireBlock, ++block) {
    scales[block] = QuantiseBlock<format>(in + begin, std::min(kWireBlock, elements - begin), codes + begin);
  }
}

template <WireFormat format>
SHOAL_INLINE void DequantiseBlocks(const std::byte* wire, int64_t elements, int64_t begin, int64_t count, float* out) {
  const auto* const scales = reinterpret_cast<const float*>(wire) + begin / kWireBlock;
  const std::byte* const codes = wire + Blocks(elements) * sizeof(float) + begin;
  for (int64_t done = 0, block = 0; done < count; done += kWireBlock, ++block) {
    DequantiseBlock<format>(codes + done, std::min(kWireBlock, count - done), scales[block], out + done);
  }
}

SHOAL_INLINE void QuantiseAny(WireFormat format, const float* in, int64_t elements, std::byte* wire) {
  switch (format) {
    case WireFormat::kAsIs:
      if (elements > 0) std::memcpy(wire, in, elements * sizeof(float));
      return;
    case WireFormat::kBf16:
      for (int64_t i = 0; i < elements; ++i) reinterpret_cast<BFloat16*>(wire)[i] = BFloat16(in[i]);
      return;
    case WireFormat::kInt8:
      return QuantiseBlocks<WireFormat::kInt8>(in, elements, wire);
    case WireFormat::kFp8:
      return QuantiseBlocks<WireFormat::kFp8>(in, elements, wire);
  }
}

SHOAL_INLINE void DequantiseAny(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin,
                                int64_t count, float* out) {
  switch (format) {
    case WireFormat::kAsIs:
      if (count > 0) std::memcpy(out, wire + begin * sizeof(float), count * sizeof(float));
      return;
    case WireFormat::kBf16:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<float>(reinterpret_cast<const BFloat16*>(wire)[begin + i]);
      }
      return;
    case WireFormat::kInt8:
      return DequantiseBlocks<WireFormat::kInt8>(wire, elements, begin, count, out);
    case WireFormat::kFp8:
      return DequantiseBlocks<WireFormat::kFp8>(wire, elements, begin, count, out);
  }
}

void QuantisePlain(WireFormat format, const float* in, int64_t elements, std::byte* wire) {
  QuantiseAny(format, in, elements, wire);
}
void DequantisePlain(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin, int64_t count,
                     float* out) {
  DequantiseAny(format, wire, elements, begin, count, out);
}

#ifdef __x86_64__
#define SHOAL_AVX2 __attribute__((target("avx2")))
#define SHOAL_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq")))

SHOAL_AVX2 void QuantiseAvx2(WireFormat format, const float* in, int64_t elements, std::byte* wire) {
  QuantiseAny(format, in, elements, wire);
}
SHOAL_AVX2 void DequantiseAvx2(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin,
                               int64_t count, float* out) {
  DequantiseAny(format, wire, elements, begin, count, out);
}
SHOAL_AVX512 void QuantiseAvx512(WireFormat format, const float* in, int64_t elements, std::byte* wire) {
  QuantiseAny(format, in, elements, wire);
}
SHOAL_AVX512 void DequantiseAvx512(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin,
                                   int64_t count, float* out) {
  DequantiseAny(format, wire, elements, begin, count, out);
}
#endif

const WireCodec& Codec() {
  static const WireCodec codec = WireCodecs().back();
  return codec;
}

}  // namespace

std::vector<WireCodec> WireCodecs() {
  std::vector<WireCodec> codecs = {{QuantisePlain, DequantisePlain}};
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) codecs.push_back({QuantiseAvx2, DequantiseAvx2});
  if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    codecs.push_back({QuantiseAvx512, DequantiseAvx512});
  }
#endif
  return codecs;
}

int64_t WireBytes(WireFormat format, int64_t elements) {
  switch (format) {
    case WireFormat::kAsIs:
      return elements * static_cast<int64_t>(sizeof(float));
    case WireFormat::kBf16:
      return elements * static_cast<int64_t>(sizeof(BFloat16));
    case WireFormat::kInt8:
    case WireFormat::kFp8:
      return Blocks(elements) * static_cast<int64_t>(sizeof(float)) + (elements + 3) / 4 * 4;
  }
  return 0;
}

void Quantise(WireFormat format, const float* in, int64_t elements, std::byte* wire) {
  Codec().quantise(format, in, elements, wire);
}

void Dequantise(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin, int64_t count, float* out) {
  SHOAL_CHECK(begin % kWireBlock == 0) << begin;
  Codec().dequantise(format, wire, elements, begin, count, out);
}

}  // namespace shoal
