// The feed-forward part that dense layers and shared experts have in common: down(silu(gate x) * up x), with gate and up side by
// side in the store. T tokens, D width, F inner width.
#pragma once

#include <string>

#include "models/optimizer/parameter_store.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

class GatedMlp {
 public:
  // `prefix`: of gate_proj.weight, up_proj.weight and down_proj.weight. Borrows `store` for life; weights must be here while the
  // calls below run.
  GatedMlp(const std::string& prefix, int64_t width, int64_t inner, const ParameterStore& store);

  // out_TD (f32) += mlp(normed_TD). `gate_up` [T, 2F] is what the backward pass needs.
  void Forward(const Tensor& normed, Tensor* gate_up, const Tensor& out, Stream& stream) const;
  // Weight gradients from dy_TD (compute type), overwritten or added to. gate_up becomes its own gradient.
  void Backward(const Tensor& dy, const Tensor& normed, const Tensor& gate_up, kernels::Accumulate accumulate,
                Stream& stream) const;
  // dnormed_TD (+)= the gradient by the input, from what Backward left in gate_up.
  void BackwardInput(const Tensor& gate_up, kernels::Accumulate accumulate, const Tensor& dnormed, Stream& stream) const;

 private:
  const ParameterStore* store_;
  int64_t width_, inner_;
  std::string gate_up_, down_;
};

}  // namespace shoal
