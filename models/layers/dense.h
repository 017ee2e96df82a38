// The feed-forward half of a dense layer: x + mlp(norm(x)). T tokens, D width.
#pragma once

#include "models/layers/gated_mlp.h"
#include "models/model_config.h"

namespace shoal {

class DenseLayer {
 public:
  DenseLayer(const ModelConfig& config, int layer, const ParameterStore& store);  // Borrows `store` for life.

  // What the backward pass needs.
  struct Saved {
    Tensor x, normed, rstd, gate_up;
  };
  // Returns x + delta + mlp(norm(x + delta)) [T, D] f32, with x f32 and delta of the compute type.
  Tensor Forward(const Tensor& x, const Tensor& delta, Saved* saved, Stream& stream);
  // gradient_TD (f32): by the output on entry, by x + delta on return.
  void Backward(const Saved& saved, kernels::Accumulate accumulate, const Tensor& gradient, Stream& stream);

 private:
  const ParameterStore* store_;
  int64_t width_;
  float epsilon_;
  std::string norm_;
  GatedMlp mlp_;
};

}  // namespace shoal
