#include "models/layers/attention.h"

#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"

namespace shoal {

using kernels::Accumulate;

namespace {

kernels::AttentionShape ShapeOf(const ModelConfig& config) {
  kernels::AttentionShape shape;
  shape.heads = config.num_attention_heads;
  shape.kv_heads = config.num_key_value_heads;
  shape.dim = static_cast<int>(config.head_dim);
  return shape;
}

std::string NameOf(int layer, const char* parameter) { return absl::StrCat("model.layers.", layer, ".", parameter, ".weight"); }

}  // namespace

AttentionLayer::AttentionLayer(const ModelConfig& config, int layer, const ParameterStore& store,
                               const kernels::RopeTable& rope)
    : store_(&store),
      rope_(&rope),
      shape_(ShapeOf(config)),
      width_(config.hidden_size),
      epsilon_(static_cast<float>(config.rms_norm_eps)),
      norm_(NameOf(layer, "input_layernorm")),
      qkv_(NameOf(layer, "self_attn.q_proj"), {shape_.qkv_width(), width_}, store),
      out_(NameOf(layer, "self_attn.o_proj"), {width_, shape_.q_width()}, store) {}

kernels::AttentionShape AttentionLayer::ShapeFor(int64_t rows, int64_t tokens) const {
  kernels::AttentionShape shape = shape_;
  shape.rows = rows;
  shape.seq = rows == 0 ? 0 : tokens / rows;
  return shape;
}

Tensor AttentionLayer::Forward(const Tensor& x, int64_t rows, const Tensor& first, Saved* saved, Stream& stream) {
  const int64_t tokens = x.dim(0);
  const Tensor norm = store_->Weight(norm_, {width_});
  const DType act = store_->compute();
  saved->normed = Empty(x.shape(), act, stream);
  saved->rstd = Empty({tokens}, DType::kF32, stream);
  kernels::RmsNorm(x, Tensor(), norm, epsilon_, Tensor(), saved->normed, saved->rstd, stream);
  saved->qkv = Empty({tokens, shape_.qkv_width()}, act, stream);
  qkv_.Forward(saved->normed, /*addend=*/Tensor(), saved->qkv, stream);
  kernels::Rope(saved->qkv, shape_.heads + shape_.kv_heads, shape_.dim, *rope_, kernels::RopeDirection::kForward, stream);
  saved->out = Empty({tokens, shape_.q_width()}, act, stream);
  saved->lse = Empty({tokens, shape_.heads}, DType::kF32, stream);
  kernels::Attention(ShapeFor(rows, tokens), saved->qkv, first, saved->out, saved->lse, stream);
  const Tensor delta = Empty(x.shape(), act, stream);
  out_.Forward(saved->out, /*addend=*/Tensor(), delta, stream);
  return delta;
}

void AttentionLayer::Backward(const Tensor& x, int64_t rows, const Tensor& first, const Saved& saved, Accumulate accumulate,
                              const Tensor& gradient, Stream& stream) {
  const DType act = saved.out.dtype();
  Tensor ddelta = gradient;
  if (act != DType::kF32) {
    ddelta = Empty(gradient.shape(), act, stream);
    kernels::Convert(gradient, ddelta, stream);
  }
  const Tensor dout = Empty(saved.out.shape(), act, stream);
  out_.BackwardInput(ddelta, /*addend=*/Tensor(), dout, stream);
  out_.BackwardWeight(ddelta, saved.out, accumulate, stream);
  const Tensor dqkv = Empty(saved.qkv.shape(), act, stream);
  kernels::AttentionBackward(ShapeFor(rows, x.dim(0)), saved.qkv, first, saved.out, saved.lse, dout, dqkv, stream);
  kernels::Rope(dqkv, shape_.heads + shape_.kv_heads, shape_.dim, *rope_, kernels::RopeDirection::kBackward, stream);
  const Tensor dnormed = Empty(x.shape(), act, stream);
  qkv_.BackwardInput(dqkv, /*addend=*/Tensor(), dnormed, stream);
  qkv_.BackwardWeight(dqkv, saved.normed, accumulate, stream);
  kernels::RmsNormBackward(dnormed, x, store_->Weight(norm_, {width_}), saved.rstd, gradient, store_->Gradient(norm_, {width_}), stream);
}

}  // namespace shoal
