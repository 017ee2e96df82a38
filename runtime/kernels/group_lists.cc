#include "runtime/kernels/group_lists.h"

#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "runtime/base/check.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

void CheckLists(const Tensor& matrices, const Tensor& segments) {
  SHOAL_CHECK(matrices.rank() == 1 && matrices.dtype() == DType::kI64) << Name(matrices.dtype()) << ShapeString(matrices.shape());
  SHOAL_CHECK(segments.rank() == 2 && segments.dim(1) == 3 && segments.dtype() == DType::kI32)
      << Name(segments.dtype()) << ShapeString(segments.shape());
}

void CheckRows(const Tensor& in, const Tensor& out) {
  SHOAL_CHECK(in.rank() == 2 && out.rank() == 2 && (in.dtype() == DType::kF32 || in.dtype() == DType::kBF16) &&
              (out.dtype() == DType::kF32 || out.dtype() == in.dtype()))
      << Name(in.dtype()) << ShapeString(in.shape()) << " to " << Name(out.dtype()) << ShapeString(out.shape());
}

// On the host, for the CPU.
std::vector<Tensor> MatricesOf(const Tensor& list, const Shape& shape, DType dtype) {
  std::vector<Tensor> matrices;
  for (const int64_t address : list.span<int64_t>()) matrices.emplace_back(reinterpret_cast<void*>(address), shape, dtype);
  return matrices;
}

}  // namespace

std::vector<Segment> SegmentsOf(const Tensor& list) {
  std::vector<Segment> segments;
  for (int64_t s = 0; s < list.dim(0); ++s) {
    const int32_t* row = list.data<int32_t>() + 3 * s;
    segments.push_back({row[0], row[1], row[2]});
  }
  return segments;
}

GroupLists UploadLists(absl::Span<const Tensor> matrices, absl::Span<const Segment> segments, Stream& stream) {
  constexpr int64_t kRowBytes = 3 * sizeof(int32_t);
  const int64_t experts = static_cast<int64_t>(matrices.size()), rows = static_cast<int64_t>(segments.size());
  const int64_t words = experts + (rows * kRowBytes + 7) / 8;
  std::vector<int64_t> host(static_cast<size_t>(words));
  for (int64_t e = 0; e < experts; ++e) host[e] = reinterpret_cast<int64_t>(matrices[e].raw());
  auto* row = reinterpret_cast<char*>(host.data() + experts);
  for (const Segment& segment : segments) {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    SHOAL_CHECK(segment.begin <= kMax && segment.count <= kMax) << segment.begin << "+" << segment.count << " rows";
    const int32_t values[3] = {segment.expert, static_cast<int32_t>(segment.begin), static_cast<int32_t>(segment.count)};
    std::memcpy(row, values, kRowBytes);
    row += kRowBytes;
  }
  const auto both = std::make_shared<Tensor>(Upload(Tensor(host.data(), {words}, DType::kI64), stream));
  return {Tensor(both->raw(), {experts}, DType::kI64, both),
          Tensor(static_cast<char*>(both->raw()) + experts * 8, {rows, 3}, DType::kI32, both)};
}

Tensor MatrixList(absl::Span<const Tensor> matrices, Stream& stream) { return UploadLists(matrices, {}, stream).matrices; }

Tensor SegmentList(absl::Span<const Segment> segments, Stream& stream) { return UploadLists({}, segments, stream).segments; }

void GroupedMatMul(const Tensor& x, const Tensor& weights, const Tensor& segments, const Tensor& y, Stream& stream) {
  CheckLists(weights, segments);
  CheckRows(x, y);
  if (Offloaded(stream, &DeviceKernels::grouped_matmul, x, weights, segments, y)) return;
  GroupedMatMul(x, MatricesOf(weights, {y.dim(1), x.dim(1)}, x.dtype()), SegmentsOf(segments), y, stream);
}

void GroupedMatMulGradInput(const Tensor& dy, const Tensor& weights, const Tensor& segments, const Tensor& dx, Stream& stream) {
  CheckLists(weights, segments);
  CheckRows(dy, dx);
  if (Offloaded(stream, &DeviceKernels::grouped_matmul_grad_input, dy, weights, segments, dx)) return;
  GroupedMatMulGradInput(dy, MatricesOf(weights, {dy.dim(1), dx.dim(1)}, dy.dtype()), SegmentsOf(segments), dx, stream);
}

void GroupedMatMulGradWeight(const Tensor& dy, const Tensor& x, const Tensor& segments, Accumulate accumulate,
                             const Tensor& weight_grads, Stream& stream) {
  CheckLists(weight_grads, segments);
  CheckRows(dy, x);
  const bool add = accumulate == Accumulate::kAdd;
  if (Offloaded(stream, &DeviceKernels::grouped_matmul_grad_weight, dy, x, segments, add, weight_grads)) return;
  GroupedMatMulGradWeight(dy, x, SegmentsOf(segments), accumulate, MatricesOf(weight_grads, {dy.dim(1), x.dim(1)}, DType::kF32),
                          stream);
}

}  // namespace shoal::kernels
