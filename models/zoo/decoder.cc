#include "models/zoo/decoder.h"

#include <algorithm>
#include <cstring>

#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/norm.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
constexpr char kNormName[] = "model.norm.weight";

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

Decoder::Decoder(const ModelConfig& config, const Options& options, ParameterStore& store, const ExpertContext& experts)
    : config_(config),
      options_(options),
      store_(&store),
      rope_(kernels::MakeRopeTable(options.seq, static_cast<int>(config.head_dim), config.rope_theta)),
      head_name_(config.tie_word_embeddings ? kEmbeddingName : "lm_head.weight") {
  for (int index = 0; index < config.num_hidden_layers; ++index) {
    Layer layer{AttentionLayer(config, index, store, rope_), std::nullopt, nullptr, -1};
    if (config.is_dense(index)) {
      layer.dense.emplace(config, index, store);
    } else {
      layer.moe = std::make_unique<MoeLayer>(config, index, store, experts);
      layer.moe_index = static_cast<int>(moe_layers_++);
    }
    layers_.push_back(std::move(layer));
  }
}

std::vector<Router*> Decoder::routers() {
  std::vector<Router*> routers;
  for (const Layer& layer : layers_) {
    if (layer.moe != nullptr) routers.push_back(&layer.moe->router());
  }
  return routers;
}

void Decoder::Begin(Pass pass) {
  pass_ = std::move(pass);
  rows_ = pass_.tokens.dim(0);
  seq_ = pass_.mode == Pass::Mode::kNextLogits ? pass_.tokens.dim(1) : pass_.tokens.dim(1) - 1;
  SHOAL_CHECK_LE(seq_, options_.seq);
  ids_ = Columns(pass_.tokens, 0, seq_);
  targets_ = pass_.mode == Pass::Mode::kNextLogits ? Tensor() : Columns(pass_.tokens, 1, seq_);
  states_.clear();
  states_.resize(layers_.size());
  routing_.assign(moe_layers_, {});
  if (pass_.part == 0) rows_by_rank_.assign(moe_layers_, {});
  routing_gradients_.clear();
  cross_entropy_ = 0;
}

absl::StatusOr<double> Decoder::Run(const Task& task, Stream& stream) {
  LayerState* state = task.layer < 0 ? nullptr : &states_[static_cast<size_t>(task.layer)];
  MoeLayer* moe = task.layer < 0 ? nullptr : layers_[static_cast<size_t>(task.layer)].moe.get();
  if (task.op == Op::kDispatch || task.op == Op::kReturn) return moe->Travel(task, &state->moe);
  if (task.op == Op::kStay) return moe->Stay(task, &state->moe);
  if (task.op == Op::kExchange) return moe->Exchange(&state->moe);
  SHOAL_ASSIGN_OR_RETURN(const double units,
                         task.phase == Phase::kBackward ? RunBackward(task, stream) : RunForward(task, stream));
  SHOAL_RETURN_IF_ERROR(stream.status());
  return units;
}

absl::StatusOr<double> Decoder::RunForward(const Task& task, Stream& stream) {
  const double all = static_cast<double>(tokens());
  if (task.op == Op::kEmbed) return Embed(stream), all;
  if (task.op == Op::kHead) return Head(stream), all;
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = states_[index];
  const bool first = task.phase == Phase::kForward;
  switch (task.op) {
    case Op::kAttention:
      if (first) state.x = x_;
      state.delta = layer.attention.Forward(state.x, rows_, &state.attention, stream);
      return all;
    case Op::kDense: {
      Tensor out = layer.dense->Forward(state.x, state.delta, &state.dense, stream);
      state.delta = Tensor();
      if (first) FinishLayer(index, std::move(out));
      return all;
    }
    case Op::kRoute:
      Route(task, stream);
      return all;
    case Op::kArrange: {
      RoutingSums* sums = first && training() ? &routing_[static_cast<size_t>(layer.moe_index)] : nullptr;
      SHOAL_RETURN_IF_ERROR(layer.moe->Arrange(&state.moe, sums, stream));
      if (sums != nullptr) layer.moe->AddRows(state.moe, &rows_by_rank_[static_cast<size_t>(layer.moe_index)]);
      return all;
    }
    case Op::kPack:
      return static_cast<double>(layer.moe->Pack(task.chunk, &state.moe, stream));
    case Op::kExperts:
      return static_cast<double>(layer.moe->Experts(task.chunk, &state.moe, stream));
    case Op::kShared:
      layer.moe->Shared(&state.moe, stream);
      return all;
    case Op::kCombine: {
      const int64_t rows = layer.moe->Combine(task.chunk, &state.moe, stream);
      if (task.chunk + 1 == pass_.schedule->layers[index].forward_chunks) FinishLayer(index, std::move(state.moe.out));
      return static_cast<double>(rows);
    }
    default:
      return absl::InternalError(absl::StrCat("the model has no task ", Name(task)));
  }
}

void Decoder::Route(const Task& task, Stream& stream) {
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = states_[index];
  const LayerSchedule& chunks = pass_.schedule->layers[index];
  RoutingSums* sums =
      task.phase == Phase::kForward && training() ? &routing_[static_cast<size_t>(layer.moe_index)] : nullptr;
  layer.moe->Route(state.x, state.delta, {.seq = seq_, .tokens_of_rank = pass_.tokens_of_rank},
                   {chunks.forward_chunks, training() ? chunks.backward_chunks : chunks.forward_chunks}, &state.moe, sums, stream);
  state.delta = Tensor();
}

void Decoder::FinishLayer(size_t layer, Tensor out) {
  x_ = std::move(out);
  LayerState& state = states_[layer];
  if (!training()) {
    state = {};
  } else if (options_.recompute) {
    LayerState kept;
    kept.x = std::move(state.x);
    kept.moe.summaries = std::move(state.moe.summaries);
    state = std::move(kept);
  }
}

absl::StatusOr<double> Decoder::RunBackward(const Task& task, Stream& stream) {
  const double all = static_cast<double>(tokens());
  if (task.op == Op::kEmbed) return EmbedBackward(stream), all;
  if (task.op == Op::kHead) return HeadBackward(stream), all;
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = states_[index];
  switch (task.op) {
    case Op::kAttention:
      layer.attention.Backward(state.x, rows_, state.attention, AccumulateOf(task.layer), gradient_, stream);
      state = {};
      return all;
    case Op::kDense:
      layer.dense->Backward(state.dense, AccumulateOf(task.layer), gradient_, stream);
      state.dense = {};
      return all;
    case Op::kPack: {
      SHOAL_ASSIGN_OR_RETURN(const int64_t rows, layer.moe->PackBackward(task.chunk, gradient_, &state.moe, stream));
      return static_cast<double>(rows);
    }
    case Op::kExperts:
      return static_cast<double>(layer.moe->ExpertsBackward(task.chunk, &state.moe, stream));
    case Op::kExpertsWeight:
      return static_cast<double>(layer.moe->ExpertsWeight(task.chunk, pass_.part, &state.moe, stream));
    case Op::kShared:
      layer.moe->SharedBackward(gradient_, AccumulateOf(task.layer), &state.moe, stream);
      return all;
    case Op::kRoute:
      layer.moe->RouteBackward(routing_gradients_[static_cast<size_t>(layer.moe_index)], AccumulateOf(task.layer), gradient_,
                               &state.moe, stream);
      state.moe = {};
      return all;
    default:
      return absl::InternalError(absl::StrCat("the model has no task ", Name(task)));
  }
}

void Decoder::Embed(Stream& stream) {
  x_ = Empty({tokens(), config_.hidden_size}, DType::kF32);
  kernels::Embedding(store_->Weight(kEmbeddingName, {config_.vocab_size, config_.hidden_size}), ids_, x_, stream);
}

void Decoder::EmbedBackward(Stream& stream) {
  const Tensor embedding = store_->Gradient(kEmbeddingName, {config_.vocab_size, config_.hidden_size});
  if (pass_.part == 0 && !config_.tie_word_embeddings) {
    std::memset(embedding.raw(), 0, static_cast<size_t>(embedding.bytes()));
  }
  kernels::EmbeddingBackward(gradient_, ids_, embedding, stream);
  gradient_ = Tensor();
}

void Decoder::Head(Stream& stream) {
  const Tensor norm = store_->Weight(kNormName, {config_.hidden_size});
  const Tensor head = store_->Weight(head_name_, {config_.vocab_size, config_.hidden_size});
  const float epsilon = static_cast<float>(config_.rms_norm_eps);
  // Of generation only the last token counts.
  const bool last = pass_.mode == Pass::Mode::kNextLogits;
  const Tensor x = last ? x_.Rows(tokens() - 1, 1) : x_;
  const Tensor normed = Empty(x.shape(), head.dtype());
  final_rstd_ = Empty({x.dim(0)}, DType::kF32);
  kernels::RmsNorm(x, Tensor(), norm, epsilon, Tensor(), normed, final_rstd_, stream);
  if (last) {
    const Tensor logits = Empty({1, config_.vocab_size}, DType::kF32);
    MatMul(normed, Transpose::kNo, head, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    next_logits_ = logits.Reshape({config_.vocab_size});
    return;
  }
  if (training()) final_gradient_ = Empty(x.shape(), DType::kF32);
  cross_entropy_ = Loss(normed, targets_, training() ? pass_.loss_scale : 0, final_gradient_, stream);
}

double Decoder::Loss(const Tensor& normed, const Tensor& targets, float scale, const Tensor& dnormed, Stream& stream) {
  const int64_t chunk = std::min(options_.loss_chunk, std::max<int64_t>(tokens(), 1));
  const Shape shape = {config_.vocab_size, config_.hidden_size};
  const Tensor head = store_->Weight(head_name_, shape);
  const Tensor head_gradient = scale > 0 ? store_->Gradient(head_name_, shape) : Tensor();
  const Tensor logits_all = Empty({chunk, config_.vocab_size}, DType::kF32);
  const bool narrow = head.dtype() != DType::kF32;
  const Tensor dlogits_all = narrow && scale > 0 ? Empty({chunk, config_.vocab_size}, head.dtype()) : logits_all;
  const Tensor losses = Empty({tokens()}, DType::kF32);
  const Accumulate accumulate = pass_.part == 0 ? Accumulate::kOverwrite : Accumulate::kAdd;
  // At least one pass, so that gradients are written when there are no tokens.
  for (int64_t begin = 0; begin == 0 || begin < tokens(); begin += chunk) {
    const int64_t count = std::min(chunk, tokens() - begin);
    const Tensor x = normed.Rows(begin, count), logits = logits_all.Rows(0, count);
    MatMul(x, Transpose::kNo, head, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    const Tensor dlogits = scale > 0 ? dlogits_all.Rows(0, count) : Tensor();
    kernels::CrossEntropy(logits, targets.Rows(begin, count), scale, losses.Rows(begin, count), dlogits, stream);
    if (scale <= 0) continue;
    MatMul(dlogits, Transpose::kNo, head, Transpose::kNo, Accumulate::kOverwrite, dnormed.Rows(begin, count), stream);
    MatMul(dlogits, Transpose::kYes, x, Transpose::kNo, begin == 0 ? accumulate : Accumulate::kAdd, head_gradient, stream);
  }
  double sum = 0;
  for (float loss : losses.span<float>()) sum += loss;
  return sum;
}

void Decoder::HeadBackward(Stream& stream) {
  if (pass_.part == 0) store_->dense().ZeroVectorGradients();
  gradient_ = Zeros(x_.shape(), DType::kF32);
  kernels::RmsNormBackward(final_gradient_, x_, store_->Weight(kNormName, {config_.hidden_size}), final_rstd_, gradient_,
                           store_->Gradient(kNormName, {config_.hidden_size}), stream);
  x_ = final_gradient_ = final_rstd_ = Tensor();
}

}  // namespace shoal
