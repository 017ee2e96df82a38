#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/gated_matmul.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::cuda {
namespace {

using kernels::Accumulate;
using kernels::Segment;
using kernels::Transpose;

using kernels::testing::Get;
using kernels::testing::TestStream;
using kernels::testing::ToDevice;
using kernels::testing::ToHost;

// Uniform in [-1, 1), so that a product of K terms is at most K.
Tensor Random(int64_t rows, int64_t columns, DType dtype, uint64_t seed) {
  const Tensor tensor = Empty({rows, columns}, dtype);
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    if (dtype == DType::kBF16) {
      tensor.data<BFloat16>()[i] = BFloat16(uniform(random));
    } else {
      tensor.data<float>()[i] = uniform(random);
    }
  }
  return tensor;
}

Tensor Copy(const Tensor& from) {
  const Tensor to = Empty(from.shape(), from.dtype());
  if (from.bytes() > 0) std::memcpy(to.raw(), from.raw(), static_cast<size_t>(from.bytes()));
  return to;
}

bool SameBits(const Tensor& a, const Tensor& b) {
  return a.bytes() == 0 || std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0;
}

// Products of two bf16 are exact in f32; the k sums round each once, by at most 2^-23 (the tensor cores truncate) of a partial sum, which
// for random terms stays below 4 sqrt(k); errors of random sign add up as sqrt(k). On top one rounding to the result's type, of both.
void ExpectClose(const Tensor& got, const Tensor& want, int64_t k) {
  ASSERT_EQ(got.shape(), want.shape());
  const double size = 4 * std::sqrt(static_cast<double>(k) + 1), relative = got.dtype() == DType::kBF16 ? 0x1p-7 : 0x1p-24;
  for (int64_t i = 0; i < got.elements(); ++i) {
    const double tolerance = size * 4 * std::sqrt(static_cast<double>(k) + 1) * 0x1p-23 + relative * std::abs(Get(want, i));
    ASSERT_TRUE(std::abs(Get(got, i) - Get(want, i)) <= tolerance) << "row " << i / got.dim(1) << " column " << i % got.dim(1) << ": "
                                                                   << Get(got, i) << ", want " << Get(want, i) << " within " << tolerance;
  }
}

// No rows, one row, several segments of one expert, gaps between segments, more rows than a tile; expert 6 has none.
const std::vector<Segment> kSegments = {{0, 0, 33},   {2, 33, 1},    {3, 40, 290}, {1, 330, 0},
                                        {0, 331, 70}, {5, 401, 129}, {4, 531, 64}, {0, 595, 2}};
constexpr int64_t kRows = 600;
constexpr int kExperts = 7;

struct Size {
  int64_t n, k;
};
// Within a tile, off every multiple, across tiles of rows and columns, and rows that are not aligned.
constexpr Size kSizes[] = {{64, 32}, {37, 51}, {136, 272}, {300, 130}, {8, 520}, {1, 1}};

struct Types {
  DType in, out;
};
constexpr Types kTypes[] = {{DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}};

std::vector<Tensor> Weights(int64_t n, int64_t k, DType dtype, uint64_t seed) {
  std::vector<Tensor> weights;
  for (uint64_t e = 0; e < kExperts; ++e) weights.push_back(Random(n, k, dtype, seed + e));
  return weights;
}

// On the device and back.
std::vector<Tensor> AllToDevice(const std::vector<Tensor>& tensors, Stream& stream) {
  std::vector<Tensor> there;
  for (const Tensor& tensor : tensors) there.push_back(ToDevice(tensor, stream));
  return there;
}
Tensor Forward(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Segment>& segments, const Tensor& y) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor result = ToDevice(y, *stream);
  kernels::GroupedMatMul(ToDevice(x, *stream), AllToDevice(weights, *stream), segments, result, *stream);
  return ToHost(result, *stream);
}
Tensor GradInput(const Tensor& dy, const std::vector<Tensor>& weights, const std::vector<Segment>& segments, const Tensor& dx) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor result = ToDevice(dx, *stream);
  kernels::GroupedMatMulGradInput(ToDevice(dy, *stream), AllToDevice(weights, *stream), segments, result, *stream);
  return ToHost(result, *stream);
}
std::vector<Tensor> GradWeight(const Tensor& dy, const Tensor& x, const std::vector<Segment>& segments, Accumulate accumulate,
                               const std::vector<Tensor>& grads) {
  const std::unique_ptr<Stream> stream = TestStream();
  std::vector<Tensor> results = AllToDevice(grads, *stream);
  kernels::GroupedMatMulGradWeight(ToDevice(dy, *stream), ToDevice(x, *stream), segments, accumulate, results, *stream);
  for (Tensor& result : results) result = ToHost(result, *stream);
  return results;
}

TEST(GroupedMatMul, ForwardAndInputGradientMatchTheReferenceAndLeaveOtherRowsAlone) {
  Stream host;
  for (const auto& [n, k] : kSizes) {
    for (const Types& types : kTypes) {
      const std::vector<Tensor> weights = Weights(n, k, types.in, 10);
      for (const bool forward : {true, false}) {
        SCOPED_TRACE(testing::Message() << n << "x" << k << " " << Name(types.in) << " to " << Name(types.out)
                                        << (forward ? " y" : " dx"));
        const Tensor in = Random(kRows, forward ? k : n, types.in, 1), out = Random(kRows, forward ? n : k, types.out, 2);
        const Tensor expected = Copy(out);
        for (const Segment& s : kSegments) {
          kernels::ref::MatMul(in.Rows(s.begin, s.count), Transpose::kNo, weights[static_cast<size_t>(s.expert)],
                               forward ? Transpose::kYes : Transpose::kNo, Accumulate::kOverwrite, expected.Rows(s.begin, s.count), host);
        }
        const Tensor got = forward ? Forward(in, weights, kSegments, out) : GradInput(in, weights, kSegments, out);
        ExpectClose(got, expected, forward ? k : n);
        EXPECT_TRUE(SameBits(got.Rows(330, 1), out.Rows(330, 1)) && SameBits(got.Rows(597, 3), out.Rows(597, 3)));
      }
    }
  }
}

TEST(GroupedMatMul, WeightGradientMatchesTheReference) {
  Stream host;
  for (const auto& [n, k] : kSizes) {
    for (const DType in : {DType::kF32, DType::kBF16}) {
      for (const Accumulate accumulate : {Accumulate::kOverwrite, Accumulate::kAdd}) {
        const bool add = accumulate == Accumulate::kAdd;
        SCOPED_TRACE(testing::Message() << n << "x" << k << " " << Name(in) << (add ? " added" : ""));
        const Tensor dy = Random(kRows, n, in, 1), x = Random(kRows, k, in, 2);
        const std::vector<Tensor> grads = Weights(n, k, DType::kF32, 30);
        std::vector<Tensor> expected;
        for (const Tensor& grad : grads) expected.push_back(add ? Copy(grad) : Zeros(grad.shape(), DType::kF32));
        for (const Segment& s : kSegments) {
          kernels::ref::MatMul(dy.Rows(s.begin, s.count), Transpose::kYes, x.Rows(s.begin, s.count), Transpose::kNo, Accumulate::kAdd,
                               expected[static_cast<size_t>(s.expert)], host);
        }
        const std::vector<Tensor> got = GradWeight(dy, x, kSegments, accumulate, grads);
        for (size_t e = 0; e < kExperts; ++e) ExpectClose(got[e], expected[e], 290);
        EXPECT_TRUE(SameBits(got[6], expected[6]));
      }
    }
  }
}

// A segment alone, elsewhere: the same bits as beside the others.
TEST(GroupedMatMul, SegmentsDoNotKnowOfEachOther) {
  constexpr int64_t kN = 136, kK = 72;
  for (const DType in : {DType::kF32, DType::kBF16}) {
    const Tensor x = Random(kRows, kK, in, 1), dy = Random(kRows, kN, in, 2);
    const std::vector<Tensor> weights = Weights(kN, kK, in, 10);
    const Tensor y = Forward(x, weights, kSegments, Zeros({kRows, kN}, in));
    const Tensor dx = GradInput(dy, weights, kSegments, Zeros({kRows, kK}, in));
    for (const Segment& s : {kSegments[4], kSegments[5]}) {
      SCOPED_TRACE(testing::Message() << Name(in) << " rows " << s.begin << "+" << s.count);
      const auto alone = [&](const Tensor& rows) {
        const Tensor moved = Zeros({s.count + 3, rows.dim(1)}, rows.dtype());
        std::memcpy(moved.Rows(3, s.count).raw(), rows.Rows(s.begin, s.count).raw(), static_cast<size_t>(moved.Rows(3, s.count).bytes()));
        return moved;
      };
      const std::vector<Tensor> weight = {weights[static_cast<size_t>(s.expert)]};
      const Tensor y_alone = Forward(alone(x), weight, {{0, 3, s.count}}, Zeros({s.count + 3, kN}, in));
      const Tensor dx_alone = GradInput(alone(dy), weight, {{0, 3, s.count}}, Zeros({s.count + 3, kK}, in));
      EXPECT_TRUE(SameBits(y_alone.Rows(3, s.count), y.Rows(s.begin, s.count)));
      EXPECT_TRUE(SameBits(dx_alone.Rows(3, s.count), dx.Rows(s.begin, s.count)));
      const Tensor zeros = Zeros({kN, kK}, DType::kF32);
      const std::vector<Tensor> dw_alone = GradWeight(alone(dy), alone(x), {{0, 3, s.count}}, Accumulate::kOverwrite, {zeros});
      const std::vector<Tensor> dw = GradWeight(dy, x, {{1, 0, 7}, {0, s.begin, s.count}}, Accumulate::kOverwrite, {zeros, zeros});
      EXPECT_TRUE(SameBits(dw_alone[0], dw[0]));
    }
  }
}

// More segments than a warp has lanes, most of them empty.
TEST(GroupedMatMul, ManySegments) {
  Stream host;
  std::mt19937 random(3);
  std::vector<Segment> segments;
  int64_t begin = 0;
  for (int i = 0; i < 100; ++i) {
    const int64_t count = random() % 3 == 0 ? static_cast<int64_t>(random() % 5) : 0;
    segments.push_back({static_cast<int>(random() % kExperts), begin, count});
    begin += count;
  }
  constexpr int64_t kN = 16, kK = 24;
  for (const DType in : {DType::kF32, DType::kBF16}) {
    const std::vector<Tensor> weights = Weights(kN, kK, in, 10), grads = Weights(kN, kK, DType::kF32, 30);
    const Tensor x = Random(begin, kK, in, 1), dy = Random(begin, kN, in, 2), y = Random(begin, kN, in, 3);
    const Tensor y_expected = Copy(y);
    std::vector<Tensor> expected;
    for (int e = 0; e < kExperts; ++e) expected.push_back(Zeros({kN, kK}, DType::kF32));
    for (const Segment& s : segments) {
      const auto e = static_cast<size_t>(s.expert);
      kernels::ref::MatMul(x.Rows(s.begin, s.count), Transpose::kNo, weights[e], Transpose::kYes, Accumulate::kOverwrite,
                           y_expected.Rows(s.begin, s.count), host);
      kernels::ref::MatMul(dy.Rows(s.begin, s.count), Transpose::kYes, x.Rows(s.begin, s.count), Transpose::kNo, Accumulate::kAdd,
                           expected[e], host);
    }
    ExpectClose(Forward(x, weights, segments, y), y_expected, kK);
    const std::vector<Tensor> got = GradWeight(dy, x, segments, Accumulate::kOverwrite, grads);
    for (size_t e = 0; e < kExperts; ++e) ExpectClose(got[e], expected[e], 50);
  }
}

TEST(GroupedMatMul, OddAddresses) {
  Stream host;
  const std::unique_ptr<Stream> stream = TestStream();
  for (const DType in : {DType::kF32, DType::kBF16}) {
    const Tensor x = Random(40, 72, in, 1), w = Random(24, 72, in, 2), y = Zeros({40, 24}, in), dw = Zeros({24, 72}, DType::kF32);
    const Tensor there_x = kernels::testing::ToOddAddress(x, *stream), there_y = kernels::testing::ToOddAddress(y, *stream);
    const std::vector<Tensor> weights = {kernels::testing::ToOddAddress(w, *stream)},
                              grads = {kernels::testing::ToOddAddress(dw, *stream)};
    kernels::GroupedMatMul(there_x, weights, std::vector<Segment>{{0, 0, 40}}, there_y, *stream);
    kernels::ref::MatMul(x, Transpose::kNo, w, Transpose::kYes, Accumulate::kOverwrite, y, host);
    ExpectClose(ToHost(there_y, *stream), y, 72);
    kernels::GroupedMatMulGradWeight(there_y, there_x, std::vector<Segment>{{0, 0, 40}}, Accumulate::kOverwrite, grads, *stream);
    kernels::ref::MatMul(ToHost(there_y, *stream), Transpose::kYes, x, Transpose::kNo, Accumulate::kOverwrite, dw, host);
    ExpectClose(ToHost(grads[0], *stream), dw, 40 * 72);  // The terms are sums of 72.
  }
}

// With the bits of the product and of SwiGlu after it; F within a tile, off every multiple of what a tile has of gates, across tiles.
TEST(GroupedMatMul, WithASwiGluItIsBothOneAfterTheOther) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const auto& [inner, k] : {Size{64, 32}, Size{7, 51}, Size{136, 72}, Size{150, 24}, Size{16, 130}}) {
    for (const DType in : {DType::kBF16, DType::kF32}) {
      SCOPED_TRACE(testing::Message() << inner << "x" << k << " " << Name(in));
      const std::vector<Tensor> weights = AllToDevice(Weights(2 * inner, k, in, 10), *stream);
      const Tensor x = ToDevice(Random(kRows, k, in, 1), *stream), before = Random(kRows, 2 * inner, in, 2);
      const Tensor want = ToDevice(before, *stream), want_h = Empty({kRows, inner}, in, *stream);
      kernels::GroupedMatMul(x, weights, kSegments, want, *stream);
      kernels::SwiGlu(want, want_h, *stream);
      for (const bool listed : {false, true}) {
        const Tensor gate_up = ToDevice(before, *stream), h = Zeros({kRows, inner}, in, *stream);
        if (listed) {
          kernels::GroupedMatMulSwiGlu(x, kernels::MatrixList(weights, *stream), kernels::SegmentList(kSegments, *stream), gate_up, h,
                                       *stream);
        } else {
          kernels::GroupedMatMulSwiGlu(x, weights, kSegments, gate_up, h, *stream);
        }
        EXPECT_TRUE(SameBits(ToHost(gate_up, *stream), ToHost(want, *stream)));
        const Tensor got_h = ToHost(h, *stream), all = ToHost(want_h, *stream);
        for (const Segment& s : kSegments) EXPECT_TRUE(SameBits(got_h.Rows(s.begin, s.count), all.Rows(s.begin, s.count))) << s.begin;
      }
    }
  }
}

TEST(GroupedMatMul, NoSegmentsTouchNothingAndZeroTheGradients) {
  const Tensor x = Random(10, 32, DType::kBF16, 1), y = Random(10, 16, DType::kBF16, 2);
  const std::vector<Tensor> weights = Weights(16, 32, DType::kBF16, 10), grads = Weights(16, 32, DType::kF32, 30);
  for (const std::vector<Segment>& none : {std::vector<Segment>{}, std::vector<Segment>{{1, 5, 0}}}) {
    EXPECT_TRUE(SameBits(Forward(x, weights, none, y), y));
    for (const Tensor& grad : GradWeight(y, x, none, Accumulate::kOverwrite, grads)) {
      EXPECT_TRUE(SameBits(grad, Zeros(grad.shape(), DType::kF32)));
    }
  }
}

}  // namespace
}  // namespace shoal::cuda
