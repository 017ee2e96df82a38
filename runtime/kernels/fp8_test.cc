#include "runtime/kernels/fp8.h"

#include <cmath>
#include <limits>

#include "runtime/kernels/swiglu.h"
#include "runtime/kernels/testing.h"
#include "runtime/tensor/e4m3.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

constexpr float kInf = std::numeric_limits<float>::infinity();

// Numbers of very different sizes, so that blocks have codes of all kinds, with some zeros.
Tensor Wild(int64_t rows, int64_t columns, uint64_t seed) {
  const Tensor x = Random({rows, columns}, DType::kBF16, seed);
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < x.elements(); ++i) {
    Set(x, i, random() % 16 == 0 ? 0 : std::ldexp(Get(x, i), static_cast<int>(random() % 24) - 12));
  }
  return x;
}

// Products with the identity show what their operand was rounded to.
Tensor Identity(int64_t size) {
  const Tensor one = Zeros({size, size}, DType::kBF16);
  for (int64_t i = 0; i < size; ++i) Set(one, i * size + i, 1);
  return one;
}
Tensor RoundedRows(const Tensor& x) {
  Stream stream;
  Fp8Weights identity;
  QuantiseWeights({Identity(x.dim(1))}, &identity, stream);
  const Tensor y = Empty(x.shape(), DType::kBF16);
  MatMul(x, identity, Tensor(), y, stream);
  return y;
}
Tensor Rounded(const Tensor& x, int64_t block_rows) {
  const Tensor values = Empty(x.shape(), DType::kBF16);
  ref::RoundToFp8(x, block_rows, values);
  return values;
}
Tensor WeightValues(const Tensor& w) {
  Stream stream;
  Fp8Weights weights;
  QuantiseWeights({w}, &weights, stream);
  return weights.values.Reshape(w.shape());
}

TEST(E4m3, EveryCodeIsItsNumberAndBetweenThemTiesGoToEven) {
  for (int code = 0; code < 0x7f; ++code) {
    const float value = FromE4m3(static_cast<uint8_t>(code)), above = FromE4m3(static_cast<uint8_t>(code + 1));
    const double want = code < 8 ? code * std::ldexp(1, -9) : std::ldexp(1 + code % 8 / 8.0, code / 8 - 7);
    EXPECT_EQ(value, want) << code;
    EXPECT_EQ(ToE4m3(value), code);
    EXPECT_EQ(ToE4m3(-value), 0x80 | code);
    if (code == 0x7e) break;
    const float middle = (value + above) / 2;
    EXPECT_EQ(ToE4m3(middle), code + code % 2);
    EXPECT_EQ(ToE4m3(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(ToE4m3(std::nextafter(middle, kInf)), code + 1);
  }
  EXPECT_EQ(ToE4m3(449), 0x7e);
  EXPECT_EQ(ToE4m3(kInf), 0x7e);
}

TEST(Fp8, RoundsAsTheReference) {
  for (const auto& [rows, columns] : {std::pair{1, 1}, {3, 127}, {5, 128}, {7, 129}, {300, 200}, {130, 513}}) {
    SCOPED_TRACE(::testing::Message() << rows << "x" << columns);
    const Tensor x = Wild(rows, columns, 1);
    SweepLevels([&]() -> std::vector<Tensor> { return {RoundedRows(x), WeightValues(x)}; },
                [&](const std::vector<Tensor>& got) {
                  ExpectNear(got[0], Rounded(x, 1), 0, 0, "rows");
                  ExpectNear(got[1], Rounded(x, kFp8Block), 0, 0, "weights");
                });
  }
}

TEST(Fp8, RoundedNumbersStayAsTheyAre) {
  const Tensor x = Wild(140, 300, 2);
  const Tensor once = WeightValues(x);
  ExpectSameBits(WeightValues(once), once, "weights");
}

TEST(Fp8, ErrorsAreWithinHalfAUnitOfThreeBitsOrOfTheSmallestCode) {
  const Tensor x = Random({64, 128}, DType::kBF16, 3), y = RoundedRows(x);
  for (int64_t row = 0; row < 64; ++row) {
    const double largest = MaxAbs(x.Rows(row, 1));
    for (int64_t i = row * 128; i < (row + 1) * 128; ++i) {
      EXPECT_LE(std::abs(Get(y, i) - Get(x, i)), std::max(std::abs(Get(x, i)) / 16, largest / 224 / 1024)) << i;
    }
  }
}

TEST(Fp8, BlocksWithInfinityOrNaNAreNaNAndNoOthers) {
  for (const float odd : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
    const Tensor x = Wild(3, 300, 4);
    Set(x, 300 + 140, odd);
    SweepLevels([&]() -> std::vector<Tensor> { return {WeightValues(x), RoundedRows(x)}; },
                [&](const std::vector<Tensor>& got) {
                  const Tensor want = Rounded(x, kFp8Block);
                  for (int64_t i = 0; i < x.elements(); ++i) {
                    const bool of_block = i % 300 / 128 == 1;
                    EXPECT_EQ(std::isnan(Get(got[0], i)), of_block) << i;
                    EXPECT_EQ(std::isnan(Get(want, i)), of_block) << i;
                    EXPECT_EQ(std::isnan(Get(got[1], i)), i / 300 == 1) << i;  // Products add up whole rows.
                  }
                });
  }
}

TEST(Fp8, ExtremesAndZeros) {
  const Tensor x = Zeros({1, 384}, DType::kBF16);
  Set(x, 0, 0x1.cp127);
  Set(x, 1, -0x1p127);
  Set(x, 128, 0x1p-126);  // All that small is below half of the smallest code.
  Set(x, 129, 0x1p-133);
  Set(x, 256, 0x1p-100);
  const Tensor got = WeightValues(x);
  ExpectNear(got, Rounded(x, 1), 0, 0, "values");
  EXPECT_EQ(Get(got, 1), -0x1p127);
  EXPECT_EQ(Get(got, 128), 0);
  EXPECT_EQ(Get(got, 256), 0x1p-100);
}

struct Size {
  int64_t m, n, k;
};

TEST(Fp8, ProductsAreThoseOfTheRoundedNumbers) {
  Stream stream;
  for (const auto& [m, n, k] : {Size{1, 1, 1}, Size{5, 130, 200}, Size{70, 64, 128}, Size{33, 300, 517}}) {
    SCOPED_TRACE(::testing::Message() << m << "x" << n << "x" << k);
    const Tensor x = Random({m, k}, DType::kBF16, 1), dy = Random({m, n}, DType::kBF16, 2), w = Random({n, k}, DType::kBF16, 3);
    Fp8Weights weights;
    QuantiseWeights({w}, &weights, stream);
    for (const DType out : {DType::kBF16, DType::kF32}) {
      for (const Accumulate accumulate : {Accumulate::kOverwrite, Accumulate::kAdd}) {
        if (accumulate == Accumulate::kAdd && out != DType::kF32) continue;
        const Tensor y = Random({m, n}, out, 4), dx = Random({m, k}, out, 5), want_y = Copy(y), want_dx = Copy(dx);
        const bool add = accumulate == Accumulate::kAdd;
        MatMul(x, weights, add ? y : Tensor(), y, stream);
        MatMulGradInput(dy, weights, add ? Copy(dx) : Tensor(), dx, stream);
        ref::MatMul(Rounded(x, 1), Transpose::kNo, Rounded(w, kFp8Block), Transpose::kYes, accumulate, want_y, stream);
        ref::MatMul(Rounded(dy, 1), Transpose::kNo, Rounded(w, kFp8Block), Transpose::kNo, accumulate, want_dx, stream);
        // Sums of k products, each at most the largest of both operands.
        const auto error = [](int64_t terms, const Tensor& a, const Tensor& b) {
          return static_cast<double>(terms + 1) * 0x1p-22 * MaxAbs(a) * MaxAbs(b);
        };
        ExpectNear(y, want_y, 2 * Roundoff(out), error(k, x, w), "y");
        ExpectNear(dx, want_dx, 2 * Roundoff(out), error(n, dy, w), "dx");
      }
    }
  }
}

// Experts without rows, gaps between segments, and their order of memory another than theirs.
TEST(Fp8, GroupedProductsAreThoseOfEachSegmentAloneAndLeaveOtherRowsAlone) {
  Stream stream;
  constexpr int64_t kN = 140, kK = 200, kRows = 120;
  const std::vector<Segment> segments = {{2, 70, 40}, {0, 0, 30}, {1, 30, 0}, {0, 33, 20}};
  const Tensor x = Random({kRows, kK}, DType::kBF16, 1), dy = Random({kRows, kN}, DType::kBF16, 2);
  std::vector<Tensor> matrices;
  for (uint64_t e = 0; e < 3; ++e) matrices.push_back(Random({kN, kK}, DType::kBF16, 10 + e));
  Fp8Weights weights;
  QuantiseWeights(matrices, &weights, stream);
  const Tensor y = Random({kRows, kN}, DType::kBF16, 3), dx = Random({kRows, kK}, DType::kBF16, 4), want_y = Copy(y), want_dx = Copy(dx);
  for (const Segment& s : segments) {
    Fp8Weights one;
    QuantiseWeights({matrices[static_cast<size_t>(s.expert)]}, &one, stream);
    MatMul(x.Rows(s.begin, s.count), one, Tensor(), want_y.Rows(s.begin, s.count), stream);
    MatMulGradInput(dy.Rows(s.begin, s.count), one, Tensor(), want_dx.Rows(s.begin, s.count), stream);
  }
  GroupedMatMul(x, weights, segments, y, stream);
  GroupedMatMulGradInput(dy, weights, segments, dx, stream);
  const double error = 300 * 0x1p-22 * MaxAbs(x) * MaxAbs(matrices[0]);
  ExpectNear(y, want_y, 2 * Roundoff(DType::kBF16), error, "y");
  ExpectNear(dx, want_dx, 2 * Roundoff(DType::kBF16), error, "dx");
  const Tensor again = Copy(want_y);
  GroupedMatMul(x, weights, SegmentList(segments, stream), again, stream);
  ExpectSameBits(again, y, "with a list");
}

// So the ranks that rows are spread over do not matter, nor what else is in a batch.
TEST(Fp8, ARowsResultDoesNotDependOnOtherRows) {
  Stream stream;
  const Tensor x = Wild(64, 300, 1), w = Random({130, 300}, DType::kBF16, 2);
  Fp8Weights weights;
  QuantiseWeights({w}, &weights, stream);
  const auto product = [&](const Tensor& rows) {
    const Tensor y = Empty({64, 130}, DType::kF32);
    MatMul(rows, weights, Tensor(), y, stream);
    return y;
  };
  const Tensor before = product(x), louder = Copy(x);
  for (int64_t i = 0; i < louder.elements(); ++i) {
    if (i / 300 % 2 == 1) Set(louder, i, 1000 * Get(x, i));
  }
  const Tensor after = product(louder);
  for (int64_t row = 0; row < 64; row += 2) ExpectSameBits(after.Rows(row, 1), before.Rows(row, 1), "row");
}

TEST(Fp8, WithASwiGluProductsAreBothOneAfterTheOther) {
  Stream stream;
  const Tensor x = Random({20, 70}, DType::kBF16, 1), y = Empty({20, 60}, DType::kBF16), want_h = Empty({20, 30}, DType::kBF16);
  Fp8Weights weights;
  QuantiseWeights({Random({60, 70}, DType::kBF16, 2)}, &weights, stream);
  MatMul(x, weights, Tensor(), y, stream);
  SwiGlu(y, want_h, stream);
  const Tensor gate_up = Empty(y.shape(), DType::kBF16), h = Empty(want_h.shape(), DType::kBF16);
  MatMulSwiGlu(x, weights, gate_up, h, stream);
  ExpectSameBits(gate_up, y, "gate_up");
  ExpectSameBits(h, want_h, "h");
  const std::vector<Segment> all = {{0, 0, 20}};
  const Tensor grouped = Empty(want_h.shape(), DType::kBF16);
  GroupedMatMulSwiGlu(x, weights, all, gate_up, grouped, stream);
  GroupedMatMulSwiGlu(x, weights, SegmentList(all, stream), gate_up, h, stream);
  ExpectSameBits(grouped, want_h, "grouped");
  ExpectSameBits(h, want_h, "listed");
}

TEST(Fp8, QuantisingAgainKeepsTheMemory) {
  Stream stream;
  Fp8Weights weights;
  QuantiseWeights({Random({64, 64}, DType::kBF16, 1)}, &weights, stream);
  const void* const before = weights.values.raw();
  const Tensor w = Random({64, 64}, DType::kBF16, 2);
  QuantiseWeights({w}, &weights, stream);
  EXPECT_EQ(weights.values.raw(), before);
  ExpectSameBits(weights.values.Reshape({64, 64}), Rounded(w, kFp8Block), "values");
}

}  // namespace
}  // namespace shoal::kernels
