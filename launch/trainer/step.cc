#include "launch/trainer/step.h"

#include <chrono>
#include <cmath>

#include "launch/status/measured_communicator.h"
#include "models/routers/balance.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds since `*mark`, which becomes now.
double Lap(Clock::time_point* mark) {
  const Clock::time_point now = Clock::now();
  const double seconds = std::chrono::duration<double>(now - *mark).count();
  *mark = now;
  return seconds;
}

}  // namespace

Layout LayoutFor(const Config& config, const ModelConfig& model, int ranks) {
  // Without experts there is nothing to spread: every rank is a group of its own.
  const int wanted = config.parallel().expert() < 0 ? ranks : config.parallel().expert();
  const int expert = NumMoeLayers(model) == 0 ? 1 : wanted;
  return {ranks, expert, model.num_local_experts};
}

ModelConfig ModelConfigOf(const Config& config) {
  const Model& from = config.model();
  ModelConfig model;
  model.vocab_size = from.vocab_size();
  model.hidden_size = from.hidden_size();
  model.intermediate_size = from.intermediate_size();
  model.dense_intermediate_size = from.dense_intermediate_size();
  model.num_hidden_layers = from.num_hidden_layers();
  model.num_attention_heads = from.num_attention_heads();
  model.num_key_value_heads = from.num_key_value_heads();
  model.head_dim = from.head_dim();
  model.num_local_experts = from.num_local_experts();
  model.num_experts_per_tok = from.num_experts_per_tok();
  model.dense_layers.assign(static_cast<size_t>(from.num_hidden_layers()), false);
  for (int layer : from.dense_layers()) model.dense_layers[static_cast<size_t>(layer)] = true;
  model.norm_topk_prob = from.norm_topk_prob();
  model.rms_norm_eps = from.rms_norm_eps();
  model.rope_theta = from.rope_theta();
  model.tie_word_embeddings = from.tie_word_embeddings();
  model.initializer_range = from.initializer_range();
  model.aux_loss = from.aux_loss() == "hf"       ? AuxLoss::kHf
                   : from.aux_loss() == "switch" ? AuxLoss::kSwitch
                                                 : AuxLoss::kNone;
  model.router_aux_loss_coef = from.router_aux_loss_coef();
  model.router_z_loss_coef = from.router_z_loss_coef();
  return model;
}

absl::StatusOr<std::unique_ptr<RankModel>> RankModel::Create(const Config& config, const ModelConfig& model,
                                                             Communicator& world, bool training) {
  const std::vector<ParameterSpec> parameters = ParameterSpecs(model);
  const Rank rank{world.index()};
  SHOAL_ASSIGN_OR_RETURN(Placement placement, Placement::Make(ShapesOf(MakeBlocks(parameters)),
                                                              LayoutFor(config, model, world.size())),
                         "parallel.expert");
  std::unique_ptr<RankModel> rank_model(new RankModel(config, model, std::move(placement), world));
  const Placement& placed = rank_model->placement_;
  SHOAL_ASSIGN_OR_RETURN(rank_model->replicas_, SplitAs(world, placed.ReplicaGroup(rank), "dp"), "replica group");
  SHOAL_ASSIGN_OR_RETURN(rank_model->experts_, SplitAs(world, placed.ExpertGroup(rank), "ep"), "expert group");
  const DType compute = config.train().precision() == "bf16" ? DType::kBF16 : DType::kF32;
  SHOAL_ASSIGN_OR_RETURN(rank_model->store_,
                         ParameterStore::Create(parameters, placed, world, *rank_model->replicas_,
                                                {.compute = compute, .training = training}));
  rank_model->exchange_ = std::make_unique<TokenExchange>(*rank_model->experts_, model.num_local_experts);
  const Decoder::Options options{.seq = config.train().seq_length(),
                                 .recompute = config.train().recompute(),
                                 .loss_chunk = config.train().loss_chunk()};
  rank_model->decoder_ =
      std::make_unique<Decoder>(model, options, *rank_model->store_, *rank_model->exchange_);
  return rank_model;
}

absl::StatusOr<RankModel::PartTotals> RankModel::SumOverRanks(const Decoder::Sums& sums, int64_t tokens) {
  const int64_t layers = static_cast<int64_t>(sums.routing.size()), experts = model_.num_local_experts;
  // Cross-entropy, then per layer: z, counts, probabilities. Counts are exact in f64.
  const int64_t stride = 1 + 2 * experts;
  const Tensor packed = Empty({1 + layers * stride}, DType::kF64);
  double* values = packed.data<double>();
  values[0] = sums.cross_entropy;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const RoutingSums& routing = sums.routing[static_cast<size_t>(layer)];
    double* own = values + 1 + layer * stride;
    own[0] = routing.z_sum;
    for (int64_t e = 0; e < experts; ++e) {
      own[1 + e] = static_cast<double>(routing.counts.data<int64_t>()[e]);
      own[1 + experts + e] = routing.prob_sums.data<double>()[e];
    }
  }
  if (world_->size() > 1) {
    SHOAL_RETURN_IF_ERROR(world_->AllReduce(packed, packed, ReduceOp::kSum, {.label = "loss"}).Await(), "summing the loss");
  }
  PartTotals totals{.cross_entropy = values[0], .routing = {.tokens = tokens, .counts = {}, .prob_sums = {}, .z_sums = {}}};
  for (int64_t layer = 0; layer < layers; ++layer) {
    const double* own = values + 1 + layer * stride;
    totals.routing.z_sums.push_back(own[0]);
    totals.routing.counts.emplace_back(own + 1, own + 1 + experts);
    totals.routing.prob_sums.emplace_back(own + 1 + experts, own + stride);
  }
  return totals;
}

absl::Status RankModel::TrainPart(const Tensor& tokens, int part, StepResult* result) {
  Clock::time_point mark = Clock::now();
  const int64_t parts = config_.train().gradient_accumulation_steps(), seq = config_.train().seq_length();
  const int64_t batch_tokens = config_.train().global_batch_size() * seq, part_tokens = batch_tokens / parts;
  const float scale = static_cast<float>(1.0 / static_cast<double>(batch_tokens));
  const auto accumulate = part == 0 ? kernels::Accumulate::kOverwrite : kernels::Accumulate::kAdd;
  SHOAL_ASSIGN_OR_RETURN(const Decoder::Sums sums, decoder_->Forward(tokens, scale, accumulate, stream_), "forward pass");
  SHOAL_ASSIGN_OR_RETURN(const PartTotals totals, SumOverRanks(sums, part_tokens));
  const BalanceLoss balance = ComputeBalanceLoss(model_, totals.routing);
  result->forward_seconds += Lap(&mark);

  const double share = 1.0 / static_cast<double>(parts);
  std::vector<RoutingGradient> gradients(totals.routing.counts.size());
  for (size_t layer = 0; layer < gradients.size(); ++layer) {
    gradients[layer].z_scale = balance.z_scale * static_cast<float>(share);
    if (balance.dprob.empty()) continue;
    gradients[layer].dprob = Empty({model_.num_local_experts}, DType::kF32);
    for (int e = 0; e < model_.num_local_experts; ++e) {
      gradients[layer].dprob.data<float>()[e] = balance.dprob[layer][static_cast<size_t>(e)] * static_cast<float>(share);
    }
  }
  SHOAL_RETURN_IF_ERROR(decoder_->Backward(gradients, stream_), "backward pass");
  result->backward_seconds += Lap(&mark);

  result->cross_entropy += totals.cross_entropy / static_cast<double>(batch_tokens);
  result->aux += balance.aux * share;
  result->z += balance.z * share;
  result->expert_counts.resize(totals.routing.counts.size());
  for (size_t layer = 0; layer < totals.routing.counts.size(); ++layer) {
    std::vector<int64_t>& counts = result->expert_counts[layer];
    counts.resize(static_cast<size_t>(model_.num_local_experts));
    for (size_t e = 0; e < counts.size(); ++e) counts[e] += static_cast<int64_t>(totals.routing.counts[layer][e]);
  }
  return absl::OkStatus();
}

absl::StatusOr<StepResult> RankModel::Train(const std::vector<Tensor>& parts, double learning_rate, int64_t update,
                                            const OnGradients& on_gradients) {
  StepResult result;
  for (size_t part = 0; part < parts.size(); ++part) {
    SHOAL_RETURN_IF_ERROR(TrainPart(parts[part], static_cast<int>(part), &result));
  }
  result.loss = result.cross_entropy + model_.router_aux_loss_coef * result.aux + model_.router_z_loss_coef * result.z;

  Clock::time_point mark = Clock::now();
  SHOAL_RETURN_IF_ERROR(store_->ReduceGradients());
  result.reduce_seconds = Lap(&mark);
  if (on_gradients) on_gradients(*store_);
  SHOAL_ASSIGN_OR_RETURN(result.grad_norm, store_->GradientNorm(stream_));
  result.finite = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
  if (result.finite) {
    const Optimizer& optimizer = config_.optimizer();
    const double clip = optimizer.clip_grad();
    kernels::AdamWStep step{.learning_rate = learning_rate,
                            .beta1 = optimizer.beta1(),
                            .beta2 = optimizer.beta2(),
                            .epsilon = optimizer.eps(),
                            .weight_decay = optimizer.weight_decay(),
                            .update = update};
    if (clip > 0 && result.grad_norm > clip) step.grad_scale = static_cast<float>(clip / (result.grad_norm + 1e-6));
    SHOAL_RETURN_IF_ERROR(store_->Update(step, stream_));
  }
  result.update_seconds = Lap(&mark);
  SHOAL_RETURN_IF_ERROR(stream_.status());
  return result;
}

absl::StatusOr<double> RankModel::Evaluate(const Tensor& rows) {
  SHOAL_ASSIGN_OR_RETURN(const double own, decoder_->Evaluate(rows, stream_), "evaluation");
  if (world_->size() == 1) return own;
  const Tensor sum = Empty({1}, DType::kF64);
  sum.data<double>()[0] = own;
  SHOAL_RETURN_IF_ERROR(world_->AllReduce(sum, sum, ReduceOp::kSum, {.label = "validation loss"}).Await(), "summing the loss");
  return sum.data<double>()[0];
}

}  // namespace shoal
