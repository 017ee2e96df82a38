#include "models/layers/gated_mlp.h"

#include "runtime/kernels/swiglu.h"

namespace shoal {

using kernels::Accumulate;

GatedMlp::GatedMlp(const std::string& prefix, int64_t width, int64_t inner, const ParameterStore& store)
    : inner_(inner),
      gate_up_(prefix + "gate_proj.weight", {2 * inner, width}, store),
      down_(prefix + "down_proj.weight", {width, inner}, store) {}

void GatedMlp::Forward(const Tensor& normed, const Tensor& residual, Tensor* gate_up, const Tensor& out, Stream& stream) {
  const int64_t tokens = normed.dim(0);
  *gate_up = Empty({tokens, 2 * inner_}, normed.dtype(), stream);
  const Tensor h = Empty({tokens, inner_}, normed.dtype(), stream);
  gate_up_.ForwardSwiGlu(normed, *gate_up, h, stream);
  down_.Forward(h, residual, out, stream);
}

void GatedMlp::Backward(const Tensor& dy, const Tensor& normed, const Tensor& gate_up, Accumulate accumulate, Stream& stream) {
  const Tensor dh = Empty({dy.dim(0), inner_}, dy.dtype(), stream);
  down_.BackwardInput(dy, /*addend=*/Tensor(), dh, stream);
  kernels::SwiGluBackward(dh, gate_up, gate_up, dh, stream);
  down_.BackwardWeight(dy, dh, accumulate, stream);
  gate_up_.BackwardWeight(gate_up, normed, accumulate, stream);
}

void GatedMlp::BackwardInput(const Tensor& gate_up, Accumulate accumulate, const Tensor& dnormed, Stream& stream) {
  gate_up_.BackwardInput(gate_up, accumulate == Accumulate::kAdd ? dnormed : Tensor(), dnormed, stream);
}

}  // namespace shoal
