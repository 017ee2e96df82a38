#include "collectives/engine/reduce.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kF16,
                            DType::kI8,  DType::kU8,  DType::kI32,  DType::kI64};

constexpr ReduceOp kReductions[] = {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax,
                                    ReduceOp::kAverage};

// `elements` values of `dtype`, any bits.
std::vector<std::byte> RandomBytes(DType dtype, int64_t elements, std::mt19937& random) {
  std::vector<std::byte> bytes(elements * SizeOf(dtype));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

TEST(Reduce, EveryInstructionSetGivesTheSameBits) {
  std::mt19937 random(7);
  const std::vector<ReduceFunction> variants = ReduceVariants();
  for (DType dtype : kTypes) {
    for (ReduceOp op : kReductions) {
      for (int64_t elements : {1, 63, 2049, 10'007}) {
        for (int ranks : {1, 2, 3, 4, 5, 6}) {
          std::vector<std::vector<std::byte>> inputs;
          for (int rank = 0; rank < ranks; ++rank) inputs.push_back(RandomBytes(dtype, elements, random));
          if (dtype == DType::kF32 || dtype == DType::kF64 || dtype == DType::kBF16 || dtype == DType::kF16) {
            // Which NaN comes out of several is the processor's business: keep them out.
            for (auto& input : inputs) {
              for (int64_t i = 0; i < elements; ++i) {
                auto& top = input[(i + 1) * SizeOf(dtype) - 1];
                top &= std::byte{0xbf};  // Below 2.0: neither infinite nor NaN.
              }
            }
          }
          std::vector<const std::byte*> sources;
          for (const auto& input : inputs) sources.push_back(input.data());
          std::vector<std::byte> want(elements * SizeOf(dtype)), twice(want.size());
          variants[0](dtype, op, sources, {want.data()}, elements, ranks);
          for (ReduceFunction variant : variants) {
            std::vector<std::byte> got(want.size());
            variant(dtype, op, sources, {got.data(), twice.data()}, elements, ranks);
            ASSERT_EQ(got, want) << Name(dtype) << " " << static_cast<int>(op) << " " << elements << " "
                                 << ranks;
            ASSERT_EQ(twice, want);
            variant(dtype, op, sources, {got.data()}, elements, ranks);
            ASSERT_EQ(got, want) << "one out";
          }
        }
      }
    }
  }
}

TEST(Reduce, SumsInOrderAndMayWriteOverItsSources) {
  const float big = 1e8f;
  std::vector<float> a(5000, big), b(5000, 1.0f), c(5000, -big);
  std::vector<std::byte*> all = {reinterpret_cast<std::byte*>(a.data()),
                                 reinterpret_cast<std::byte*>(b.data()),
                                 reinterpret_cast<std::byte*>(c.data())};
  const std::vector<const std::byte*> sources(all.begin(), all.end());
  Reduce(DType::kF32, ReduceOp::kSum, sources, all, 5000);
  for (const auto* data : {&a, &b, &c}) {
    for (float x : *data) ASSERT_EQ(x, (big + 1.0f) - big);
  }
}

TEST(Reduce, HalfPrecisionIsRoundedOnce) {
  // 256 + 1 is not a bf16; 256 + 1 + 1 is.
  std::vector<BFloat16> a(100, BFloat16(256.0f)), b(100, BFloat16(1.0f)), out(100);
  const std::vector<const std::byte*> sources = {reinterpret_cast<const std::byte*>(a.data()),
                                                 reinterpret_cast<const std::byte*>(b.data()),
                                                 reinterpret_cast<const std::byte*>(b.data())};
  Reduce(DType::kBF16, ReduceOp::kSum, sources, {reinterpret_cast<std::byte*>(out.data())}, 100);
  for (BFloat16 x : out) ASSERT_EQ(static_cast<float>(x), 258.0f);
}

// One source: from binary16 to fp32 and back.
TEST(Reduce, EveryBinary16NumberSurvives) {
  std::vector<uint16_t> in(65536), out(65536);
  for (int i = 0; i < 65536; ++i) in[i] = static_cast<uint16_t>(i);
  for (ReduceFunction variant : ReduceVariants()) {
    variant(DType::kF16, ReduceOp::kSum, {reinterpret_cast<const std::byte*>(in.data())},
            {reinterpret_cast<std::byte*>(out.data())}, 65536, 1);
    for (int i = 0; i < 65536; ++i) {
      const bool nan = (i & 0x7fff) > 0x7c00;
      if (nan) {
        ASSERT_GT(out[i] & 0x7fff, 0x7c00) << i;
      } else {
        ASSERT_EQ(out[i], in[i]);
      }
    }
  }
}

TEST(Reduce, Binary16RoundsToNearestEvenAndOverflowsToInfinity) {
  // 2048 + 1 = 2049: a tie, to 2048. 2050 + 1 = 2051: a tie, to 2052. 65504 + 16: a tie, to infinity. 2^-24 +
  // 2^-24.
  const std::vector<uint16_t> a = {0x6800, 0x6801, 0x7bff, 0x0001}, b = {0x3c00, 0x3c00, 0x4c00, 0x0001};
  std::vector<uint16_t> out(4);
  Reduce(DType::kF16, ReduceOp::kSum,
         {reinterpret_cast<const std::byte*>(a.data()), reinterpret_cast<const std::byte*>(b.data())},
         {reinterpret_cast<std::byte*>(out.data())}, 4);
  EXPECT_EQ(out, (std::vector<uint16_t>{0x6800, 0x6802, 0x7c00, 0x0002}));
}

TEST(Reduce, NaNStaysInSumsAndIntegersWrap) {
  std::vector<float> a(33, std::numeric_limits<float>::quiet_NaN()), b(33, 1.0f), out(33);
  Reduce(DType::kF32, ReduceOp::kSum,
         {reinterpret_cast<const std::byte*>(b.data()), reinterpret_cast<const std::byte*>(a.data())},
         {reinterpret_cast<std::byte*>(out.data())}, 33);
  for (float x : out) ASSERT_TRUE(std::isnan(x));
  std::vector<int8_t> c(33, 127), d(33, 1), wrapped(33);
  Reduce(DType::kI8, ReduceOp::kSum,
         {reinterpret_cast<const std::byte*>(c.data()), reinterpret_cast<const std::byte*>(d.data())},
         {reinterpret_cast<std::byte*>(wrapped.data())}, 33);
  for (int8_t x : wrapped) ASSERT_EQ(x, -128);
}

template <class T>
std::vector<T> Reduced(DType dtype, ReduceOp op, std::vector<std::vector<T>> inputs, int divisor) {
  std::vector<const std::byte*> sources;
  for (const auto& input : inputs) sources.push_back(reinterpret_cast<const std::byte*>(input.data()));
  std::vector<T> out(inputs[0].size());
  Reduce(dtype, op, sources, {reinterpret_cast<std::byte*>(out.data())}, static_cast<int64_t>(out.size()), divisor);
  return out;
}

TEST(Reduce, AveragesDivideBeforeTheyRoundAndTruncateIntegers) {
  // 256 + 1 + 2 = 259, no bf16, but 259 / 7 = 37 is.
  const auto bf16 = Reduced<BFloat16>(DType::kBF16, ReduceOp::kAverage,
                                      {{BFloat16(256.0f)}, {BFloat16(1.0f)}, {BFloat16(2.0f)}}, 7);
  EXPECT_EQ(static_cast<float>(bf16[0]), 37.0f);
  EXPECT_EQ(Reduced<int32_t>(DType::kI32, ReduceOp::kAverage, {{-3, 7}, {-4, 8}}, 2), (std::vector<int32_t>{-3, 7}));
  EXPECT_EQ(Reduced<uint8_t>(DType::kU8, ReduceOp::kAverage, {{100}, {101}}, 2), (std::vector<uint8_t>{100}));
  // The sum is modulo the range, as without the division.
  EXPECT_EQ(Reduced<int8_t>(DType::kI8, ReduceOp::kAverage, {{100}, {100}}, 2), (std::vector<int8_t>{-28}));
  EXPECT_EQ(Reduced<double>(DType::kF64, ReduceOp::kAverage, {{1.0}, {2.0}, {4.0}}, 3)[0], 7.0 / 3.0);
  EXPECT_EQ(Reduced<float>(DType::kF32, ReduceOp::kAverage, {{6.0f}}, 3)[0], 2.0f);
}

TEST(Reduce, ProductsWrapAndRoundOnce) {
  EXPECT_EQ(Reduced<int8_t>(DType::kI8, ReduceOp::kProduct, {{100}, {3}, {2}}, 1),
            (std::vector<int8_t>{static_cast<int8_t>(600)}));
  EXPECT_EQ(Reduced<int64_t>(DType::kI64, ReduceOp::kProduct, {{int64_t{1} << 62}, {2}, {3}}, 1),
            (std::vector<int64_t>{std::numeric_limits<int64_t>::min()}));
  // 129 * 129 is no bf16; times 1/129 it is 129 again, but for one rounding.
  const float third = static_cast<float>(BFloat16(1.0f / 3.0f));
  const auto bf16 = Reduced<BFloat16>(DType::kBF16, ReduceOp::kProduct,
                                      {{BFloat16(129.0f)}, {BFloat16(129.0f)}, {BFloat16(third)}}, 1);
  EXPECT_EQ(bf16[0].bits, BFloat16(129.0f * 129.0f * third).bits);
}

TEST(CopyPiece, CopiesEveryByteAndNoOther) {
  constexpr int64_t kLarge = int64_t{1} << 30;  // Of the whole: past the caches.
  for (const int64_t whole : {int64_t{0}, kLarge}) {
    for (const int64_t bytes : {0, 1, 63, 64, 65, 4096, 16383, 16384, 16385, 50000}) {
      for (const int64_t shift : {0, 1, 17, 63}) {
        std::vector<std::byte> from(bytes), to(bytes + shift + 64, std::byte{7});
        for (int64_t i = 0; i < bytes; ++i) from[i] = static_cast<std::byte>(i * 31 + i / 256);
        std::vector<std::byte> expected = to;
        std::copy(from.begin(), from.end(), expected.begin() + shift);
        CopyPiece(to.data() + shift, from.data(), bytes, whole);
        EXPECT_TRUE(to == expected) << bytes << " bytes to " << shift << ", of " << whole;
      }
    }
  }
}

}  // namespace
}  // namespace shoal
