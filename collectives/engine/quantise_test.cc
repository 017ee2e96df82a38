#include "collectives/engine/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace shoal {
namespace {

constexpr WireFormat kFormats[] = {WireFormat::kAsIs, WireFormat::kBf16, WireFormat::kInt8, WireFormat::kFp8};
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RoundTrip(WireFormat format, const std::vector<float>& in) {
  const auto elements = static_cast<int64_t>(in.size());
  std::vector<float> wire(WireBytes(format, elements) / 4 + 1), out(in.size());
  Quantise(format, in.data(), elements, reinterpret_cast<std::byte*>(wire.data()));
  Dequantise(format, reinterpret_cast<const std::byte*>(wire.data()), elements, 0, elements, out.data());
  return out;
}

std::vector<float> Values(int64_t elements, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> exponent(-20, 20);
  std::vector<float> values(elements);
  float scale = 1;
  for (int64_t i = 0; i < elements; ++i) {
    if (i % 100 == 0) scale = std::ldexp(1.0f, exponent(random));
    values[i] = normal(random) * scale;
  }
  return values;
}

TEST(Quantise, ErrorsStayWithinTheStatedBounds) {
  for (int64_t elements : {1, 255, 256, 257, 10'000}) {
    const std::vector<float> in = Values(elements, 3);
    for (WireFormat format : kFormats) {
      const std::vector<float> out = RoundTrip(format, in);
      for (int64_t i = 0; i < elements; ++i) {
        const int64_t begin = i / kWireBlock * kWireBlock;
        float largest = 0;
        for (int64_t j = begin; j < std::min(elements, begin + kWireBlock); ++j) largest = std::max(largest, std::abs(in[j]));
        double bound = 0;
        if (format == WireFormat::kBf16) bound = std::abs(in[i]) / 256;
        if (format == WireFormat::kInt8) bound = largest / 254;
        if (format == WireFormat::kFp8) bound = std::max(std::abs(in[i]) / 16, largest / 448 / 1024);
        ASSERT_LE(std::abs(double{out[i]} - in[i]), bound * (1 + 1e-4)) << static_cast<int>(format) << " " << i;
      }
    }
  }
}

TEST(Quantise, EveryFp8CodeSurvives) {
  // All finite magnitudes of e4m3, 448 among them, so that the scale is 1.
  std::vector<float> in;
  for (int code = 0; code < 0x7f; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const float value = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6) : std::ldexp(1 + mantissa / 8.0f, exponent - 7);
    in.push_back(value);
    in.push_back(-value);
  }
  EXPECT_EQ(RoundTrip(WireFormat::kFp8, in), in);
}

TEST(Quantise, ZeroTinyInfiniteAndNaNBlocks) {
  for (WireFormat format : {WireFormat::kInt8, WireFormat::kFp8}) {
    for (float x : RoundTrip(format, std::vector<float>(300, 0.0f))) ASSERT_EQ(x, 0.0f);
    for (float x : RoundTrip(format, std::vector<float>(300, 1e-40f))) ASSERT_EQ(x, 0.0f);
    for (float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> in(600, 1.0f);
      in[300] = bad;
      const std::vector<float> out = RoundTrip(format, in);
      for (int i = 0; i < 600; ++i) {
        if (i / 256 == 1) {
          ASSERT_TRUE(std::isnan(out[i])) << i;
        } else {
          ASSERT_NEAR(out[i], 1.0f, 1e-6) << i;
        }
      }
    }
    for (float x : RoundTrip(format, std::vector<float>(10, 3e38f))) ASSERT_NEAR(x / 3e38f, 1.0f, 1e-6);
  }
  const std::vector<float> kept = RoundTrip(WireFormat::kBf16, {kInf, -kInf, 1.0f});
  EXPECT_EQ(kept, (std::vector<float>{kInf, -kInf, 1.0f}));
}

TEST(Quantise, EveryInstructionSetGivesTheSameBits) {
  const std::vector<float> in = Values(5003, 9);
  const auto elements = static_cast<int64_t>(in.size());
  const std::vector<WireCodec> codecs = WireCodecs();
  for (WireFormat format : kFormats) {
    std::vector<float> want(WireBytes(format, elements) / 4 + 1), want_out(in.size());
    codecs[0].quantise(format, in.data(), elements, reinterpret_cast<std::byte*>(want.data()));
    codecs[0].dequantise(format, reinterpret_cast<std::byte*>(want.data()), elements, 0, elements, want_out.data());
    for (const WireCodec& codec : codecs) {
      std::vector<float> got(want.size()), out(in.size());
      codec.quantise(format, in.data(), elements, reinterpret_cast<std::byte*>(got.data()));
      ASSERT_EQ(std::memcmp(got.data(), want.data(), got.size() * 4), 0) << static_cast<int>(format);
      codec.dequantise(format, reinterpret_cast<std::byte*>(got.data()), elements, 0, elements, out.data());
      ASSERT_EQ(std::memcmp(out.data(), want_out.data(), out.size() * 4), 0) << static_cast<int>(format);
      // A part of it.
      std::vector<float> part(700);
      codec.dequantise(format, reinterpret_cast<std::byte*>(got.data()), elements, 512, 700, part.data());
      ASSERT_EQ(std::memcmp(part.data(), want_out.data() + 512, 700 * 4), 0) << static_cast<int>(format);
    }
  }
}

}  // namespace
}  // namespace shoal
