#include "parallel/planner/layout.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/expert/copy_costs.h"
#include "parallel/placement/copies.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/placement.h"
#include "parallel/placement/traces.h"
#include "parallel/planner/memory.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Layers with loads of their own; deeper ones repeat them. Fewer where ranks times experts are many: choosing copies for 512 ranks
// and 256 experts takes 0.6 s a layer.
constexpr int kDistinctLayers = 4;
constexpr int64_t kDistinctEntries = 1 << 16;
// Ranks for which loads by rank and expert are drawn.
constexpr int kSkewRanksMax = 1024;

absl::Status CheckFits(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LoadSkew& skew) {
  const int ranks = cluster.ranks();
  if (!layout.sparse) SHOAL_RETURN_IF_ERROR(CheckLayout({ranks, layout.expert, model.experts}));
  if (model.sequences % layout.parts != 0) {
    return absl::InvalidArgumentError(absl::StrCat(layout.parts, " parts do not divide ", model.sequences, " sequences"));
  }
  if (skew.sigma > 0 && ranks > kSkewRanksMax) {
    return absl::InvalidArgumentError(absl::StrCat("unequal loads can be drawn for ", kSkewRanksMax, " ranks, not for ", ranks));
  }
  return absl::OkStatus();
}

std::vector<int64_t> TokensOfRanks(const ModelShape& model, const StepLayout& layout, int ranks) {
  const int64_t sequences = model.sequences / layout.parts;
  if (sequences % ranks == 0) return {sequences / ranks * model.sequence_length};
  std::vector<int64_t> tokens;
  for (int rank = 0; rank < ranks; ++rank) tokens.push_back(EvenPart(sequences, ranks, rank).count * model.sequence_length);
  return tokens;
}

// Copies of a layer's experts that a rank has room for. `out` has none yet.
int RoomForCopies(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LaidOut& out) {
  if (layout.copies >= 0) return std::min(layout.copies, model.experts);
  const int64_t left = cluster.memory_bytes - PeakMemory(model, layout, out, /*waves=*/1).total();
  return static_cast<int>(std::clamp<int64_t>(left / 4 * 3 / CopyBytes(model, layout), 0, model.experts));
}

// The copies that training would make, had it measured what the cluster's tasks are expected to take.
ExpertPlacement PlaceCopies(const ModelShape& model, const StepLayout& layout, const LaidOut& out, const std::vector<int>& owners,
                            std::vector<int64_t> rows, int room) {
  if (layout.overlap >= 0) {
    return MaterialisePerHost(owners, SumByHost(out.topology, rows, model.experts), out.topology, {layout.overlap, room});
  }
  const std::optional<CopyCosts> costs = MeasuredCopyCosts(out.costs, out.shape, out.work, out.topology);
  if (!costs.has_value()) return OwnersOnly(owners);
  for (int64_t& count : rows) count *= layout.parts;
  return ChooseCopies(owners, rows, out.topology, {room, layout.dispatch, *costs});
}

void DrawLoads(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LoadSkew& skew, LaidOut* out) {
  int64_t tokens = 0;
  for (int64_t of_rank : out->work.tokens) tokens = std::max(tokens, of_rank);
  const int distinct = static_cast<int>(out->work.experts.size());
  const RoutingTrace trace({.layers = distinct,
                            .ranks = cluster.ranks(),
                            .experts = model.experts,
                            .choices = model.choices,
                            .tokens_per_rank = tokens,
                            .sigma = skew.sigma,
                            .seed = skew.seed});
  for (int layer = 0; layer < distinct; ++layer) out->work.experts[static_cast<size_t>(layer)].rows = trace.Rows(layer);
  if (!layout.sparse) return;
  const OwnerMap owners = EvenOwners(distinct, model.experts, cluster.ranks());
  const int room = RoomForCopies(model, cluster, layout, *out);
  std::vector<ExpertPlacement> placed;
  for (size_t layer = 0; layer < owners.size(); ++layer) {
    placed.push_back(PlaceCopies(model, layout, *out, owners[layer], out->work.experts[layer].rows, room));
  }
  for (size_t layer = 0; layer < placed.size(); ++layer) out->work.experts[layer].placement = std::move(placed[layer]);
}

Workload MakeWorkload(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, bool skewed) {
  Workload work;
  work.tokens = TokensOfRanks(model, layout, cluster.ranks());
  work.sequence_tokens = model.sequence_length;
  work.choices = model.choices;
  work.row_bytes = model.width * model.compute_bytes;
  work.dispatch = layout.dispatch;
  work.expert_elements = model.expert_elements();
  work.expert_weight_bytes = work.expert_elements * model.compute_bytes;
  work.expert_gradient_bytes = work.expert_elements * 4;
  work.bucket_elements = model.BucketElements();
  work.bucket_bytes = model.BucketBytes();
  const int64_t moe_layers = std::count(model.moe.begin(), model.moe.end(), true);
  work.summary_bytes = model.experts * 8;
  work.totals_bytes = moe_layers * model.experts * 16;
  const int replicas = layout.sparse ? 1 : cluster.ranks() / layout.expert;
  const int64_t entries = int64_t{cluster.ranks()} * model.experts;
  const int with_loads = static_cast<int>(std::clamp<int64_t>(kDistinctEntries / entries, 1, kDistinctLayers));
  // Owners are dealt in turn, so placements repeat after as many layers as there are replicas.
  const int distinct = std::min<int>(static_cast<int>(moe_layers), skewed                          ? with_loads
                                                                   : layout.sparse || replicas > 1 ? 2
                                                                                                   : 1);
  if (layout.sparse) {
    for (const std::vector<int>& owners : EvenOwners(distinct, model.experts, cluster.ranks())) {
      work.experts.push_back({.placement = OwnersOnly(owners)});
    }
  } else if (distinct > 0) {
    for (ExpertPlacement& placement : GroupedPlacement(distinct, model.experts, cluster.ranks(), layout.expert)) {
      work.experts.push_back({.placement = std::move(placement)});
    }
  }
  int next = 0;
  for (const bool moe : model.moe) work.experts_of_layer.push_back(moe ? next++ % distinct : -1);
  return work;
}

}  // namespace

std::string StepLayout::ToString() const {
  std::string text = sparse ? "experts sparse" : absl::StrCat("expert ", expert);
  if (experts == ExpertPolicy::kRematerialise) absl::StrAppend(&text, ", rematerialise");
  absl::StrAppend(&text, dense == DensePolicy::kSharded ? ", dense sharded" : ", dense replicated");
  if (recompute) absl::StrAppend(&text, ", recompute");
  if (parts > 1) absl::StrAppend(&text, ", ", parts, " parts");
  if (prefetch > 1) absl::StrAppend(&text, ", prefetch ", prefetch);
  return text;
}

absl::StatusOr<LaidOut> LayOut(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LoadSkew& skew) {
  SHOAL_RETURN_IF_ERROR(CheckFits(model, cluster, layout, skew));
  LaidOut out;
  out.topology = cluster.topology();
  for (const bool moe : model.moe) out.shape.layers.push_back({.moe = moe, .shared_expert = moe && model.shared_inner > 0});
  out.shape.tied_head = model.tied_head;
  out.shape.balance = model.balance;
  out.shape.parts = layout.parts;
  out.shape.recompute = layout.recompute;
  out.shape.dense = layout.dense;
  out.shape.experts = layout.experts;
  out.work = MakeWorkload(model, cluster, layout, skew.sigma > 0);
  out.costs = CostsOf(model, cluster, out.work, out.topology);
  DescribeTraffic(out.work, out.topology, &out.shape);
  if (skew.sigma > 0 && !out.work.experts.empty()) {
    DrawLoads(model, cluster, layout, skew, &out);
    out.costs = CostsOf(model, cluster, out.work, out.topology);
    DescribeTraffic(out.work, out.topology, &out.shape);
  }
  out.shape.exchange = out.shape.dispatch || layout.pinned();
  return out;
}

}  // namespace shoal
