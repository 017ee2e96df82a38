#include "launch/trainer/layout.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace shoal {

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
  model.router = *RouterKindOf(from.router());
  model.capacity_factor = from.capacity_factor();
  model.routed_scaling_factor = from.routed_scaling_factor();
  model.bias_update_rate = from.bias_update_rate();
  model.seq_aux_loss_coef = from.seq_aux_loss_coef();
  model.router_dim = from.router_dim();
  model.router_temperature_init = from.router_temperature_init();
  model.shared_intermediate_size = from.shared_intermediate_size();
  return model;
}

Layout LayoutFor(const Config& config, const ModelConfig& model, int ranks) {
  // Without experts there is nothing to spread: every rank is a group of its own.
  const int wanted = config.parallel().expert() < 0 ? ranks : config.parallel().expert();
  const int expert = NumMoeLayers(model) == 0 ? 1 : wanted;
  return {ranks, expert, model.num_local_experts};
}

bool HasSparseExperts(const Config& config, const ModelConfig& model, int ranks) {
  return config.parallel().experts() == "sparse" && NumMoeLayers(model) > 0 && ranks > 1;
}

absl::StatusOr<std::vector<ExpertPlacement>> InitialPlacement(const Config& config, const ModelConfig& model, int ranks) {
  std::vector<ExpertPlacement> moe;
  if (HasSparseExperts(config, model, ranks)) {
    for (const std::vector<int>& owners : EvenOwners(NumMoeLayers(model), model.num_local_experts, ranks)) {
      moe.push_back(OwnersOnly(owners));
    }
  } else {
    const Layout layout = LayoutFor(config, model, ranks);
    SHOAL_RETURN_IF_ERROR(CheckLayout(layout), "parallel.expert");
    moe = GroupedPlacement(NumMoeLayers(model), model.num_local_experts, ranks, layout.expert);
  }
  std::vector<ExpertPlacement> layers;
  size_t next = 0;
  for (int layer = 0; layer < model.num_hidden_layers; ++layer) {
    layers.push_back(model.is_dense(layer) ? ExpertPlacement() : moe[next++]);
  }
  return layers;
}

StepShape StepShapeFor(const Config& config, const ModelConfig& model, const Topology& topology,
                       const std::vector<ExpertPlacement>& placement) {
  const int ranks = topology.ranks();
  const bool sparse = HasSparseExperts(config, model, ranks);
  StepShape shape;
  for (int layer = 0; layer < model.num_hidden_layers; ++layer) {
    shape.layers.push_back({!model.is_dense(layer), model.shared_intermediate_size > 0});
  }
  shape.tied_head = model.tie_word_embeddings;
  shape.parts = static_cast<int>(config.train().gradient_accumulation_steps());
  shape.recompute = config.train().recompute();
  shape.ranks = ranks;
  shape.inter = topology.hosts() > 1;
  for (int host = 0; host < topology.hosts(); ++host) shape.intra = shape.intra || topology.RanksOf(host).size() > 1;
  shape.dispatch = sparse;
  shape.materialise = sparse;
  for (const ExpertPlacement& layer : placement) {
    for (const ExpertCopies& expert : layer) {
      shape.dispatch = shape.dispatch || static_cast<int>(expert.holders.size()) + 1 < ranks;
      shape.materialise = shape.materialise || !expert.holders.empty();
    }
  }
  // In the pinned order all know who has rows for which expert.
  shape.exchange = shape.dispatch || model.has_capacity() || NumericsFor(config) == Numerics::kPinned;
  shape.balance = model.aux_loss != AuxLoss::kNone;
  shape.dense = DensePolicyFor(config);
  shape.experts = ExpertPolicyFor(config);
  return shape;
}

std::vector<int> WavesToChooseFrom(const Config& config, const ModelConfig& model, const StepShape& shape) {
  if (model.has_capacity()) return {1};
  if (config.schedule().waves() > 0) return {config.schedule().waves()};
  const int64_t rows = config.train().global_batch_size() / config.train().gradient_accumulation_steps();
  // With one sequence there is nothing to take turns; without rows that travel there is nothing to hide.
  if (!shape.dispatch || rows < 2 * shape.ranks) return {1};
  return WavesUpTo(rows / shape.ranks);
}

std::vector<int> PrefetchToChooseFrom(const Config& config, const StepShape& shape) {
  if (config.schedule().prefetch() > 0) return {config.schedule().prefetch()};
  return PrefetchUpTo(shape);
}

DensePolicy DensePolicyFor(const Config& config) {
  return config.parallel().dense() == "sharded" ? DensePolicy::kSharded : DensePolicy::kReplicated;
}

ExpertPolicy ExpertPolicyFor(const Config& config) {
  // Each part adds to sums in the pinned order, so gradients of copies leave after each.
  const bool leave = NumericsFor(config) == Numerics::kPinned && config.train().gradient_accumulation_steps() > 1;
  return config.parallel().rematerialise() || leave ? ExpertPolicy::kRematerialise : ExpertPolicy::kKeep;
}

Numerics NumericsFor(const Config& config) {
  return config.train().numerics() == "pinned" ? Numerics::kPinned : Numerics::kFast;
}

std::optional<int32_t> EndOfDocument(const Config& config) {
  if (!config.data().document_mask()) return std::nullopt;
  return config.data().end_of_document_token();
}

kernels::Products ProductsFor(const Config& config) {
  return config.train().matmul() == "fp8" ? kernels::Products::kFp8 : kernels::Products::kSame;
}

DispatchRule DispatchRuleFor(const Config& config) {
  const bool fill = config.parallel().dispatch() == "water_fill";
  if (NumericsFor(config) == Numerics::kPinned) return fill ? DispatchRule::kWaterFillWhole : DispatchRule::kNearestWhole;
  return fill ? DispatchRule::kWaterFill : DispatchRule::kNearest;
}

OwnerPolicy OwnerPolicyFor(const Config& config) {
  if (config.parallel().owners() == "eplb") return OwnerPolicy::kEplb;
  return config.parallel().owners() == "tuned" ? OwnerPolicy::kTuned : OwnerPolicy::kHecate;
}

std::string LayoutText(const Config& config, const ModelConfig& model, int ranks) {
  if (ranks == 1) return "one rank";
  const std::string dense = DensePolicyFor(config) == DensePolicy::kSharded ? "dense layers sharded" : "optimizer sharded";
  if (HasSparseExperts(config, model, ranks)) return "experts sharded, copies where they are busy, " + dense;
  const Layout layout = LayoutFor(config, model, ranks);
  if (layout.expert == 1) return "data parallel, " + dense;
  return absl::StrFormat("experts over %d of %d ranks, %s", layout.expert, layout.ranks, dense);
}

}  // namespace shoal
