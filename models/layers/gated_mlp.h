// The feed-forward part that dense layers and shared experts have in common: down(silu(gate x) * up x), with gate and up side by
// side in the store. T tokens, D width, F inner width.
#pragma once

#include <string>

#include "models/layers/projection.h"

namespace shoal {

class GatedMlp {
 public:
  // `prefix`: of gate_proj.weight, up_proj.weight and down_proj.weight. Borrows `store` for life; weights must be here while the
  // calls below run.
  GatedMlp(const std::string& prefix, int64_t width, int64_t inner, const ParameterStore& store);

  // out_TD = residual_TD + mlp(normed_TD), in f32; both may be one tensor. `gate_up` [T, 2F] is what the backward pass needs.
  void Forward(const Tensor& normed, const Tensor& residual, Tensor* gate_up, const Tensor& out, Stream& stream);
  // Weight gradients from dy_TD (compute type), overwritten or added to. gate_up becomes its own gradient.
  void Backward(const Tensor& dy, const Tensor& normed, const Tensor& gate_up, kernels::Accumulate accumulate,
                Stream& stream);
  // dnormed_TD (+)= the gradient by the input, from what Backward left in gate_up.
  void BackwardInput(const Tensor& gate_up, kernels::Accumulate accumulate, const Tensor& dnormed, Stream& stream);

 private:
  int64_t inner_;
  Projection gate_up_, down_;
};

}  // namespace shoal
