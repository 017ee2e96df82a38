#include "models/layers/attention.h"

#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"

namespace shoal {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

AttentionLayer::AttentionLayer(const ModelConfig& config, int layer, const ParameterStore& store,
                               const kernels::RopeTable& rope)
    : store_(&store), rope_(&rope), width_(config.hidden_size), epsilon_(static_cast<float>(config.rms_norm_eps)) {
  shape_.heads = config.num_attention_heads;
  shape_.kv_heads = config.num_key_value_heads;
  shape_.dim = static_cast<int>(config.head_dim);
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  norm_ = prefix + "input_layernorm.weight";
  qkv_ = prefix + "self_attn.q_proj.weight";
  out_ = prefix + "self_attn.o_proj.weight";
}

kernels::AttentionShape AttentionLayer::ShapeFor(int64_t rows, int64_t tokens) const {
  kernels::AttentionShape shape = shape_;
  shape.rows = rows;
  shape.seq = rows == 0 ? 0 : tokens / rows;
  return shape;
}

Tensor AttentionLayer::Forward(const Tensor& x, int64_t rows, Saved* saved, Stream& stream) const {
  const int64_t tokens = x.dim(0);
  const Tensor norm = store_->Weight(norm_, {width_}), qkv = store_->Weight(qkv_, {shape_.qkv_width(), width_});
  const Tensor out = store_->Weight(out_, {width_, shape_.q_width()});
  const DType act = qkv.dtype();
  saved->normed = Empty(x.shape(), act, stream);
  saved->rstd = Empty({tokens}, DType::kF32, stream);
  kernels::RmsNorm(x, Tensor(), norm, epsilon_, Tensor(), saved->normed, saved->rstd, stream);
  saved->qkv = Empty({tokens, shape_.qkv_width()}, act, stream);
  MatMul(saved->normed, Transpose::kNo, qkv, Transpose::kYes, Accumulate::kOverwrite, saved->qkv, stream);
  kernels::Rope(saved->qkv, shape_.heads + shape_.kv_heads, shape_.dim, *rope_, kernels::RopeDirection::kForward, stream);
  saved->out = Empty({tokens, shape_.q_width()}, act, stream);
  saved->lse = Empty({tokens, shape_.heads}, DType::kF32, stream);
  kernels::Attention(ShapeFor(rows, tokens), saved->qkv, saved->out, saved->lse, stream);
  const Tensor delta = Empty(x.shape(), act, stream);
  MatMul(saved->out, Transpose::kNo, out, Transpose::kYes, Accumulate::kOverwrite, delta, stream);
  return delta;
}

void AttentionLayer::Backward(const Tensor& x, int64_t rows, const Saved& saved, Accumulate accumulate,
                              const Tensor& gradient, Stream& stream) const {
  const Shape qkv_shape = {shape_.qkv_width(), width_}, out_shape = {width_, shape_.q_width()};
  const Tensor norm = store_->Weight(norm_, {width_}), qkv = store_->Weight(qkv_, qkv_shape);
  const Tensor out = store_->Weight(out_, out_shape);
  const DType act = qkv.dtype();
  Tensor ddelta = gradient;
  if (act != DType::kF32) {
    ddelta = Empty(gradient.shape(), act, stream);
    kernels::Convert(gradient, ddelta, stream);
  }
  const Tensor dout = Empty(saved.out.shape(), act, stream);
  MatMul(ddelta, Transpose::kNo, out, Transpose::kNo, Accumulate::kOverwrite, dout, stream);
  MatMul(ddelta, Transpose::kYes, saved.out, Transpose::kNo, accumulate, store_->Gradient(out_, out_shape),
         stream);
  const Tensor dqkv = Empty(saved.qkv.shape(), act, stream);
  kernels::AttentionBackward(ShapeFor(rows, x.dim(0)), saved.qkv, saved.out, saved.lse, dout, dqkv, stream);
  kernels::Rope(dqkv, shape_.heads + shape_.kv_heads, shape_.dim, *rope_, kernels::RopeDirection::kBackward, stream);
  const Tensor dnormed = Empty(x.shape(), act, stream);
  MatMul(dqkv, Transpose::kNo, qkv, Transpose::kNo, Accumulate::kOverwrite, dnormed, stream);
  MatMul(dqkv, Transpose::kYes, saved.normed, Transpose::kNo, accumulate, store_->Gradient(qkv_, qkv_shape),
         stream);
  kernels::RmsNormBackward(dnormed, x, norm, saved.rstd, gradient, store_->Gradient(norm_, {width_}), stream);
}

}  // namespace shoal
