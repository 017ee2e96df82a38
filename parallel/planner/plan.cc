#include "parallel/planner/plan.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Layouts whose schedule is searched; the others are ranked with a plain schedule and left behind.
constexpr size_t kScheduledMax = 48;

std::vector<int> ExpertGroups(const ModelShape& model, int ranks) {
  std::vector<int> groups;
  const bool any = std::find(model.moe.begin(), model.moe.end(), true) != model.moe.end();
  for (int group = 1; group <= (any ? std::min(ranks, model.experts) : 1); ++group) {
    if (ranks % group == 0) groups.push_back(group);
  }
  return groups;
}

std::vector<int> Parts(const ModelShape& model, int ranks) {
  std::vector<int> parts;
  for (int count = 1; count <= model.sequences; count *= 2) {
    // Parts with fewer sequences than ranks would leave ranks idle.
    if (model.sequences % count == 0 && (count == 1 || model.sequences / count >= ranks)) parts.push_back(count);
  }
  return parts;
}

// Where experts may be, each on top of what is not searched.
std::vector<StepLayout> ExpertLayouts(const ModelShape& model, int ranks, const PlanOptions& options) {
  std::vector<StepLayout> layouts;
  StepLayout layout = options.base;
  layout.sparse = false;
  for (int group : ExpertGroups(model, ranks)) {
    layout.expert = group;
    layouts.push_back(layout);
  }
  layout.expert = 1;
  layout.sparse = true;
  if (options.sparse && ranks > 1 && options.skew.sigma > 0) layouts.push_back(layout);
  return layouts;
}

std::vector<StepLayout> AllLayouts(const ModelShape& model, const Cluster& cluster, const PlanOptions& options) {
  const int ranks = cluster.ranks();
  std::vector<StepLayout> layouts;
  for (const StepLayout& kind : ExpertLayouts(model, ranks, options)) {
    const bool copies = kind.sparse || kind.expert < ranks;
    for (const DensePolicy dense : {DensePolicy::kReplicated, DensePolicy::kSharded}) {
      if (dense == DensePolicy::kSharded && ranks == 1) continue;
      for (const ExpertPolicy experts : {ExpertPolicy::kKeep, ExpertPolicy::kRematerialise}) {
        if (experts == ExpertPolicy::kRematerialise && !copies) continue;
        for (const bool recompute : {false, true}) {
          for (int parts : Parts(model, ranks)) {
            // In the pinned order gradients of copies leave after each part.
            if (kind.pinned() && copies && parts > 1 && experts == ExpertPolicy::kKeep) continue;
            StepLayout layout = kind;
            layout.dense = dense;
            layout.experts = experts;
            layout.recompute = recompute;
            layout.parts = parts;
            layouts.push_back(layout);
          }
        }
      }
    }
  }
  return layouts;
}

struct Candidate {
  StepLayout layout;
  MemoryUse memory;
  double plain_ns = 0;
};

// Waves are whole sequences, and hide rows that travel.
std::vector<int> WavesFor(const ModelShape& model, const LaidOut& out, const SchedulerOptions& options) {
  const int64_t tokens = *std::max_element(out.work.tokens.begin(), out.work.tokens.end());
  const int64_t most = options.waves.size() > 1 && !out.shape.dispatch ? 1 : std::max<int64_t>(1, tokens / model.sequence_length);
  std::vector<int> waves = options.waves;
  std::erase_if(waves, [&](int count) { return count > most; });
  return waves.empty() ? std::vector<int>{1} : waves;
}

MemoryUse Memory(const ModelShape& model, const StepLayout& layout, const LaidOut& out, const SchedulerOptions& options) {
  const std::vector<int> waves = WavesFor(model, out, options);
  return PeakMemory(model, layout, out, *std::max_element(waves.begin(), waves.end()));
}

double PlainTime(const LaidOut& out) {
  const Schedule schedule = PlainSchedule(out.shape, out.work.bucket_elements);
  return PredictStep(out.shape, out.costs, out.work, out.topology, schedule);
}

}  // namespace

absl::StatusOr<StepEstimate> EstimateStep(const ModelShape& model, const Cluster& cluster, const StepLayout& layout,
                                          const LoadSkew& skew, const SchedulerOptions& scheduler, Record record) {
  SHOAL_ASSIGN_OR_RETURN(const LaidOut out, LayOut(model, cluster, layout, skew));
  StepEstimate estimate;
  estimate.layout = layout;
  SchedulerOptions options = scheduler;
  options.prefetch = layout.prefetch > 0 ? std::vector<int>{layout.prefetch} : PrefetchUpTo(out.shape);
  options.waves = WavesFor(model, out, scheduler);
  estimate.choice = ChooseSchedule(out.shape, out.costs, out.work, out.topology, options);
  estimate.memory = Memory(model, layout, out, scheduler);
  Graph graph = EmitStep(out.shape, estimate.choice.schedule);
  const StepUnits units(out.work, out.topology);
  ClusterPrediction predicted =
      SimulateCluster(graph, FlatCosts(out.costs), estimate.choice.schedule, units, out.topology, record);
  estimate.step_ns = predicted.step_ns;
  estimate.exposed_ns = predicted.slowest().prediction.exposed_ns;
  estimate.busy_ns = predicted.slowest().prediction.busy_ns;
  const double tokens = static_cast<double>(model.sequences * model.sequence_length);
  const double peak = model.compute_bytes == 2 ? cluster.bf16_peak_flops_per_ns : cluster.fp32_peak_flops_per_ns;
  estimate.tokens_per_s = tokens / estimate.step_ns * 1e9;
  estimate.mfu = model.TrainFlopsPerToken() * tokens / (estimate.step_ns * cluster.ranks() * peak);
  if (record == Record::kYes) {
    estimate.graph = std::move(graph);
    estimate.classes = std::move(predicted.classes);
  }
  return estimate;
}

absl::StatusOr<Plan> FindPlan(const ModelShape& model, const Cluster& cluster, const PlanOptions& options) {
  const int64_t limit = options.memory_bytes > 0 ? options.memory_bytes : cluster.memory_bytes;
  Plan plan;
  std::vector<Candidate> fitting, excluded;
  for (const StepLayout& layout : AllLayouts(model, cluster, options)) {
    SHOAL_ASSIGN_OR_RETURN(const LaidOut out, LayOut(model, cluster, layout, options.skew), layout.ToString());
    // Without copies nothing can be rematerialised: the same step as with kKeep.
    if (layout.experts == ExpertPolicy::kRematerialise && !out.shape.materialise) continue;
    ++plan.considered;
    Candidate candidate = {layout, Memory(model, layout, out, options.scheduler)};
    const bool fits = candidate.memory.total() <= limit;
    if (fits) candidate.plain_ns = PlainTime(out);
    (fits ? fitting : excluded).push_back(std::move(candidate));
  }
  std::stable_sort(excluded.begin(), excluded.end(),
                   [](const Candidate& a, const Candidate& b) { return a.memory.total() < b.memory.total(); });
  for (const Candidate& candidate : excluded) {
    plan.excluded.push_back(
        absl::StrCat(candidate.layout.ToString(), ": needs ", candidate.memory.ToString(), "; a device has ", BytesText(limit)));
  }
  if (fitting.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("no layout fits; nearest is ", plan.excluded.empty() ? "none" : plan.excluded.front()));
  }
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Candidate& a, const Candidate& b) { return a.plain_ns < b.plain_ns; });
  if (fitting.size() > kScheduledMax) fitting.resize(kScheduledMax);
  for (const Candidate& candidate : fitting) {
    SHOAL_ASSIGN_OR_RETURN(StepEstimate estimate,
                           EstimateStep(model, cluster, candidate.layout, options.skew, options.scheduler, Record::kNo));
    plan.ranked.push_back(std::move(estimate));
  }
  std::stable_sort(plan.ranked.begin(), plan.ranked.end(),
                   [](const StepEstimate& a, const StepEstimate& b) { return a.step_ns < b.step_ns; });
  return plan;
}

}  // namespace shoal
