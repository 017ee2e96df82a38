#include "models/zoo/decoder.h"

#include <algorithm>
#include <cstring>

#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/norm.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

// Columns [begin, begin + count) of an i32 matrix, flattened.
Tensor Columns(const Tensor& tokens, int64_t begin, int64_t count) {
  const int64_t rows = tokens.dim(0), stride = tokens.dim(1);
  Tensor out = Empty({rows * count}, DType::kI32);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(out.data<int32_t>() + row * count, tokens.data<int32_t>() + row * stride + begin,
                static_cast<size_t>(count) * sizeof(int32_t));
  }
  return out;
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const Options& options, ParameterStore& store, TokenExchange& exchange)
    : config_(config),
      options_(options),
      store_(&store),
      rope_(kernels::MakeRopeTable(options.seq, static_cast<int>(config.head_dim), config.rope_theta)) {
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    attention_.emplace_back(config, layer, store, rope_);
    feed_forward_.push_back(config.is_dense(layer) ? MakeDenseFeedForward(config, layer, store)
                                                   : MakeMoeFeedForward(config, layer, store, exchange));
  }
  const Shape table = {config.vocab_size, config.hidden_size};
  const std::string embedding = "model.embed_tokens.weight", norm = "model.norm.weight";
  const std::string head = config.tie_word_embeddings ? embedding : "lm_head.weight";
  embedding_ = store.Weight(embedding, table);
  norm_ = store.Weight(norm, {config.hidden_size});
  head_ = store.Weight(head, table);
  if (!store.training()) return;
  embedding_gradient_ = store.Gradient(embedding, table);
  norm_gradient_ = store.Gradient(norm, {config.hidden_size});
  head_gradient_ = store.Gradient(head, table);
}

absl::StatusOr<Tensor> Decoder::RunLayer(size_t layer, const Tensor& x, int64_t rows, LayerSaved* saved,
                                         RoutingSums* sums, Stream& stream) {
  saved->x = x;
  const Tensor delta = attention_[layer].Forward(x, rows, &saved->attention, stream);
  return feed_forward_[layer]->Forward(x, delta, &saved->feed_forward, sums, stream);
}

absl::StatusOr<Tensor> Decoder::RunLayers(const Tensor& x, int64_t rows, bool keep, std::vector<RoutingSums>* sums,
                                          Stream& stream) {
  Tensor current = x;
  saved_.clear();
  for (size_t layer = 0; layer < attention_.size(); ++layer) {
    LayerSaved saved;
    RoutingSums layer_sums;
    SHOAL_ASSIGN_OR_RETURN(Tensor next, RunLayer(layer, current, rows, &saved, &layer_sums, stream), "layer ", layer);
    if (sums != nullptr && !config_.is_dense(static_cast<int>(layer))) sums->push_back(std::move(layer_sums));
    if (keep && options_.recompute) saved_.push_back({.x = saved.x, .attention = {}, .feed_forward = nullptr});
    if (keep && !options_.recompute) saved_.push_back(std::move(saved));
    current = next;
  }
  return current;
}

double Decoder::RunHead(const Tensor& normed, const Tensor& targets, float scale, Accumulate accumulate,
                        const Tensor& dnormed, Stream& stream) {
  const int64_t tokens = normed.dim(0), chunk = std::min(options_.loss_chunk, std::max<int64_t>(tokens, 1));
  const Tensor logits_all = Empty({chunk, config_.vocab_size}, DType::kF32);
  const bool narrow = head_.dtype() != DType::kF32;
  const Tensor dlogits_all = narrow && scale > 0 ? Empty({chunk, config_.vocab_size}, head_.dtype()) : logits_all;
  const Tensor losses = Empty({tokens}, DType::kF32);
  // At least one pass, so that gradients are written when there are no tokens.
  for (int64_t begin = 0; begin == 0 || begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const Tensor x = normed.Rows(begin, count), logits = logits_all.Rows(0, count);
    MatMul(x, Transpose::kNo, head_, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    const Tensor dlogits = scale > 0 ? dlogits_all.Rows(0, count) : Tensor();
    kernels::CrossEntropy(logits, targets.Rows(begin, count), scale, losses.Rows(begin, count), dlogits, stream);
    if (scale <= 0) continue;
    MatMul(dlogits, Transpose::kNo, head_, Transpose::kNo, Accumulate::kOverwrite, dnormed.Rows(begin, count), stream);
    MatMul(dlogits, Transpose::kYes, x, Transpose::kNo, begin == 0 ? accumulate : Accumulate::kAdd, head_gradient_, stream);
  }
  double sum = 0;
  for (float loss : losses.span<float>()) sum += loss;
  return sum;
}

absl::StatusOr<Decoder::Sums> Decoder::Forward(const Tensor& tokens, float loss_scale, Accumulate accumulate,
                                               Stream& stream) {
  rows_ = tokens.dim(0);
  accumulate_ = accumulate;
  const int64_t seq = tokens.dim(1) - 1;
  SHOAL_CHECK_LE(seq, options_.seq);
  ids_ = Columns(tokens, 0, seq);
  const Tensor targets = Columns(tokens, 1, seq);
  const Tensor x = Empty({rows_ * seq, config_.hidden_size}, DType::kF32);
  kernels::Embedding(embedding_, ids_, x, stream);
  Sums sums;
  SHOAL_ASSIGN_OR_RETURN(final_x_, RunLayers(x, rows_, /*keep=*/true, &sums.routing, stream));
  const Tensor normed = Empty(x.shape(), head_.dtype());
  final_rstd_ = Empty({x.dim(0)}, DType::kF32);
  kernels::RmsNorm(final_x_, Tensor(), norm_, static_cast<float>(config_.rms_norm_eps), Tensor(), normed, final_rstd_, stream);
  final_gradient_ = Empty(x.shape(), DType::kF32);
  sums.cross_entropy = RunHead(normed, targets, loss_scale, accumulate, final_gradient_, stream);
  return sums;
}

absl::Status Decoder::Backward(const std::vector<RoutingGradient>& routing, Stream& stream) {
  const Tensor gradient = Zeros(final_x_.shape(), DType::kF32);
  if (accumulate_ == Accumulate::kOverwrite) {
    store_->ZeroVectorGradients();
    if (!config_.tie_word_embeddings) {
      std::memset(embedding_gradient_.raw(), 0, static_cast<size_t>(embedding_gradient_.bytes()));
    }
  }
  kernels::RmsNormBackward(final_gradient_, final_x_, norm_, final_rstd_, gradient, norm_gradient_, stream);
  size_t moe_layer = routing.size();
  for (size_t layer = attention_.size(); layer-- > 0;) {
    LayerSaved saved = std::move(saved_[layer]);
    if (options_.recompute) {
      SHOAL_RETURN_IF_ERROR(RunLayer(layer, saved.x, rows_, &saved, nullptr, stream).status(), "recomputing layer ", layer);
    }
    const RoutingGradient none;
    const bool dense = config_.is_dense(static_cast<int>(layer));
    const RoutingGradient& balance = dense ? none : routing[--moe_layer];
    SHOAL_RETURN_IF_ERROR(
        feed_forward_[layer]->Backward(std::move(saved.feed_forward), balance, accumulate_, gradient, stream), "layer ",
        layer);
    attention_[layer].Backward(saved.x, rows_, saved.attention, accumulate_, gradient, stream);
  }
  kernels::EmbeddingBackward(gradient, ids_, embedding_gradient_, stream);
  saved_.clear();
  final_x_ = final_gradient_ = Tensor();
  return stream.status();
}

absl::StatusOr<double> Decoder::Evaluate(const Tensor& tokens, Stream& stream) {
  const int64_t seq = tokens.dim(1) - 1;
  const Tensor x = Empty({tokens.dim(0) * seq, config_.hidden_size}, DType::kF32);
  kernels::Embedding(embedding_, Columns(tokens, 0, seq), x, stream);
  SHOAL_ASSIGN_OR_RETURN(const Tensor out, RunLayers(x, tokens.dim(0), /*keep=*/false, nullptr, stream));
  const Tensor normed = Empty(x.shape(), head_.dtype()), rstd = Empty({x.dim(0)}, DType::kF32);
  kernels::RmsNorm(out, Tensor(), norm_, static_cast<float>(config_.rms_norm_eps), Tensor(), normed, rstd, stream);
  const double sum = RunHead(normed, Columns(tokens, 1, seq), 0, Accumulate::kOverwrite, Tensor(), stream);
  SHOAL_RETURN_IF_ERROR(stream.status());
  return sum;
}

absl::StatusOr<Tensor> Decoder::NextLogits(const Tensor& ids, Stream& stream) {
  const int64_t tokens = ids.dim(0);
  const Tensor x = Empty({tokens, config_.hidden_size}, DType::kF32);
  kernels::Embedding(embedding_, ids, x, stream);
  SHOAL_ASSIGN_OR_RETURN(const Tensor out, RunLayers(x, 1, /*keep=*/false, nullptr, stream));
  const Tensor normed = Empty({1, config_.hidden_size}, head_.dtype()), rstd = Empty({1}, DType::kF32);
  kernels::RmsNorm(out.Rows(tokens - 1, 1), Tensor(), norm_, static_cast<float>(config_.rms_norm_eps), Tensor(), normed, rstd,
                   stream);
  Tensor logits = Empty({1, config_.vocab_size}, DType::kF32);
  MatMul(normed, Transpose::kNo, head_, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
  SHOAL_RETURN_IF_ERROR(stream.status());
  return logits.Reshape({config_.vocab_size});
}

}  // namespace shoal
