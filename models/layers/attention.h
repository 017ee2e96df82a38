// The attention half of a decoder layer: x + W_o attention(rope(W_qkv norm(x))). T tokens, D width. Attention depends on distances of
// tokens alone (RoPE), so documents that are packed into a sequence keep its positions.
#pragma once

#include "models/layers/projection.h"
#include "models/model_config.h"
#include "runtime/kernels/attention.h"
#include "runtime/kernels/rope.h"

namespace shoal {

class AttentionLayer {
 public:
  // Borrows `store` and `rope` for life. Weights must be here while the calls below run.
  AttentionLayer(const ModelConfig& config, int layer, const ParameterStore& store, const kernels::RopeTable& rope);

  // What the backward pass needs.
  struct Saved {
    Tensor normed, rstd, qkv, out, lse;
  };
  // x_TD (f32), T = rows * seq; first: of kernels::Attention. Returns the layer's output before the residual sum, [T, D] of the compute
  // type.
  Tensor Forward(const Tensor& x, int64_t rows, const Tensor& first, Saved* saved, Stream& stream);

  // gradient_TD (f32): by the residual sum on entry, by x on return. Weight gradients are overwritten or added to.
  void Backward(const Tensor& x, int64_t rows, const Tensor& first, const Saved& saved, kernels::Accumulate accumulate,
                const Tensor& gradient, Stream& stream);

 private:
  kernels::AttentionShape ShapeFor(int64_t rows, int64_t tokens) const;

  const ParameterStore* store_;
  const kernels::RopeTable* rope_;
  kernels::AttentionShape shape_;
  int64_t width_;
  float epsilon_;
  std::string norm_;
  Projection qkv_, out_;  // q, k and v lie side by side.
};

}  // namespace shoal
