// Products with the weights of layers, y = x w^T and their gradients: with weights as they are or quantised (train.matmul: fp8,
// runtime/kernels/fp8.h), which this hides. Gradients of weights are products of what is not quantised. Weights must be here while the
// calls run, all on the thread and stream that computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "models/optimizer/parameter_store.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/fp8.h"

namespace shoal {

// Quantised weights. Where weights are kept, so are these: quantised once, when a pass first uses them (ParameterStore::pass).
class QuantisedWeights {
 public:
  // As `weights` are in this pass.
  kernels::Fp8Weights Of(absl::Span<const Tensor> weights, const ParameterStore& store, bool kept, Stream& stream);

 private:
  kernels::Fp8Weights weights_;
  uint64_t pass_ = ~uint64_t{0};  // Of which pass they are: at first of none.
};

// A dense matrix [N, K] of the store.
class Projection {
 public:
  // `name`: of the first parameter that it spans. Borrows `store` for life.
  Projection(std::string name, Shape shape, const ParameterStore& store) : name_(std::move(name)), shape_(std::move(shape)), store_(&store) {}

  // y = addend + x w^T: addend f32 as y, maybe y itself; empty: none.
  void Forward(const Tensor& x, const Tensor& addend, const Tensor& y, Stream& stream);
  // gate_up = x w^T, and h of it (swiglu.h): all of the compute type.
  void ForwardSwiGlu(const Tensor& x, const Tensor& gate_up, const Tensor& h, Stream& stream);
  // dx = addend + dy w.
  void BackwardInput(const Tensor& dy, const Tensor& addend, const Tensor& dx, Stream& stream);
  // The store's gradient (+)= dy^T x.
  void BackwardWeight(const Tensor& dy, const Tensor& x, kernels::Accumulate accumulate, Stream& stream);

 private:
  kernels::Fp8Weights Quantised(Stream& stream);

  std::string name_;
  Shape shape_;
  const ParameterStore* store_;
  QuantisedWeights quantised_;
};

// The addresses of matrices in memory of the stream (kernels::MatrixList), kept from call to call while they are the same. Of one stream.
class KeptMatrixList {
 public:
  Tensor Of(absl::Span<const Tensor> matrices, Stream& stream);

 private:
  std::vector<const void*> addresses_;
  Tensor list_;
};

// One matrix of each expert that is here. The weights of a pass are the same in all calls.
class ExpertProjection {
 public:
  explicit ExpertProjection(const ParameterStore& store) : store_(&store) {}

  // As kernels::GroupedMatMul, GroupedMatMulSwiGlu and GroupedMatMulGradInput.
  void Forward(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const kernels::Segment> segments, const Tensor& y,
               Stream& stream, Numerics numerics);
  void ForwardSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const kernels::Segment> segments, const Tensor& gate_up,
                     const Tensor& h, Stream& stream, Numerics numerics);
  void BackwardInput(const Tensor& dy, absl::Span<const Tensor> weights, absl::Span<const kernels::Segment> segments, const Tensor& dx,
                     Stream& stream, Numerics numerics);
  // With segments in memory of the stream.
  void Forward(const Tensor& x, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& y, Stream& stream);
  void ForwardSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& gate_up, const Tensor& h,
                     Stream& stream);
  void BackwardInput(const Tensor& dy, absl::Span<const Tensor> weights, const Tensor& segments, const Tensor& dx, Stream& stream);

 private:
  bool quantised() const { return store_->products() == kernels::Products::kFp8; }
  kernels::Fp8Weights Quantised(absl::Span<const Tensor> weights, Stream& stream);

  const ParameterStore* store_;
  QuantisedWeights quantised_;
  KeptMatrixList list_;
};

}  // namespace shoal
