// fp8.h on a device: codes and scales as the reference has them, and products of what they mean.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/fp8.h"
#include "runtime/kernels/swiglu.h"
#include "runtime/tensor/e4m3.h"

namespace shoal::cuda {
namespace {

using kernels::Accumulate;
using kernels::Fp8Weights;
using kernels::kFp8Block;
using kernels::Segment;
using kernels::Transpose;
using kernels::testing::Copy;
using kernels::testing::ExpectNear;
using kernels::testing::ExpectSameBits;
using kernels::testing::Get;
using kernels::testing::MaxAbs;
using kernels::testing::OnRealDevice;
using kernels::testing::Random;
using kernels::testing::Roundoff;
using kernels::testing::Set;
using kernels::testing::TestStream;
using kernels::testing::ToDevice;
using kernels::testing::ToHost;

// Numbers of very different sizes, so that blocks have codes of all kinds, with some zeros.
Tensor Wild(int64_t rows, int64_t columns, uint64_t seed) {
  const Tensor x = Random({rows, columns}, DType::kBF16, seed);
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < x.elements(); ++i) {
    Set(x, i, random() % 16 == 0 ? 0 : std::ldexp(Get(x, i), static_cast<int>(random() % 24) - 12));
  }
  return x;
}

Tensor Rounded(const Tensor& x, int64_t block_rows) {
  const Tensor values = Empty(x.shape(), DType::kBF16);
  kernels::ref::RoundToFp8(x, block_rows, values);
  return values;
}

std::vector<Tensor> AllToDevice(const std::vector<Tensor>& tensors, Stream& stream) {
  std::vector<Tensor> there;
  for (const Tensor& tensor : tensors) there.push_back(ToDevice(tensor, stream));
  return there;
}

Fp8Weights Quantised(const std::vector<Tensor>& weights, Stream& stream) {
  Fp8Weights quantised;
  kernels::QuantiseWeights(AllToDevice(weights, stream), &quantised, stream);
  return quantised;
}

TEST(Fp8OnDevice, WeightsAreTheCodesOfTheReferenceAndLieBothWays) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const auto& [n, k, count] : {std::tuple{1, 1, 1}, {130, 200, 2}, {128, 256, 1}, {37, 3, 70}, {256, 128, 3}}) {
    SCOPED_TRACE(testing::Message() << n << "x" << k);
    std::vector<Tensor> weights;
    for (int e = 0; e < count; ++e) weights.push_back(Wild(n, k, static_cast<uint64_t>(e) + 1));
    const Fp8Weights quantised = Quantised(weights, *stream);
    const Tensor codes = ToHost(quantised.values, *stream), transposed = ToHost(quantised.transposed, *stream),
                 scales = ToHost(quantised.scales, *stream);
    const int64_t down = scales.dim(1), across = scales.dim(2);
    ASSERT_EQ(codes.shape(), Shape({count, n, across * kFp8Block}));
    ASSERT_EQ(transposed.shape(), Shape({count, k, down * kFp8Block}));
    for (int64_t e = 0; e < count; ++e) {
      const Tensor want = Rounded(weights[static_cast<size_t>(e)], kFp8Block);
      for (int64_t row = 0; row < down * kFp8Block; ++row) {
        for (int64_t column = 0; column < across * kFp8Block; ++column) {
          const bool inside = row < n && column < k;
          const float scale = scales.data<float>()[(e * down + row / kFp8Block) * across + column / kFp8Block];
          const double value = inside ? Get(want, row * k + column) : 0;
          if (row < n) {
            const uint8_t code = codes.data<uint8_t>()[(e * n + row) * codes.dim(2) + column];
            ASSERT_EQ(static_cast<double>(FromE4m3(code)) * scale, value) << row << ", " << column;
          }
          if (column < k) {
            const uint8_t code = transposed.data<uint8_t>()[(e * k + column) * transposed.dim(2) + row];
            ASSERT_EQ(static_cast<double>(FromE4m3(code)) * scale, value) << row << ", " << column << " transposed";
          }
        }
      }
    }
  }
}

struct Size {
  int64_t m, n, k;
};

// Sums of so many products, each at most the largest of both operands, which lose 2^-22 of that for each term; on a GPU 2^-13: its tensor
// cores keep some 14 bits of sums of products of codes (tile_product_fp8.h).
double Error(int64_t terms, const Tensor& a, const Tensor& b) {
  return static_cast<double>(terms + 1) * (OnRealDevice() ? 0x1p-13 : 0x1p-22) * MaxAbs(a) * MaxAbs(b);
}

TEST(Fp8OnDevice, DenseProductsAreThoseOfTheRoundedNumbers) {
  Stream host;
  const std::unique_ptr<Stream> stream = TestStream();
  // Within a tile, off every multiple, several tiles and blocks.
  for (const auto& [m, n, k] : {Size{1, 1, 1}, Size{5, 130, 200}, Size{150, 96, 128}, Size{33, 300, 517}, Size{300, 140, 70}}) {
    SCOPED_TRACE(testing::Message() << m << "x" << n << "x" << k);
    const Tensor x = Random({m, k}, DType::kBF16, 1), dy = Random({m, n}, DType::kBF16, 2), w = Random({n, k}, DType::kBF16, 3);
    const Fp8Weights weights = Quantised({w}, *stream);
    for (const DType out : {DType::kBF16, DType::kF32}) {
      for (const bool add : {false, true}) {
        if (add && out != DType::kF32) continue;
        const Accumulate accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite;
        const Tensor want_y = Random({m, n}, out, 4), want_dx = Random({m, k}, out, 5);
        const Tensor y = ToDevice(want_y, *stream), dx = Empty({m, k}, out, *stream);
        kernels::MatMul(ToDevice(x, *stream), weights, add ? y : Tensor(), y, *stream);
        kernels::MatMulGradInput(ToDevice(dy, *stream), weights, add ? ToDevice(want_dx, *stream) : Tensor(), dx, *stream);
        kernels::ref::MatMul(Rounded(x, 1), Transpose::kNo, Rounded(w, kFp8Block), Transpose::kYes, accumulate, want_y, host);
        kernels::ref::MatMul(Rounded(dy, 1), Transpose::kNo, Rounded(w, kFp8Block), Transpose::kNo, accumulate, want_dx, host);
        ExpectNear(ToHost(y, *stream), want_y, 2 * Roundoff(out), Error(k, x, w), "y");
        ExpectNear(ToHost(dx, *stream), want_dx, 2 * Roundoff(out), Error(n, dy, w), "dx");
      }
    }
  }
}

// No rows, one row, several segments of one expert, gaps between segments, more rows than a tile.
const std::vector<Segment> kSegments = {{0, 0, 33}, {2, 33, 1}, {3, 40, 140}, {1, 180, 0}, {0, 190, 70}};
constexpr int64_t kRows = 270;
constexpr int kExperts = 5;

TEST(Fp8OnDevice, GroupedProductsAreThoseOfTheRoundedNumbersAndLeaveOtherRowsAlone) {
  Stream host;
  const std::unique_ptr<Stream> stream = TestStream();
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{130, 200}, {64, 129}, {8, 40}}) {
    SCOPED_TRACE(testing::Message() << n << "x" << k);
    const Tensor x = Random({kRows, k}, DType::kBF16, 1), dy = Random({kRows, n}, DType::kBF16, 2);
    std::vector<Tensor> matrices;
    for (uint64_t e = 0; e < kExperts; ++e) matrices.push_back(Random({n, k}, DType::kBF16, 10 + e));
    const Fp8Weights weights = Quantised(matrices, *stream);
    const Tensor want_y = Random({kRows, n}, DType::kBF16, 3), want_dx = Random({kRows, k}, DType::kBF16, 4);
    for (const bool listed : {false, true}) {
      const Tensor y = ToDevice(want_y, *stream), dx = ToDevice(want_dx, *stream);
      if (listed) {
        const Tensor list = kernels::SegmentList(kSegments, *stream);
        kernels::GroupedMatMul(ToDevice(x, *stream), weights, list, y, *stream);
        kernels::GroupedMatMulGradInput(ToDevice(dy, *stream), weights, list, dx, *stream);
      } else {
        // At an odd address, from which packs cannot be read.
        kernels::GroupedMatMul(kernels::testing::ToOddAddress(x, *stream), weights, kSegments, y, *stream);
        kernels::GroupedMatMulGradInput(kernels::testing::ToOddAddress(dy, *stream), weights, kSegments, dx, *stream);
      }
      for (const Segment& s : kSegments) {
        const Tensor w = Rounded(matrices[static_cast<size_t>(s.expert)], kFp8Block);
        const auto part = [&](const Tensor& tensor) { return tensor.Rows(s.begin, s.count); };
        kernels::ref::MatMul(Rounded(part(x), 1), Transpose::kNo, w, Transpose::kYes, Accumulate::kOverwrite, part(want_y), host);
        kernels::ref::MatMul(Rounded(part(dy), 1), Transpose::kNo, w, Transpose::kNo, Accumulate::kOverwrite, part(want_dx), host);
      }
      ExpectNear(ToHost(y, *stream), want_y, 2 * Roundoff(DType::kBF16), Error(k, x, matrices[0]), "y");
      ExpectNear(ToHost(dx, *stream), want_dx, 2 * Roundoff(DType::kBF16), Error(n, dy, matrices[0]), "dx");
    }
  }
}

// With the bits of the product and of SwiGlu after it: in one kernel where F is a multiple of 128.
TEST(Fp8OnDevice, WithASwiGluProductsAreBothOneAfterTheOther) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const auto& [inner, k] : {std::pair<int64_t, int64_t>{256, 200}, {128, 40}, {72, 130}}) {
    SCOPED_TRACE(testing::Message() << inner << "x" << k);
    const Tensor x = ToDevice(Random({kRows, k}, DType::kBF16, 1), *stream);
    std::vector<Tensor> matrices;
    for (uint64_t e = 0; e < kExperts; ++e) matrices.push_back(Random({2 * inner, k}, DType::kBF16, 10 + e));
    const Fp8Weights weights = Quantised(matrices, *stream), one = Quantised({matrices[2]}, *stream);
    const auto both = [&](const auto& product, const auto& with_swiglu) {
      const Tensor want = Zeros({kRows, 2 * inner}, DType::kBF16, *stream), want_h = Empty({kRows, inner}, DType::kBF16, *stream);
      const Tensor gate_up = Zeros(want.shape(), DType::kBF16, *stream), h = Zeros(want_h.shape(), DType::kBF16, *stream);
      product(want);
      kernels::SwiGlu(want, want_h, *stream);
      with_swiglu(gate_up, h);
      ExpectSameBits(ToHost(gate_up, *stream), ToHost(want, *stream), "gate_up");
      ExpectSameBits(ToHost(h, *stream), ToHost(want_h, *stream), "h");
    };
    both([&](const Tensor& y) { kernels::MatMul(x, one, Tensor(), y, *stream); },
         [&](const Tensor& y, const Tensor& h) { kernels::MatMulSwiGlu(x, one, y, h, *stream); });
    both([&](const Tensor& y) { kernels::GroupedMatMul(x, weights, kSegments, y, *stream); },
         [&](const Tensor& y, const Tensor& h) { kernels::GroupedMatMulSwiGlu(x, weights, kSegments, y, h, *stream); });
    const Tensor list = kernels::SegmentList(kSegments, *stream);
    both([&](const Tensor& y) { kernels::GroupedMatMul(x, weights, list, y, *stream); },
         [&](const Tensor& y, const Tensor& h) { kernels::GroupedMatMulSwiGlu(x, weights, list, y, h, *stream); });
  }
}

TEST(Fp8OnDevice, ARowsBitsDependOnItsOwnNumbersAndWeightsAlone) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor x = Wild(200, 300, 1), w = Random({130, 300}, DType::kBF16, 2);
  const Fp8Weights weights = Quantised({w}, *stream);
  const Tensor all = Empty({200, 130}, DType::kF32, *stream), some = Empty({40, 130}, DType::kF32, *stream);
  kernels::MatMul(ToDevice(x, *stream), weights, Tensor(), all, *stream);
  kernels::MatMul(ToDevice(x.Rows(150, 40), *stream), weights, Tensor(), some, *stream);
  ExpectSameBits(ToHost(some, *stream), ToHost(all, *stream).Rows(150, 40), "rows");
}

TEST(Fp8OnDevice, OverflowsAreNotHidden) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const float odd : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const Tensor x = Random({3, 300}, DType::kBF16, 1), w = Random({140, 300}, DType::kBF16, 2), odd_w = Copy(w);
    const Tensor zero = Zeros({3, 300}, DType::kBF16);
    Set(x, 300 + 140, odd);
    Set(odd_w, 5, odd);
    const Tensor y = Empty({3, 140}, DType::kBF16, *stream), of_zero = Empty({3, 140}, DType::kBF16, *stream);
    kernels::MatMul(ToDevice(x, *stream), Quantised({w}, *stream), Tensor(), y, *stream);
    kernels::MatMul(ToDevice(zero, *stream), Quantised({odd_w}, *stream), Tensor(), of_zero, *stream);
    const Tensor got = ToHost(y, *stream), got_of_zero = ToHost(of_zero, *stream);
    for (int64_t i = 0; i < got.elements(); ++i) {
      EXPECT_EQ(std::isnan(Get(got, i)), i / 140 == 1) << i;
      EXPECT_EQ(std::isnan(Get(got_of_zero, i)), i % 140 < 128) << i;  // A block of weights is NaN as a whole.
    }
  }
}

TEST(Fp8OnDevice, NothingToMultiply) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Fp8Weights weights = Quantised({Random({8, 16}, DType::kBF16, 1)}, *stream);
  const Tensor before = Random({4, 8}, DType::kBF16, 2), y = ToDevice(before, *stream);
  kernels::MatMul(Empty({0, 16}, DType::kBF16, *stream), weights, Tensor(), Empty({0, 8}, DType::kBF16, *stream), *stream);
  kernels::GroupedMatMul(ToDevice(Random({4, 16}, DType::kBF16, 3), *stream), weights, std::vector<Segment>{{0, 2, 0}}, y, *stream);
  ExpectSameBits(ToHost(y, *stream), before, "y");
}

}  // namespace
}  // namespace shoal::cuda
