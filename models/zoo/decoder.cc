#include "models/zoo/decoder.h"

#include <algorithm>
#include <cstring>

#include "parallel/placement/placement.h"
#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/documents.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/router.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
constexpr char kNormName[] = "model.norm.weight";

}  // namespace

Decoder::Decoder(const ModelConfig& config, const Options& options, ParameterStore& store, const ExpertContext& experts, Stream& stream)
    : config_(config),
      options_(options),
      store_(&store),
      compute_(&stream),
      experts_(&experts),
      rope_(kernels::MakeRopeTable(options.seq, static_cast<int>(config.head_dim), config.rope_theta)),
      head_name_(config.tie_word_embeddings ? kEmbeddingName : "lm_head.weight") {
  rope_ = {ToDevice(rope_.cos, stream), ToDevice(rope_.sin, stream)};
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

Tensor Decoder::IdsAndTargets(const Tensor& tokens) {
  const int64_t rows = tokens.dim(0), n = tokens.dim(1) - 1;
  Tensor out = Empty({2, rows, n}, DType::kI32);
  for (int64_t kind = 0; kind < 2; ++kind) {
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(out.data<int32_t>() + (kind * rows + row) * n, tokens.data<int32_t>() + row * (n + 1) + kind,
                  static_cast<size_t>(n) * sizeof(int32_t));
    }
  }
  return out;
}

void Decoder::Begin(Pass pass, Stream& stream) {
  pass_ = std::move(pass);
  if (pass_.part == 0) store_->BeginPass();
  const bool next_logits = pass_.mode == Pass::Mode::kNextLogits;
  const int64_t rows = pass_.tokens.dim(1);
  seq_ = pass_.tokens.dim(2);
  SHOAL_CHECK_LE(seq_, options_.seq);
  const int waves = pass_.schedule->waves;
  SHOAL_CHECK(next_logits || pass_.losses.elements() == waves) << pass_.losses.elements() << " losses of " << waves << " waves";
  waves_.clear();
  waves_.resize(static_cast<size_t>(waves));
  for (int index = 0; index < waves; ++index) {
    Wave& wave = waves_[static_cast<size_t>(index)];
    const Range mine = EvenPart(rows, waves, index);
    wave.index = index;
    wave.rows = mine.count;
    for (int64_t all : pass_.tokens_of_rank) wave.tokens_of_rank.push_back(EvenPart(all / seq_, waves, index).count * seq_);
    wave.ids = pass_.tokens.Elements(mine.begin * seq_, {mine.count * seq_});
    if (!next_logits) wave.targets = pass_.tokens.Elements((rows + mine.begin) * seq_, {mine.count * seq_});
    wave.layers.resize(layers_.size());
    for (LayerState& layer : wave.layers) {
      layer.moe.wave = index;
      layer.moe.first = training() && pass_.part == 0 && index == 0;
    }
  }
  routing_ = moe_layers_ == 0 ? Empty({0, RoutingSums::Width(config_.num_local_experts)}, DType::kF64)
                              : NewRoutingSums(config_, *experts_, moe_layers_, stream);
  if (pass_.part == 0) rows_by_rank_.assign(static_cast<size_t>(moe_layers_), {});
  routing_gradients_.clear();
}

Accumulate Decoder::AccumulateOf(int layer, const Wave& wave) const {
  return wave.index > 0 ? Accumulate::kAdd : store_->dense().AccumulateOf(BucketIndex{}.OfLayer(layer), pass_.part);
}

Accumulate Decoder::AccumulateOfHead(const Wave& wave) const {
  const BucketIndex buckets{layers(), !config_.tie_word_embeddings};
  return wave.index > 0 ? Accumulate::kAdd : store_->dense().AccumulateOf(buckets.OfHead(), pass_.part);
}

absl::StatusOr<double> Decoder::Run(const Task& task, Stream& stream) {
  Wave* wave = &waves_[static_cast<size_t>(task.wave)];
  LayerState* state = task.layer < 0 ? nullptr : &wave->layers[static_cast<size_t>(task.layer)];
  MoeLayer* moe = task.layer < 0 ? nullptr : layers_[static_cast<size_t>(task.layer)].moe.get();
  if (task.op == Op::kDispatch || task.op == Op::kReturn) return moe->Travel(task, &state->moe);
  if (task.op == Op::kStay) return static_cast<double>(moe->Stay(task, &state->moe, stream));
  if (task.op == Op::kExchange) return moe->Exchange(&state->moe);
  SHOAL_ASSIGN_OR_RETURN(const double units, task.phase == Phase::kBackward ? RunBackward(task, wave, stream)
                                                                            : RunForward(task, wave, stream));
  SHOAL_RETURN_IF_ERROR(stream.status());
  return units;
}

absl::StatusOr<double> Decoder::RunForward(const Task& task, Wave* wave, Stream& stream) {
  const double all = static_cast<double>(wave->tokens());
  if (task.op == Op::kEmbed) return Embed(wave, stream), all;
  if (task.op == Op::kHead) return Head(wave, stream), all;
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = wave->layers[index];
  const bool first = task.phase == Phase::kForward;
  switch (task.op) {
    case Op::kAttention:
      if (first) state.x = wave->x;
      state.delta = layer.attention.Forward(state.x, wave->rows, wave->first, &state.attention, stream);
      return all;
    case Op::kDense: {
      Tensor out = layer.dense->Forward(state.x, state.delta, &state.dense, stream);
      state.delta = Tensor();
      if (first) FinishLayer(index, std::move(out), wave);
      return all;
    }
    case Op::kRoute:
      Route(task, wave, stream);
      return all;
    case Op::kArrange:
      SHOAL_RETURN_IF_ERROR(Arrange(task, wave, stream));
      return all;
    case Op::kPack:
      return static_cast<double>(layer.moe->Pack(task.chunk, &state.moe, stream));
    case Op::kExperts:
      return static_cast<double>(layer.moe->Experts(task.chunk, &state.moe, stream));
    case Op::kShared:
      layer.moe->Shared(&state.moe, stream);
      return all;
    case Op::kCombine: {
      const int64_t rows = layer.moe->Combine(task.chunk, &state.moe, stream);
      if (task.chunk + 1 == pass_.schedule->layers[index].forward_chunks) FinishLayer(index, std::move(state.moe.out), wave);
      return static_cast<double>(rows);
    }
    default:
      return absl::InternalError(absl::StrCat("the model has no task ", Name(task)));
  }
}

absl::Status Decoder::Arrange(const Task& task, Wave* wave, Stream& stream) {
  const Layer& layer = layers_[static_cast<size_t>(task.layer)];
  MoeLayer::Saved& saved = wave->layers[static_cast<size_t>(task.layer)].moe;
  const std::optional<RoutingSums> sums = SumsOf(task);
  SHOAL_RETURN_IF_ERROR(layer.moe->Arrange(&saved, sums ? &*sums : nullptr, stream));
  if (sums) layer.moe->AddRows(saved, &rows_by_rank_[static_cast<size_t>(layer.moe_index)]);
  if (&stream == compute_) return absl::OkStatus();
  // Made on the copy lane, used by the compute lane, which runs behind the host: not given to others before it is done.
  for (const Tensor* tensor : {&saved.slot, &saved.token, &saved.offset, &saved.routed.weight, &saved.arrived, &saved.y, &saved.gate_up}) {
    UsedOn(*tensor, *compute_);
  }
  return absl::OkStatus();
}

std::optional<RoutingSums> Decoder::SumsOf(const Task& task) const {
  if (!training() || task.phase != Phase::kForward) return std::nullopt;
  return RoutingSums::Row(routing_, layers_[static_cast<size_t>(task.layer)].moe_index);
}

void Decoder::Route(const Task& task, Wave* wave, Stream& stream) {
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = wave->layers[index];
  const LayerSchedule& chunks = pass_.schedule->layers[index];
  const std::optional<RoutingSums> sums = SumsOf(task);
  layer.moe->Route(state.x, state.delta, {.seq = seq_, .tokens_of_rank = wave->tokens_of_rank},
                   {chunks.forward_chunks, training() ? chunks.backward_chunks : chunks.forward_chunks}, &state.moe,
                   sums ? &*sums : nullptr, stream);
  state.delta = Tensor();
}

void Decoder::FinishLayer(size_t layer, Tensor out, Wave* wave) {
  wave->x = std::move(out);
  LayerState& state = wave->layers[layer];
  if (!training()) {
    state = LayerState{};
    state.moe.wave = wave->index;
  } else if (options_.recompute) {
    LayerState kept;
    kept.x = std::move(state.x);
    kept.moe.wave = wave->index;
    kept.moe.summaries = std::move(state.moe.summaries);
    state = std::move(kept);
  }
}

absl::StatusOr<double> Decoder::RunBackward(const Task& task, Wave* wave, Stream& stream) {
  const double all = static_cast<double>(wave->tokens());
  if (task.op == Op::kEmbed) return EmbedBackward(wave, stream), all;
  if (task.op == Op::kHead) return HeadBackward(wave, stream), all;
  const size_t index = static_cast<size_t>(task.layer);
  Layer& layer = layers_[index];
  LayerState& state = wave->layers[index];
  switch (task.op) {
    case Op::kAttention:
      layer.attention.Backward(state.x, wave->rows, wave->first, state.attention, AccumulateOf(task.layer, *wave), wave->gradient,
                               stream);
      state = {};
      return all;
    case Op::kDense:
      layer.dense->Backward(state.dense, AccumulateOf(task.layer, *wave), wave->gradient, stream);
      state.dense = {};
      return all;
    case Op::kPack: {
      SHOAL_ASSIGN_OR_RETURN(const int64_t rows, layer.moe->PackBackward(task.chunk, wave->gradient, &state.moe, stream));
      return static_cast<double>(rows);
    }
    case Op::kExperts:
      return static_cast<double>(layer.moe->ExpertsBackward(task.chunk, &state.moe, stream));
    case Op::kExpertsWeight:
      return static_cast<double>(layer.moe->ExpertsWeight(task.chunk, pass_.part, &state.moe, stream));
    case Op::kShared:
      layer.moe->SharedBackward(wave->gradient, AccumulateOf(task.layer, *wave), &state.moe, stream);
      return all;
    case Op::kRoute:
      layer.moe->RouteBackward(routing_gradients_[static_cast<size_t>(layer.moe_index)], AccumulateOf(task.layer, *wave), wave->gradient,
                               &state.moe, stream);
      state.moe = {};
      return all;
    default:
      return absl::InternalError(absl::StrCat("the model has no task ", Name(task)));
  }
}

void Decoder::Embed(Wave* wave, Stream& stream) {
  wave->x = Empty({wave->tokens(), config_.hidden_size}, DType::kF32, stream);
  kernels::Embedding(store_->Weight(kEmbeddingName, {config_.vocab_size, config_.hidden_size}), wave->ids, wave->x, stream);
  if (!options_.end_of_document || pass_.mode == Pass::Mode::kNextLogits) return;
  wave->first = Empty({wave->tokens()}, DType::kI32, stream);
  kernels::DocumentStarts(wave->ids.Reshape({wave->rows, seq_}), *options_.end_of_document, wave->first, stream);
}

void Decoder::EmbedBackward(Wave* wave, Stream& stream) {
  const Tensor embedding = store_->Gradient(kEmbeddingName, {config_.vocab_size, config_.hidden_size});
  const bool first = wave->index == 0 && store_->dense().AccumulateOf(BucketIndex::kEmbedding, pass_.part) == Accumulate::kOverwrite;
  if (first && !config_.tie_word_embeddings) {
    FillWithZeros(embedding, stream);
  }
  kernels::EmbeddingBackward(wave->gradient, wave->ids, embedding, stream);
  wave->gradient = Tensor();
}

void Decoder::Head(Wave* wave, Stream& stream) {
  const Tensor norm = store_->Weight(kNormName, {config_.hidden_size});
  const Tensor head = store_->Weight(head_name_, {config_.vocab_size, config_.hidden_size});
  const float epsilon = static_cast<float>(config_.rms_norm_eps);
  // Of generation only the last token counts.
  const bool last = pass_.mode == Pass::Mode::kNextLogits;
  const Tensor x = last ? wave->x.Rows(wave->tokens() - 1, 1) : wave->x;
  const Tensor normed = Empty(x.shape(), head.dtype(), stream);
  wave->final_rstd = Empty({x.dim(0)}, DType::kF32, stream);
  kernels::RmsNorm(x, Tensor(), norm, epsilon, Tensor(), normed, wave->final_rstd, stream);
  if (last) {
    const Tensor logits = Empty({1, config_.vocab_size}, DType::kF32, stream);
    MatMul(normed, Transpose::kNo, head, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    next_logits_ = logits.Reshape({config_.vocab_size});
    return;
  }
  if (training()) wave->final_gradient = Empty(x.shape(), DType::kF32, stream);
  Loss(normed, training() ? pass_.loss_scale : 0, *wave, stream);
}

void Decoder::Loss(const Tensor& normed, float scale, const Wave& wave, Stream& stream) {
  const int64_t tokens = wave.tokens();
  const int64_t chunk = std::min(options_.loss_chunk, std::max<int64_t>(tokens, 1));
  const Shape shape = {config_.vocab_size, config_.hidden_size};
  const Tensor head = store_->Weight(head_name_, shape);
  const Tensor head_gradient = scale > 0 ? store_->Gradient(head_name_, shape) : Tensor();
  const Tensor logits_all = Empty({chunk, config_.vocab_size}, DType::kF32, stream);
  const bool narrow = head.dtype() != DType::kF32;
  const Tensor dlogits_all = narrow && scale > 0 ? Empty({chunk, config_.vocab_size}, head.dtype(), stream) : logits_all;
  const Tensor losses = Empty({tokens}, DType::kF32, stream);
  const Accumulate accumulate = AccumulateOfHead(wave);
  // At least one pass, so that gradients are written when there are no tokens.
  for (int64_t begin = 0; begin == 0 || begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const Tensor x = normed.Rows(begin, count), logits = logits_all.Rows(0, count);
    MatMul(x, Transpose::kNo, head, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    const Tensor dlogits = scale > 0 ? dlogits_all.Rows(0, count) : Tensor();
    kernels::CrossEntropy(logits, wave.targets.Rows(begin, count), scale, losses.Rows(begin, count), dlogits, stream);
    if (scale <= 0) continue;
    MatMul(dlogits, Transpose::kNo, head, Transpose::kNo, Accumulate::kOverwrite, wave.final_gradient.Rows(begin, count), stream);
    MatMul(dlogits, Transpose::kYes, x, Transpose::kNo, begin == 0 ? accumulate : Accumulate::kAdd, head_gradient, stream);
  }
  kernels::SumOverTokens(losses.Reshape({tokens, 1}), pass_.losses.Rows(wave.index, 1), stream);
}

void Decoder::HeadBackward(Wave* wave, Stream& stream) {
  if (pass_.part == 0 && wave->index == 0) store_->dense().ZeroVectorGradients(stream);
  wave->gradient = Zeros(wave->x.shape(), DType::kF32, stream);
  kernels::RmsNormBackward(wave->final_gradient, wave->x, store_->Weight(kNormName, {config_.hidden_size}), wave->final_rstd, wave->gradient,
                           store_->Gradient(kNormName, {config_.hidden_size}), stream);
  wave->x = wave->final_gradient = wave->final_rstd = Tensor();
}

}  // namespace shoal
