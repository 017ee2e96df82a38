#include "models/layers/dense.h"

#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"

namespace shoal {

DenseLayer::DenseLayer(const ModelConfig& config, int layer, const ParameterStore& store)
    : store_(&store),
      width_(config.hidden_size),
      epsilon_(static_cast<float>(config.rms_norm_eps)),
      norm_(absl::StrCat("model.layers.", layer, ".post_attention_layernorm.weight")),
      mlp_(absl::StrCat("model.layers.", layer, ".mlp."), config.hidden_size, config.dense_intermediate_size, store) {}

Tensor DenseLayer::Forward(const Tensor& x, const Tensor& delta, Saved* saved, Stream& stream) {
  saved->x = Empty(x.shape(), DType::kF32, stream);
  saved->normed = Empty(x.shape(), delta.dtype(), stream);
  saved->rstd = Empty({x.dim(0)}, DType::kF32, stream);
  kernels::RmsNorm(x, delta, store_->Weight(norm_, {width_}), epsilon_, saved->x, saved->normed, saved->rstd, stream);
  const Tensor out = Empty(x.shape(), DType::kF32, stream);
  mlp_.Forward(saved->normed, saved->x, &saved->gate_up, out, stream);
  return out;
}

void DenseLayer::Backward(const Saved& saved, kernels::Accumulate accumulate, const Tensor& gradient, Stream& stream) {
  const DType act = saved.normed.dtype();
  Tensor dy = gradient;
  if (act != DType::kF32) {
    dy = Empty(gradient.shape(), act, stream);
    kernels::Convert(gradient, dy, stream);
  }
  mlp_.Backward(dy, saved.normed, saved.gate_up, accumulate, stream);
  const Tensor dnormed = Empty(gradient.shape(), act, stream);
  mlp_.BackwardInput(saved.gate_up, kernels::Accumulate::kOverwrite, dnormed, stream);
  kernels::RmsNormBackward(dnormed, saved.x, store_->Weight(norm_, {width_}), saved.rstd, gradient,
                           store_->Gradient(norm_, {width_}), stream);
}

}  // namespace shoal
