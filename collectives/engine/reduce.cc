#include "collectives/engine/reduce.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "runtime/base/check.h"

#ifdef __x86_64__
#include <emmintrin.h>
#endif

// A body that is inlined into one function per instruction set and vectorised there.
#define SHOAL_INLINE inline __attribute__((always_inline))

namespace shoal {
namespace {

// IEEE binary16, converted without branches, so that it vectorises, and without _Float16, which not every
// compiler has.
struct Half {
  uint16_t bits;
};

SHOAL_INLINE float ToFloat(Half half) {
  const uint32_t word = static_cast<uint32_t>(half.bits) << 16;
  const uint32_t twice = word + word;  // Exponent and mantissa, without the sign.
  // Normal numbers: move the exponent to its place, 112 too high, and scale down. Infinity and NaN stay what
  // they are.
  const float normal = std::bit_cast<float>((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
  // Subnormal ones: the mantissa as the low bits of a number near 0.5.
  const float subnormal = std::bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = std::bit_cast<uint32_t>(twice < (1u << 27) ? subnormal : normal);
  return std::bit_cast<float>((word & 0x80000000u) | magnitude);
}

SHOAL_INLINE Half ToHalf(float value) {
  const uint32_t word = std::bit_cast<uint32_t>(value);
  const uint32_t twice = word + word;
  // Too large becomes infinite; then an addition of the right magnitude rounds to nearest, ties to even.
  const float scaled = std::bit_cast<float>(word & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;
  const uint32_t exponent = std::max(twice & 0xff000000u, 0x71000000u);
  const uint32_t rounded =
      std::bit_cast<uint32_t>(std::bit_cast<float>((exponent >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  return {static_cast<uint16_t>(((word >> 16) & 0x8000u) | (twice > 0xff000000u ? 0x7e00u : finite))};
}

// What is added up: fp32 for the 16-bit floats; unsigned for integers, whose sums wrap.
template <class T>
struct AccumulatorOf {
  using Type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using Type = float;
};
template <>
struct AccumulatorOf<Half> {
  using Type = float;
};

template <class T>
SHOAL_INLINE typename AccumulatorOf<T>::Type Load(const T& value) {
  return value;
}
template <>
SHOAL_INLINE float Load(const BFloat16& value) {
  return static_cast<float>(value);
}
template <>
SHOAL_INLINE float Load(const Half& value) {
  return ToFloat(value);
}

template <class T>
SHOAL_INLINE T Store(typename AccumulatorOf<T>::Type value) {
  return value;
}
template <>
SHOAL_INLINE BFloat16 Store(float value) {
  return BFloat16(value);
}
template <>
SHOAL_INLINE Half Store(float value) {
  return ToHalf(value);
}

template <ReduceOp op, class A>
SHOAL_INLINE A Combine(A a, A b) {
  if constexpr (op == ReduceOp::kMin) {
    return b < a ? b : a;
  } else if constexpr (op == ReduceOp::kMax) {
    return a < b ? b : a;
  } else if constexpr (std::is_integral_v<A>) {
    using U = std::make_unsigned_t<A>;
    if constexpr (op == ReduceOp::kProduct) {
      return static_cast<A>(static_cast<U>(static_cast<U>(a) * static_cast<U>(b)));
    } else {
      return static_cast<A>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
    }
  } else if constexpr (op == ReduceOp::kProduct) {
    return a * b;
  } else {
    return a + b;
  }
}

template <ReduceOp op, class A>
SHOAL_INLINE A Finish(A value, A divisor) {
  if constexpr (op == ReduceOp::kAverage) {
    return static_cast<A>(value / divisor);
  } else {
    return value;
  }
}

// Two to four sources in one pass. The out may be any of them: each element is read before it is written.
template <class T, ReduceOp op, int N>
SHOAL_INLINE void ReduceOnePass(absl::Span<const std::byte* const> sources, std::byte* out, int64_t elements,
                                typename AccumulatorOf<T>::Type divisor) {
  using A = typename AccumulatorOf<T>::Type;
  const T* const a = reinterpret_cast<const T*>(sources[0]);
  const T* const b = reinterpret_cast<const T*>(sources[1]);
  const T* const c = N > 2 ? reinterpret_cast<const T*>(sources[2]) : nullptr;
  const T* const d = N > 3 ? reinterpret_cast<const T*>(sources[3]) : nullptr;
  T* const to = reinterpret_cast<T*>(out);
#pragma GCC ivdep
  for (int64_t i = 0; i < elements; ++i) {
    A sum = Combine<op, A>(Load(a[i]), Load(b[i]));
    if constexpr (N > 2) sum = Combine<op, A>(sum, Load(c[i]));
    if constexpr (N > 3) sum = Combine<op, A>(sum, Load(d[i]));
    to[i] = Store<T>(Finish<op, A>(sum, divisor));
  }
}

// Source by source over a block that stays in the first-level cache, then out.
template <class T, ReduceOp op>
SHOAL_INLINE void ReduceBlocks(absl::Span<const std::byte* const> sources, absl::Span<std::byte* const> outs,
                               int64_t elements, typename AccumulatorOf<T>::Type divisor) {
  using A = typename AccumulatorOf<T>::Type;
  constexpr int64_t kBlock = 8192 / sizeof(A);
  alignas(64) A sum[kBlock];
  alignas(64) T rounded[kBlock];
  for (int64_t begin = 0; begin < elements; begin += kBlock) {
    const int64_t count = std::min(kBlock, elements - begin);
    const T* first = reinterpret_cast<const T*>(sources[0]) + begin;
    if (sources.size() == 1) {
      for (int64_t i = 0; i < count; ++i) sum[i] = Load(first[i]);
    } else {
      const T* second = reinterpret_cast<const T*>(sources[1]) + begin;
      for (int64_t i = 0; i < count; ++i) sum[i] = Combine<op, A>(Load(first[i]), Load(second[i]));
    }
    for (size_t s = 2; s < sources.size(); ++s) {
      const T* next = reinterpret_cast<const T*>(sources[s]) + begin;
      for (int64_t i = 0; i < count; ++i) sum[i] = Combine<op, A>(sum[i], Load(next[i]));
    }
    if constexpr (op == ReduceOp::kAverage) {
      for (int64_t i = 0; i < count; ++i) sum[i] = Finish<op, A>(sum[i], divisor);
    }
    const void* result = sum;
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < count; ++i) rounded[i] = Store<T>(sum[i]);
      result = rounded;
    }
    for (std::byte* out : outs) {
      std::memcpy(reinterpret_cast<T*>(out) + begin, result, count * sizeof(T));
    }
  }
}

template <class T, ReduceOp op>
SHOAL_INLINE void ReduceWith(absl::Span<const std::byte* const> sources, absl::Span<std::byte* const> outs,
                             int64_t elements, int divisor) {
  const auto typed = static_cast<typename AccumulatorOf<T>::Type>(divisor);
  if (outs.size() == 1 && sources.size() == 2) {
    return ReduceOnePass<T, op, 2>(sources, outs[0], elements, typed);
  }
  if (outs.size() == 1 && sources.size() == 3) {
    return ReduceOnePass<T, op, 3>(sources, outs[0], elements, typed);
  }
  if (outs.size() == 1 && sources.size() == 4) {
    return ReduceOnePass<T, op, 4>(sources, outs[0], elements, typed);
  }
  ReduceBlocks<T, op>(sources, outs, elements, typed);
}

template <class T>
SHOAL_INLINE void ReduceTyped(ReduceOp op, absl::Span<const std::byte* const> sources,
                              absl::Span<std::byte* const> outs, int64_t elements, int divisor) {
  switch (op) {
    case ReduceOp::kSum:
      return ReduceWith<T, ReduceOp::kSum>(sources, outs, elements, divisor);
    case ReduceOp::kProduct:
      return ReduceWith<T, ReduceOp::kProduct>(sources, outs, elements, divisor);
    case ReduceOp::kMin:
      return ReduceWith<T, ReduceOp::kMin>(sources, outs, elements, divisor);
    case ReduceOp::kMax:
      return ReduceWith<T, ReduceOp::kMax>(sources, outs, elements, divisor);
    case ReduceOp::kAverage:
      return ReduceWith<T, ReduceOp::kAverage>(sources, outs, elements, divisor);
  }
}

SHOAL_INLINE void ReduceAny(DType dtype, ReduceOp op, absl::Span<const std::byte* const> sources,
                            absl::Span<std::byte* const> outs, int64_t elements, int divisor) {
  switch (dtype) {
    case DType::kF32:
      return ReduceTyped<float>(op, sources, outs, elements, divisor);
    case DType::kF64:
      return ReduceTyped<double>(op, sources, outs, elements, divisor);
    case DType::kBF16:
      return ReduceTyped<BFloat16>(op, sources, outs, elements, divisor);
    case DType::kF16:
      return ReduceTyped<Half>(op, sources, outs, elements, divisor);
    case DType::kI8:
      return ReduceTyped<int8_t>(op, sources, outs, elements, divisor);
    case DType::kU8:
      return ReduceTyped<uint8_t>(op, sources, outs, elements, divisor);
    case DType::kI32:
      return ReduceTyped<int32_t>(op, sources, outs, elements, divisor);
    case DType::kI64:
      return ReduceTyped<int64_t>(op, sources, outs, elements, divisor);
  }
}

void ReducePlain(DType dtype, ReduceOp op, absl::Span<const std::byte* const> sources,
                 absl::Span<std::byte* const> outs, int64_t elements, int divisor) {
  ReduceAny(dtype, op, sources, outs, elements, divisor);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) void ReduceAvx2(DType dtype, ReduceOp op,
                                                absl::Span<const std::byte* const> sources,
                                                absl::Span<std::byte* const> outs, int64_t elements, int divisor) {
  ReduceAny(dtype, op, sources, outs, elements, divisor);
}

__attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq"))) void ReduceAvx512(
    DType dtype, ReduceOp op, absl::Span<const std::byte* const> sources, absl::Span<std::byte* const> outs,
    int64_t elements, int divisor) {
  ReduceAny(dtype, op, sources, outs, elements, divisor);
}
#endif

// Of what is copied as a whole. Less stays in a third-level cache, whoever reads it next.
constexpr int64_t kStreamedMin = 16 << 20;

#ifdef __x86_64__
constexpr int64_t kLine = 64, kPage = 4096;
constexpr int64_t kPages = 4;  // In turn: more of the memory's banks are busy than with one.

SHOAL_INLINE void StreamLine(std::byte* to, const std::byte* from) {
  const auto* const parts = reinterpret_cast<const __m128i*>(from);
  auto* const targets = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(parts), b = _mm_loadu_si128(parts + 1);
  const __m128i c = _mm_loadu_si128(parts + 2), d = _mm_loadu_si128(parts + 3);
  _mm_stream_si128(targets, a);
  _mm_stream_si128(targets + 1, b);
  _mm_stream_si128(targets + 2, c);
  _mm_stream_si128(targets + 3, d);
}

void CopyPastCaches(std::byte* to, const std::byte* from, int64_t bytes) {
  const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine, bytes);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kPages * kPage <= bytes; i += kPages * kPage) {
    for (int64_t at = i; at < i + kPage; at += kLine) {
      for (int64_t page = 0; page < kPages * kPage; page += kPage) StreamLine(to + at + page, from + at + page);
    }
  }
  for (; i + kLine <= bytes; i += kLine) StreamLine(to + i, from + i);
  std::memcpy(to + i, from + i, bytes - i);
  _mm_sfence();  // Before whatever says that it is there.
}
#endif

}  // namespace

std::vector<ReduceFunction> ReduceVariants() {
  std::vector<ReduceFunction> variants = {ReducePlain};
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) variants.push_back(ReduceAvx2);
  if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    variants.push_back(ReduceAvx512);
  }
#endif
  return variants;
}

void Reduce(DType dtype, ReduceOp op, absl::Span<const std::byte* const> sources,
            absl::Span<std::byte* const> outs, int64_t elements, int divisor) {
  SHOAL_CHECK(!sources.empty());
  static const ReduceFunction function = ReduceVariants().back();
  function(dtype, op, sources, outs, elements, divisor);
}

void CopyPiece(std::byte* to, const std::byte* from, int64_t bytes, int64_t whole_bytes) {
#ifdef __x86_64__
  if (whole_bytes >= kStreamedMin) return CopyPastCaches(to, from, bytes);
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace shoal
