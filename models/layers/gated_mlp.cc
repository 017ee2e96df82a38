#include "models/layers/gated_mlp.h"

#include "runtime/kernels/swiglu.h"

namespace shoal {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

GatedMlp::GatedMlp(const std::string& prefix, int64_t width, int64_t inner, const ParameterStore& store)
    : store_(&store), width_(width), inner_(inner), gate_up_(prefix + "gate_proj.weight"), down_(prefix + "down_proj.weight") {}

void GatedMlp::Forward(const Tensor& normed, Tensor* gate_up, const Tensor& out, Stream& stream) const {
  const int64_t tokens = normed.dim(0);
  const Tensor weights = store_->Weight(gate_up_, {2 * inner_, width_});
  *gate_up = Empty({tokens, 2 * inner_}, weights.dtype(), stream);
  MatMul(normed, Transpose::kNo, weights, Transpose::kYes, Accumulate::kOverwrite, *gate_up, stream);
  const Tensor h = Empty({tokens, inner_}, weights.dtype(), stream);
  kernels::SwiGlu(*gate_up, h, stream);
  MatMul(h, Transpose::kNo, store_->Weight(down_, {width_, inner_}), Transpose::kYes, Accumulate::kAdd, out, stream);
}

void GatedMlp::Backward(const Tensor& dy, const Tensor& normed, const Tensor& gate_up, Accumulate accumulate,
                        Stream& stream) const {
  const Shape down_shape = {width_, inner_};
  const Tensor dh = Empty({dy.dim(0), inner_}, dy.dtype(), stream);
  MatMul(dy, Transpose::kNo, store_->Weight(down_, down_shape), Transpose::kNo, Accumulate::kOverwrite, dh, stream);
  kernels::SwiGluBackward(dh, gate_up, gate_up, dh, stream);
  MatMul(dy, Transpose::kYes, dh, Transpose::kNo, accumulate, store_->Gradient(down_, down_shape), stream);
  MatMul(gate_up, Transpose::kYes, normed, Transpose::kNo, accumulate, store_->Gradient(gate_up_, {2 * inner_, width_}), stream);
}

void GatedMlp::BackwardInput(const Tensor& gate_up, Accumulate accumulate, const Tensor& dnormed, Stream& stream) const {
  MatMul(gate_up, Transpose::kNo, store_->Weight(gate_up_, {2 * inner_, width_}), Transpose::kNo, accumulate, dnormed, stream);
}

}  // namespace shoal
