#include "models/layers/projection.h"

#include <algorithm>
#include <utility>

#include "runtime/kernels/gated_matmul.h"
#include "runtime/kernels/swiglu.h"

namespace shoal {

using kernels::Fp8Weights;
using kernels::MatMul;
using kernels::Products;
using kernels::Segment;
using kernels::Transpose;

Fp8Weights QuantisedWeights::Of(absl::Span<const Tensor> weights, const ParameterStore& store, bool kept, Stream& stream) {
  if (kept && pass_ == store.pass()) return weights_;
  Fp8Weights fresh = kept ? weights_ : Fp8Weights();
  kernels::QuantiseWeights(weights, &fresh, stream);
  if (!kept) return fresh;
  weights_ = std::move(fresh);
  pass_ = store.pass();
  return weights_;
}

Fp8Weights Projection::Quantised(Stream& stream) {
  const Tensor weight = store_->Weight(name_, shape_);
  return quantised_.Of({&weight, 1}, *store_, store_->keeps_dense(), stream);
}

void Projection::Forward(const Tensor& x, const Tensor& addend, const Tensor& y, Stream& stream) {
  if (store_->products() == Products::kFp8) return MatMul(x, Quantised(stream), addend, y, stream);
  MatMul(x, Transpose::kNo, store_->Weight(name_, shape_), Transpose::kYes, addend, y, stream);
}

// cuBLASLt has no such epilogue, and its product is not worth giving up for the bytes: docs/design.md, Devices.
void Projection::ForwardSwiGlu(const Tensor& x, const Tensor& gate_up, const Tensor& h, Stream& stream) {
  if (store_->products() == Products::kFp8) return kernels::MatMulSwiGlu(x, Quantised(stream), gate_up, h, stream);
  Forward(x, /*addend=*/Tensor(), gate_up, stream);
  kernels::SwiGlu(gate_up, h, stream);
}

void Projection::BackwardInput(const Tensor& dy, const Tensor& addend, const Tensor& dx, Stream& stream) {
  if (store_->products() == Products::kFp8) return MatMulGradInput(dy, Quantised(stream), addend, dx, stream);
  MatMul(dy, Transpose::kNo, store_->Weight(name_, shape_), Transpose::kNo, addend, dx, stream);
}

void Projection::BackwardWeight(const Tensor& dy, const Tensor& x, kernels::Accumulate accumulate, Stream& stream) {
  MatMul(dy, Transpose::kYes, x, Transpose::kNo, accumulate, store_->Gradient(name_, shape_), stream);
}

Tensor KeptMatrixList::Of(absl::Span<const Tensor> matrices, Stream& stream) {
  const auto same = [](const void* address, const Tensor& matrix) { return address == matrix.raw(); };
  if (!list_.empty() && std::equal(addresses_.begin(), addresses_.end(), matrices.begin(), matrices.end(), same)) return list_;
  Tensor list = kernels::MatrixList(matrices, stream);
  if (stream.capturing()) return list;  // The graph's, and written by its launches.
  addresses_.clear();
  for (const Tensor& matrix : matrices) addresses_.push_back(matrix.raw());
  return list_ = std::move(list);
}

Fp8Weights ExpertProjection::Quantised(absl::Span<const Tensor> weights, Stream& stream) {
  return quantised_.Of(weights, *store_, store_->keeps_experts(), stream);
}

void ExpertProjection::Forward(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments, const Tensor& y,
                               Stream& stream, Numerics numerics) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMul(x, Quantised(weights, stream), segments, y, stream, numerics);
  kernels::GroupedMatMul(x, weights, segments, y, stream, numerics);
}

void ExpertProjection::ForwardSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                                     const Tensor& gate_up, const Tensor& h, Stream& stream, Numerics numerics) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMulSwiGlu(x, Quantised(weights, stream), segments, gate_up, h, stream, numerics);
  kernels::GroupedMatMulSwiGlu(x, weights, segments, gate_up, h, stream, numerics);
}

void ExpertProjection::BackwardInput(const Tensor& dy, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                                     const Tensor& dx, Stream& stream, Numerics numerics) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMulGradInput(dy, Quantised(weights, stream), segments, dx, stream, numerics);
  kernels::GroupedMatMulGradInput(dy, weights, segments, dx, stream, numerics);
}

void ExpertProjection::Forward(const Tensor& x, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& y,
                               Stream& stream) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMul(x, Quantised(weights, stream), segments, y, stream);
  kernels::GroupedMatMul(x, list_.Of(weights, stream), segments, y, stream);
}

void ExpertProjection::ForwardSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& gate_up,
                                     const Tensor& h, Stream& stream) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMulSwiGlu(x, Quantised(weights, stream), segments, gate_up, h, stream);
  kernels::GroupedMatMulSwiGlu(x, list_.Of(weights, stream), segments, gate_up, h, stream);
}

void ExpertProjection::BackwardInput(const Tensor& dy, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& dx,
                                     Stream& stream) {
  if (weights.empty()) return;
  if (quantised()) return GroupedMatMulGradInput(dy, Quantised(weights, stream), segments, dx, stream);
  kernels::GroupedMatMulGradInput(dy, list_.Of(weights, stream), segments, dx, stream);
}

}  // namespace shoal
