#include "launch/cli/plan_flags.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "launch/trainer/layout.h"
#include "models/optimizer/block_buckets.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// The first `ranks` ranks: whole hosts, or some devices of one.
absl::Status Shrink(const PlanFlags& flags, Cluster* cluster) {
  if (flags.ranks == 0) return absl::OkStatus();
  const int ranks = static_cast<int>(std::min<int64_t>(flags.ranks, kRanksMax + 1));
  const int devices = cluster->devices_per_host;
  if (ranks > kRanksMax || (ranks > devices && ranks % devices != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("--ranks ", flags.ranks, " does not fit ", flags.cluster, " with ", devices,
                                                   " devices per host; at most ", devices, ", or a multiple of it up to ",
                                                   kRanksMax, " would fit"));
  }
  cluster->hosts = std::max(1, ranks / devices);
  cluster->devices_per_host = std::min(ranks, devices);
  return absl::OkStatus();
}

}  // namespace

void AddPlanFlags(FlagSet* flags, PlanFlags* values) {
  flags->AddPositional("CONFIG", "A YAML file, for example configs/quickstart.yaml. Files that it names need not exist.",
                       &values->config);
  flags->Add(
      {.name = "cluster", .value = "FILE", .help = "The cluster, for example configs/clusters/h100-8x.yaml.", .required = true},
      &values->cluster);
  flags->Add({.name = "set",
              .value = "KEY=VALUE",
              .help = "Changes a key of CONFIG, for example train.recompute=true. May be repeated."},
             &values->overrides);
  flags->Add({.name = "ranks",
              .value = "N",
              .help = "Ranks of the job, with the hosts that they need. Default: all devices of the cluster.",
              .min = 1},
             &values->ranks);
  flags->Add({.name = "skew",
              .value = "SIGMA",
              .help = "How unequal the loads of experts are: sigma of the logarithm of their popularity. 1 is what training "
                      "without a strong balance loss shows.",
              .min = 0},
             &values->skew);
  flags->Add({.name = "seed", .value = "N", .help = "Draws other loads.", .min = 0}, &values->seed);
}

absl::StatusOr<PlanInputs> LoadPlanInputs(const PlanFlags& flags) {
  PlanInputs inputs;
  SHOAL_ASSIGN_OR_RETURN(inputs.config, LoadConfig(flags.config, flags.overrides, Files::kMayBeMissing));
  SHOAL_ASSIGN_OR_RETURN(inputs.cluster, LoadCluster(flags.cluster));
  SHOAL_RETURN_IF_ERROR(Shrink(flags, &inputs.cluster));
  inputs.model = ModelShapeOf(inputs.config.config);
  inputs.skew = {.sigma = flags.skew, .seed = static_cast<uint64_t>(flags.seed)};
  return inputs;
}

namespace {

std::vector<std::vector<int64_t>> BlocksOfBuckets(const ModelConfig& model) {
  const BucketIndex buckets{model.num_hidden_layers, !model.tie_word_embeddings};
  std::vector<std::vector<int64_t>> elements(static_cast<size_t>(buckets.count()));
  for (const Block& block : MakeBlocks(ParameterSpecs(model))) {
    if (block.kind == BlockKind::kExpert) continue;
    elements[static_cast<size_t>(BucketOf(block, buckets))].push_back(block.elements);
  }
  return elements;
}

}  // namespace

ModelShape ModelShapeOf(const Config& config) {
  const ModelConfig model = ModelConfigOf(config);
  ModelShape shape;
  shape.vocab = model.vocab_size;
  shape.width = model.hidden_size;
  shape.expert_inner = model.intermediate_size;
  shape.dense_inner = model.dense_intermediate_size;
  shape.shared_inner = model.shared_intermediate_size;
  shape.query_size = model.query_size();
  shape.kv_size = model.kv_size();
  shape.heads = model.num_attention_heads;
  shape.experts = model.num_local_experts;
  shape.choices = model.num_experts_per_tok;
  for (int layer = 0; layer < model.num_hidden_layers; ++layer) shape.moe.push_back(!model.is_dense(layer));
  shape.tied_head = model.tie_word_embeddings;
  shape.balance = model.aux_loss != AuxLoss::kNone;
  shape.blocks = BlocksOfBuckets(model);
  shape.compute_bytes = config.train().precision() == "bf16" ? 2 : 4;
  shape.fp8 = ProductsFor(config) == kernels::Products::kFp8;
  shape.sequences = config.train().global_batch_size();
  shape.sequence_length = config.train().seq_length();
  shape.loss_chunk = config.train().loss_chunk();
  return shape;
}

StepLayout LayoutOf(const Config& config, int ranks) {
  const ModelConfig model = ModelConfigOf(config);
  StepLayout layout;
  layout.expert = LayoutFor(config, model, ranks).expert;
  layout.sparse = HasSparseExperts(config, model, ranks);
  layout.dense = DensePolicyFor(config);
  layout.experts = ExpertPolicyFor(config);
  layout.dispatch = DispatchRuleFor(config);
  layout.recompute = config.train().recompute();
  layout.parts = static_cast<int>(config.train().gradient_accumulation_steps());
  layout.prefetch = config.schedule().prefetch();
  layout.copies = config.parallel().expert_copies();
  layout.overlap = config.parallel().expert_overlap();
  return layout;
}

SchedulerOptions SchedulerOptionsOf(const Config& config) {
  SchedulerOptions options;
  options.chunks_forward = config.schedule().chunks_forward();
  options.chunks_backward = config.schedule().chunks_backward();
  options.slice_gradients = config.schedule().gradient_slices() == "auto";
  options.part_waves = config.schedule().wave_order() != "together";
  options.waves = WavesUpTo(config.train().global_batch_size());
  if (ModelConfigOf(config).has_capacity()) options.waves = {1};
  if (config.schedule().waves() > 0) options.waves = {config.schedule().waves()};
  return options;
}

}  // namespace shoal
