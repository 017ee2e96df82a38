#include "runtime/kernels/matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "runtime/device/cpu.h"

namespace shoal::kernels {
namespace {

constexpr double kF32Epsilon = 0x1p-24;  // Half an ulp of 1: the largest relative rounding error.
constexpr double kBF16Epsilon = 0x1p-8;

// Uniform in [-1, 1), so that a product of K terms is at most K and its rounding errors are bounded by K too.
Tensor Random(int64_t rows, int64_t columns, DType dtype, uint64_t seed) {
  const Tensor tensor = Empty({rows, columns}, dtype);
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    const float value = uniform(random);
    if (dtype == DType::kBF16) {
      tensor.data<BFloat16>()[i] = BFloat16(value);
    } else {
      tensor.data<float>()[i] = value;
    }
  }
  return tensor;
}

Tensor Copy(const Tensor& from) {
  const Tensor to = Empty(from.shape(), from.dtype());
  if (from.bytes() > 0) std::memcpy(to.raw(), from.raw(), static_cast<size_t>(from.bytes()));
  return to;
}

double At(const Tensor& tensor, int64_t i) {
  return tensor.dtype() == DType::kBF16 ? static_cast<float>(tensor.data<BFloat16>()[i])
                                        : tensor.data<float>()[i];
}

// A sum of K terms of magnitude <= 1 in f32, in any order, errs by at most (K + 1) * K * 2^-24 in the worst
// case and by about sqrt(K) * sqrt(K) * 2^-24 for random terms; 4 * (K + 4) * 2^-24 leaves room for the
// largest of many elements. Storing bf16 adds 2^-8 of the value; both sides round to bf16, hence twice.
void ExpectClose(const Tensor& actual, const Tensor& expected, int64_t terms) {
  ASSERT_EQ(actual.shape(), expected.shape());
  const double tolerance = 4 * static_cast<double>(terms + 4) * kF32Epsilon;
  const double relative = actual.dtype() == DType::kBF16 ? 2 * kBF16Epsilon : 0;
  for (int64_t i = 0; i < actual.elements(); ++i) {
    const double want = At(expected, i);
    ASSERT_LE(std::abs(At(actual, i) - want), tolerance + relative * std::abs(want))
        << "element " << i << " of " << ShapeString(actual.shape()) << ": " << At(actual, i) << " against "
        << want;
  }
}

struct Types {
  DType in;
  DType out;
};
constexpr Types kTypes[] = {
    {DType::kF32, DType::kF32}, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kBF16}};

class Products : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { SetThreads(GetParam()); }
  void TearDown() override { SetThreads(1); }
  Stream stream_;
};
INSTANTIATE_TEST_SUITE_P(Threads, Products, testing::Values(1, 2, 3), testing::PrintToStringParamName());

TEST_P(Products, MatMulMatchesReferenceForAllShapesTypesAndTransposes) {
  const int64_t shapes[][3] = {{1, 1, 1},       {1, 7, 3},      {5, 1, 9},     {3, 5, 7},
                               {17, 33, 65},    {64, 64, 64},   {31, 128, 96}, {128, 48, 31},
                               {129, 257, 100}, {70, 40, 1500}, {67, 600, 530}};
  for (const auto& [m, n, k] : shapes) {
    for (const Types& types : kTypes) {
      for (int flags = 0; flags < 8; ++flags) {
        const bool add = (flags & 4) != 0;
        if (add && types.out != DType::kF32) continue;
        const auto ta = static_cast<Transpose>(flags & 1);
        const auto tb = static_cast<Transpose>((flags >> 1) & 1);
        const Accumulate accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite;
        SCOPED_TRACE(testing::Message()
                     << m << "x" << n << "x" << k << " " << Name(types.in) << " flags " << flags);
        const Tensor a = ta == Transpose::kYes ? Random(k, m, types.in, 1) : Random(m, k, types.in, 1);
        const Tensor b = tb == Transpose::kYes ? Random(n, k, types.in, 2) : Random(k, n, types.in, 2);
        const Tensor c = Random(m, n, types.out, 3);
        const Tensor expected = Copy(c);
        MatMul(a, ta, b, tb, accumulate, c, stream_);
        ref::MatMul(a, ta, b, tb, accumulate, expected, stream_);
        ExpectClose(c, expected, k);
      }
    }
  }
}

TEST_P(Products, EmptySidesAreAllowed) {
  const Tensor c = Random(3, 4, DType::kF32, 1);
  const Tensor before = Copy(c);
  const Tensor a = Empty({3, 0}, DType::kF32);
  const Tensor b = Empty({0, 4}, DType::kF32);
  MatMul(a, Transpose::kNo, b, Transpose::kNo, Accumulate::kAdd, c, stream_);
  EXPECT_EQ(0, std::memcmp(c.raw(), before.raw(), static_cast<size_t>(c.bytes())));
  MatMul(a, Transpose::kNo, b, Transpose::kNo, Accumulate::kOverwrite, c, stream_);
  for (float value : c.span<float>()) EXPECT_EQ(value, 0);
  for (const Types& types : kTypes) {
    const Tensor none = Empty({0, 4}, types.out);
    MatMul(Empty({0, 5}, types.in), Transpose::kNo, Random(5, 4, types.in, 1), Transpose::kNo,
           Accumulate::kOverwrite, none, stream_);
    const Tensor narrow = Empty({4, 0}, types.out);
    MatMul(Random(4, 5, types.in, 1), Transpose::kNo, Empty({0, 5}, types.in), Transpose::kYes,
           Accumulate::kOverwrite, narrow, stream_);
  }
}

// Uneven experts: none, one row, several segments of one expert, gaps between segments, more rows than a work
// unit.
const std::vector<Segment> kSegments = {{0, 0, 33},   {2, 33, 1},    {3, 40, 700}, {1, 740, 0},
                                        {0, 741, 70}, {5, 811, 129}, {4, 941, 257}};
constexpr int64_t kRows = 1200;
constexpr int kExperts = 7;

struct GroupCase {
  int64_t n, k;
};
constexpr GroupCase kGroupCases[] = {{64, 32}, {37, 51}, {96, 130}};

std::vector<Tensor> Weights(int64_t n, int64_t k, DType dtype, uint64_t seed) {
  std::vector<Tensor> weights;
  for (int e = 0; e < kExperts; ++e) weights.push_back(Random(n, k, dtype, seed + e));
  return weights;
}

TEST_P(Products, GroupedForwardAndInputGradientMatchReferenceAndLeaveOtherRowsAlone) {
  for (const auto& [n, k] : kGroupCases) {
    for (const Types& types : kTypes) {
      const std::vector<Tensor> weights = Weights(n, k, types.in, 10);
      for (const bool forward : {true, false}) {
        SCOPED_TRACE(testing::Message()
                     << n << "x" << k << " " << Name(types.in) << (forward ? " y" : " dx"));
        const Tensor in = Random(kRows, forward ? k : n, types.in, 1);
        const Tensor out = Random(kRows, forward ? n : k, types.out, 2);
        const Tensor expected = Copy(out);
        for (const Segment& s : kSegments) {
          ref::MatMul(in.Rows(s.begin, s.count), Transpose::kNo, weights[s.expert],
                      forward ? Transpose::kYes : Transpose::kNo, Accumulate::kOverwrite,
                      expected.Rows(s.begin, s.count), stream_);
        }
        if (forward) {
          GroupedMatMul(in, weights, kSegments, out, stream_);
        } else {
          GroupedMatMulGradInput(in, weights, kSegments, out, stream_);
        }
        ExpectClose(out, expected, forward ? k : n);
      }
    }
  }
}

TEST_P(Products, GroupedWeightGradientMatchesReference) {
  for (const auto& [n, k] : kGroupCases) {
    for (const DType in : {DType::kF32, DType::kBF16}) {
      for (const Accumulate accumulate : {Accumulate::kOverwrite, Accumulate::kAdd}) {
        SCOPED_TRACE(testing::Message() << n << "x" << k << " " << Name(in));
        const Tensor dy = Random(kRows, n, in, 1);
        const Tensor x = Random(kRows, k, in, 2);
        const std::vector<Tensor> grads = Weights(n, k, DType::kF32, 30);
        std::vector<Tensor> expected;
        for (const Tensor& grad : grads) {
          expected.push_back(accumulate == Accumulate::kAdd ? Copy(grad) : Zeros(grad.shape(), DType::kF32));
        }
        for (const Segment& s : kSegments) {
          ref::MatMul(dy.Rows(s.begin, s.count), Transpose::kYes, x.Rows(s.begin, s.count), Transpose::kNo,
                      Accumulate::kAdd, expected[s.expert], stream_);
        }
        GroupedMatMulGradWeight(dy, x, kSegments, accumulate, grads, stream_);
        for (int e = 0; e < kExperts; ++e) ExpectClose(grads[e], expected[e], 700);
      }
    }
  }
}

TEST_P(Products, RepeatsBitForBit) {
  for (const DType in : {DType::kF32, DType::kBF16}) {
    const Tensor x = Random(kRows, 130, in, 1);
    const Tensor dy = Random(kRows, 96, in, 2);
    const std::vector<Tensor> weights = Weights(96, 130, in, 10);
    std::vector<std::vector<Tensor>> results;
    for (int run = 0; run < 5; ++run) {
      std::vector<Tensor> result = Weights(96, 130, DType::kF32, 30);
      GroupedMatMulGradWeight(dy, x, kSegments, Accumulate::kAdd, result, stream_);
      result.push_back(Zeros({kRows, 96}, DType::kF32));
      GroupedMatMul(x, weights, kSegments, result.back(), stream_);
      result.push_back(Zeros({kRows, 130}, DType::kF32));
      GroupedMatMulGradInput(dy, weights, kSegments, result.back(), stream_);
      result.push_back(Zeros({96, 130}, DType::kF32));
      MatMul(dy, Transpose::kYes, x, Transpose::kNo, Accumulate::kOverwrite, result.back(), stream_);
      results.push_back(std::move(result));
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      for (const auto& result : results) {
        ASSERT_EQ(0,
                  std::memcmp(result[i].raw(), results[0][i].raw(), static_cast<size_t>(result[i].bytes())))
            << "result " << i;
      }
    }
  }
}

// Each segment alone, at another address, on one thread: the same bits as beside the others.
TEST_P(Products, PinnedSegmentsDoNotKnowOfEachOther) {
  for (const auto& [n, k] : {GroupCase{96, 130}, GroupCase{512, 256}, GroupCase{700, 64}}) {
    for (const DType in : {DType::kF32, DType::kBF16}) {
      const Tensor x = Random(kRows, k, in, 1), dy = Random(kRows, n, in, 2);
      const std::vector<Tensor> weights = Weights(n, k, in, 10);
      const Tensor y = Zeros({kRows, n}, in), dx = Zeros({kRows, k}, in);
      SetThreads(GetParam());
      GroupedMatMul(x, weights, kSegments, y, stream_, Numerics::kPinned);
      GroupedMatMulGradInput(dy, weights, kSegments, dx, stream_, Numerics::kPinned);
      for (const Segment& s : kSegments) {
        SCOPED_TRACE(testing::Message() << n << "x" << k << " " << Name(in) << ", rows " << s.begin << "+" << s.count);
        const auto expect_same = [](const Tensor& got, const Tensor& want) {
          EXPECT_EQ(0, std::memcmp(got.raw(), want.raw(), static_cast<size_t>(want.bytes())));
        };
        // Three rows further on.
        const auto alone = [&](const Tensor& rows) {
          const Tensor moved = Zeros({s.count + 3, rows.dim(1)}, rows.dtype());
          std::memcpy(moved.Rows(3, s.count).raw(), rows.Rows(s.begin, s.count).raw(),
                      static_cast<size_t>(moved.Rows(3, s.count).bytes()));
          return moved;
        };
        const Tensor x_alone = alone(x), dy_alone = alone(dy);
        const Tensor y_alone = Zeros({s.count + 3, n}, in), dx_alone = Zeros({s.count + 3, k}, in);
        const std::vector<Segment> segment = {{0, 3, s.count}};
        const std::vector<Tensor> weight = {Copy(weights[s.expert])};
        SetThreads(1);
        GroupedMatMul(x_alone, weight, segment, y_alone, stream_, Numerics::kPinned);
        GroupedMatMulGradInput(dy_alone, weight, segment, dx_alone, stream_, Numerics::kPinned);
        expect_same(y_alone.Rows(3, s.count), y.Rows(s.begin, s.count));
        expect_same(dx_alone.Rows(3, s.count), dx.Rows(s.begin, s.count));
        const std::vector<Tensor> dw_alone = {Zeros({n, k}, DType::kF32)}, dw = {Zeros({n, k}, DType::kF32)};
        GroupedMatMulGradWeight(dy_alone, x_alone, segment, Accumulate::kOverwrite, dw_alone, stream_);
        SetThreads(GetParam());
        const std::vector<Segment> among = {{0, s.begin, s.count}};
        GroupedMatMulGradWeight(dy, x, among, Accumulate::kOverwrite, dw, stream_);
        expect_same(dw_alone[0], dw[0]);
      }
    }
  }
}

TEST(MatMulDeathTest, RefusesShapesThatDoNotFit) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  Stream stream;
  const auto multiply = [&](Tensor a, Tensor b, Tensor c) {
    MatMul(a, Transpose::kNo, b, Transpose::kNo, Accumulate::kOverwrite, c, stream);
  };
  EXPECT_DEATH(multiply(Zeros({2, 3}, DType::kF32), Zeros({4, 5}, DType::kF32), Zeros({2, 5}, DType::kF32)),
               "\\[2, 3\\] times \\[4, 5\\]");
  EXPECT_DEATH(multiply(Zeros({2, 3}, DType::kF32), Zeros({3, 5}, DType::kBF16), Zeros({2, 5}, DType::kF32)),
               "bf16");
}

TEST(MeasureMatMulPeak, IsPositive) {
  Stream stream;
  EXPECT_GT(MeasureMatMulPeak(DType::kF32, 0, stream), 0);
  EXPECT_GT(MeasureMatMulPeak(DType::kBF16, 0, stream), 0);
}

}  // namespace
}  // namespace shoal::kernels
