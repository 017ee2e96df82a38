#include "runtime/kernels/fp8.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"
#include "runtime/kernels/group_lists.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::kernels {
namespace {

constexpr uint16_t kInfinity = 0x7f80, kNaN = 0x7fc0;  // bf16

int64_t BlocksOf(int64_t elements) { return (elements + kFp8Block - 1) / kFp8Block; }

// Of a block whose largest magnitude is `largest`, the bits of a finite bf16: 448 is 1.75 times 2^8.
float ScaleFor(uint32_t largest) {
  const uint32_t exponent = ((largest << 16) + 0x1fffffu) >> 23;  // Biased, the next one when the mantissa is above 1.75.
  return std::bit_cast<float>((std::max(exponent, 27u + 8u) - 8u) << 23);
}

uint16_t* RowOf(const Tensor& x, int64_t row) { return reinterpret_cast<uint16_t*>(x.data<BFloat16>()) + row * x.dim(x.rank() - 1); }

// Blocks of `rows` x 128, at `stride` from row to row.
void RoundBlock(const uint16_t* from, int64_t rows, int64_t columns, int64_t stride, uint16_t* to) {
  uint32_t largest = 0;
  for (int64_t row = 0; row < rows; ++row) largest = std::max(largest, Inner().largest_bf16(from + row * stride, columns));
  const float scale = largest >= kInfinity ? 0 : ScaleFor(largest);
  for (int64_t row = 0; row < rows; ++row) {
    if (largest >= kInfinity) {
      std::fill_n(to + row * stride, columns, kNaN);
    } else {
      Inner().round_e4m3(from + row * stride, scale, to + row * stride, columns);
    }
  }
}

void RoundRows(const Tensor& x, const Tensor& values) {
  const int64_t width = x.dim(1);
  ParallelFor(x.dim(0), GrainOfRows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < width; column += kFp8Block) {
        RoundBlock(RowOf(x, row) + column, 1, std::min(kFp8Block, width - column), width, RowOf(values, row) + column);
      }
    }
  });
}

// The rows that some segment has, as few ranges as possible: others may be on their way still.
std::vector<Segment> RangesOf(absl::Span<const Segment> segments) {
  std::vector<Segment> sorted(segments.begin(), segments.end()), ranges;
  std::sort(sorted.begin(), sorted.end(), [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
  for (const Segment& segment : sorted) {
    if (segment.count == 0) continue;
    if (!ranges.empty() && ranges.back().begin + ranges.back().count == segment.begin) {
      ranges.back().count += segment.count;
    } else {
      ranges.push_back(segment);
    }
  }
  return ranges;
}

// x of a product, quantised: like Fp8Weights' values and scales, by rows [R, K] and f32 [R, ceil(K / 128)].
struct Fp8Rows {
  Tensor values, scales;
};

Fp8Rows QuantiseRows(const Tensor& x, absl::Span<const Segment> ranges, Stream& stream) {
  SHOAL_CHECK(x.rank() == 2 && x.dtype() == DType::kBF16) << Name(x.dtype()) << ShapeString(x.shape());
  Fp8Rows rows;
  if (stream.device() == nullptr) {
    rows.values = Empty(x.shape(), DType::kBF16);
    for (const Segment& range : ranges) RoundRows(x.Rows(range.begin, range.count), rows.values.Rows(range.begin, range.count));
    return rows;
  }
  const int64_t blocks = BlocksOf(x.dim(1));
  rows.values = Empty({x.dim(0), blocks * kFp8Block}, DType::kU8, stream);
  rows.scales = Empty({x.dim(0), blocks}, DType::kF32, stream);
  for (const Segment& range : ranges) {
    if (!stream.status().ok()) break;
    const auto part = [&](const Tensor& tensor) { return tensor.Rows(range.begin, range.count); };
    Offloaded(stream, &DeviceKernels::quantise_rows, part(x), part(rows.values), part(rows.scales));
  }
  return rows;
}

enum class Side : uint8_t { kForward, kGradInput };

// What a product has in common with all others: shapes that fit.
void CheckProduct(const Tensor& in, const Fp8Weights& weights, Side side, const Tensor& out) {
  const int64_t k = side == Side::kForward ? weights.columns : weights.rows, n = side == Side::kForward ? weights.rows : weights.columns;
  SHOAL_CHECK(in.rank() == 2 && out.rank() == 2 && in.dim(1) == k && out.dim(1) == n &&
              (out.dtype() == DType::kBF16 || out.dtype() == DType::kF32))
      << ShapeString(in.shape()) << " times weights [" << weights.rows << ", " << weights.columns << "] to " << Name(out.dtype())
      << ShapeString(out.shape());
}

// Where results go.
struct Result {
  const Tensor& y;
  Tensor addend = {};  // Of y, or none.
  Tensor h = {};       // SwiGlu of y, or none.
};

// On a device, by one kernel for all; `segments`: i32 [S, 3], or empty: all rows with the first matrix.
void DeviceProduct(const Fp8Rows& in, const Fp8Weights& weights, Side side, const Tensor& segments, const Result& to, Stream& stream) {
  const bool forward = side == Side::kForward;
  Offloaded(stream, &DeviceKernels::fp8_matmul, in.values, in.scales, forward ? weights.values : weights.transposed, weights.scales,
            !forward, segments, to.addend, to.y, to.h);
}

void CheckGated(const Result& to) {
  SHOAL_CHECK(to.h.empty() || (to.y.dtype() == DType::kBF16 && to.h.dtype() == DType::kBF16 && to.h.rank() == 2 &&
                               to.h.dim(0) == to.y.dim(0) && 2 * to.h.dim(1) == to.y.dim(1)))
      << Name(to.y.dtype()) << ShapeString(to.y.shape()) << " to " << Name(to.h.dtype()) << ShapeString(to.h.shape());
}

void Dense(const Tensor& in, const Fp8Weights& weights, Side side, const Result& to, Stream& stream) {
  CheckProduct(in, weights, side, to.y);
  CheckAddend(to.addend, to.y);
  CheckGated(to);
  SHOAL_CHECK(in.dim(0) == to.y.dim(0) && weights.values.dim(0) == 1) << ShapeString(in.shape()) << " to " << ShapeString(to.y.shape());
  const std::vector<Segment> all = {{0, 0, in.dim(0)}};
  const Fp8Rows rows = QuantiseRows(in, all, stream);
  if (stream.device() != nullptr) return DeviceProduct(rows, weights, side, Tensor(), to, stream);
  MatMul(rows.values, Transpose::kNo, weights.values.Reshape({weights.rows, weights.columns}),
         side == Side::kForward ? Transpose::kYes : Transpose::kNo, to.addend, to.y, stream);
  if (!to.h.empty()) SwiGlu(to.y, to.h, stream);
}

void Grouped(const Tensor& in, const Fp8Weights& weights, Side side, absl::Span<const Segment> segments, const Result& to,
             Stream& stream, Numerics numerics) {
  CheckProduct(in, weights, side, to.y);
  CheckGated(to);
  const Fp8Rows rows = QuantiseRows(in, RangesOf(segments), stream);
  if (stream.device() != nullptr) return DeviceProduct(rows, weights, side, SegmentList(segments, stream), to, stream);
  std::vector<Tensor> matrices;
  for (int64_t e = 0; e < weights.values.dim(0); ++e) {
    matrices.push_back(weights.values.Elements(e * weights.rows * weights.columns, {weights.rows, weights.columns}));
  }
  if (side == Side::kForward) {
    GroupedMatMul(rows.values, matrices, segments, to.y, stream, numerics);
  } else {
    GroupedMatMulGradInput(rows.values, matrices, segments, to.y, stream, numerics);
  }
  if (!to.h.empty()) SwiGlu(to.y, to.h, stream);
}

void Listed(const Tensor& in, const Fp8Weights& weights, Side side, const Tensor& segments, const Result& to, Stream& stream) {
  if (stream.device() == nullptr) return Grouped(in, weights, side, SegmentsOf(segments), to, stream, Numerics::kFast);
  CheckProduct(in, weights, side, to.y);
  CheckGated(to);
  const std::vector<Segment> all = {{0, 0, in.dim(0)}};
  DeviceProduct(QuantiseRows(in, all, stream), weights, side, segments, to, stream);
}

// `tensor` if it is of this type, shape and device, else a new one.
Tensor Reuse(const Tensor& tensor, Shape shape, DType dtype, Stream& stream) {
  return tensor.dtype() == dtype && tensor.shape() == shape ? tensor : Empty(std::move(shape), dtype, stream);
}

}  // namespace

void QuantiseWeights(absl::Span<const Tensor> weights, Fp8Weights* to, Stream& stream) {
  const int64_t count = static_cast<int64_t>(weights.size()), n = weights[0].dim(0), k = weights[0].dim(1);
  for (const Tensor& w : weights) {
    SHOAL_CHECK(w.dtype() == DType::kBF16 && w.shape() == weights[0].shape()) << Name(w.dtype()) << ShapeString(w.shape());
  }
  to->rows = n, to->columns = k;
  if (stream.device() != nullptr) {
    to->values = Reuse(to->values, {count, n, BlocksOf(k) * kFp8Block}, DType::kU8, stream);
    to->transposed = Reuse(to->transposed, {count, k, BlocksOf(n) * kFp8Block}, DType::kU8, stream);
    to->scales = Reuse(to->scales, {count, BlocksOf(n), BlocksOf(k)}, DType::kF32, stream);
    std::vector<DeviceTensor> matrices;
    for (const Tensor& w : weights) matrices.push_back(ToDeviceTensor(w));
    Offloaded(stream, &DeviceKernels::quantise_weights, matrices.data(), static_cast<int32_t>(count), to->values, to->transposed, to->scales);
    return;
  }
  to->values = Reuse(to->values, {count, n, k}, DType::kBF16, stream);
  const int64_t down = BlocksOf(n), blocks = count * down;
  ParallelFor(blocks, std::max<int64_t>(1, kElementsPerThreadMin / (kFp8Block * std::max<int64_t>(k, 1))), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block % down * kFp8Block;
      const uint16_t* const from = RowOf(weights[static_cast<size_t>(block / down)], row);
      uint16_t* const out = RowOf(to->values, block / down * n + row);
      for (int64_t column = 0; column < k; column += kFp8Block) {
        RoundBlock(from + column, std::min(kFp8Block, n - row), std::min(kFp8Block, k - column), k, out + column);
      }
    }
  });
}

void MatMul(const Tensor& x, const Fp8Weights& weights, const Tensor& addend, const Tensor& y, Stream& stream) {
  Dense(x, weights, Side::kForward, {.y = y, .addend = addend}, stream);
}

void MatMulGradInput(const Tensor& dy, const Fp8Weights& weights, const Tensor& addend, const Tensor& dx, Stream& stream) {
  Dense(dy, weights, Side::kGradInput, {.y = dx, .addend = addend}, stream);
}

void GroupedMatMul(const Tensor& x, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& y, Stream& stream,
                   Numerics numerics) {
  Grouped(x, weights, Side::kForward, segments, {.y = y}, stream, numerics);
}

void GroupedMatMulGradInput(const Tensor& dy, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& dx,
                            Stream& stream, Numerics numerics) {
  Grouped(dy, weights, Side::kGradInput, segments, {.y = dx}, stream, numerics);
}

void GroupedMatMul(const Tensor& x, const Fp8Weights& weights, const Tensor& segments, const Tensor& y, Stream& stream) {
  Listed(x, weights, Side::kForward, segments, {.y = y}, stream);
}

void GroupedMatMulGradInput(const Tensor& dy, const Fp8Weights& weights, const Tensor& segments, const Tensor& dx, Stream& stream) {
  Listed(dy, weights, Side::kGradInput, segments, {.y = dx}, stream);
}

void MatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, const Tensor& gate_up, const Tensor& h, Stream& stream) {
  Dense(x, weights, Side::kForward, {.y = gate_up, .h = h}, stream);
}

void GroupedMatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& gate_up,
                         const Tensor& h, Stream& stream, Numerics numerics) {
  Grouped(x, weights, Side::kForward, segments, {.y = gate_up, .h = h}, stream, numerics);
}

void GroupedMatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, const Tensor& segments, const Tensor& gate_up, const Tensor& h,
                         Stream& stream) {
  Listed(x, weights, Side::kForward, segments, {.y = gate_up, .h = h}, stream);
}

}  // namespace shoal::kernels
