#include <algorithm>
#include <cerrno>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/cli/plan_flags.h"
#include "parallel/planner/plan.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Where the time goes that a layout takes beyond the best one.
std::string Why(const StepEstimate& estimate, const StepEstimate& best) {
  const auto compute = static_cast<size_t>(Lane::kCompute);
  const double more_compute = estimate.busy_ns[compute] - best.busy_ns[compute];
  const double more_exposed = estimate.exposed_ns - best.exposed_ns;
  const auto more = [](double ns) { return absl::StrCat(ns >= 0 ? "+" : "", TimeText(ns)); };
  return absl::StrCat("computation ", more(more_compute), ", exposed communication ", more(more_exposed));
}

void Print(const Plan& plan, const Cluster& cluster, int64_t top) {
  const StepEstimate& best = plan.ranked.front();
  absl::PrintF("%d layouts of %d ranks, %d fit the memory of a device (%s)\n\n", plan.considered, cluster.ranks(),
               plan.considered - static_cast<int>(plan.excluded.size()), BytesText(cluster.memory_bytes));
  absl::PrintF("%3s %10s %8s %6s %10s  %s\n", "", "step", "exposed", "MFU", "memory", "layout");
  for (size_t i = 0; i < plan.ranked.size() && static_cast<int64_t>(i) < top; ++i) {
    const StepEstimate& estimate = plan.ranked[i];
    absl::PrintF("%3d %10s %7.1f%% %5.1f%% %10s  %s\n", static_cast<int>(i) + 1, TimeText(estimate.step_ns),
                 100 * estimate.exposed_ns / estimate.step_ns, 100 * estimate.mfu, BytesText(estimate.memory.total()),
                 estimate.layout.ToString());
    if (i == 0) {
      for (const std::string& reason : estimate.choice.reasons) absl::PrintF("%44s%s\n", "", reason);
    } else {
      absl::PrintF("%44s%s\n", "", Why(estimate, best));
    }
  }
  if (plan.excluded.empty()) return;
  absl::PrintF("\nnot possible (nearest to the limit first):\n");
  constexpr size_t kShownMax = 5;
  for (size_t i = 0; i < plan.excluded.size() && i < kShownMax; ++i) absl::PrintF("  %s\n", plan.excluded[i]);
  if (plan.excluded.size() > kShownMax) absl::PrintF("  and %d more\n", static_cast<int>(plan.excluded.size() - kShownMax));
}

void Apply(const StepLayout& layout, Config* config) {
  Parallel& parallel = *config->mutable_parallel();
  parallel.set_expert(layout.sparse ? 1 : layout.expert);
  parallel.set_experts(layout.sparse ? "sparse" : "grouped");
  parallel.set_dense(layout.dense == DensePolicy::kSharded ? "sharded" : "replicated");
  parallel.set_rematerialise(layout.experts == ExpertPolicy::kRematerialise);
  if (!layout.sparse) {  // What goes with sparse experts alone.
    parallel.clear_expert_copies();
    parallel.clear_expert_overlap();
    parallel.clear_reshard_interval();
    parallel.clear_owners();
    parallel.clear_calibrate();
  }
  config->mutable_train()->set_recompute(layout.recompute);
  config->mutable_train()->set_gradient_accumulation_steps(layout.parts);
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  errno = 0;
  std::ofstream file(path);
  file << text;
  file.close();
  return file ? absl::OkStatus() : ErrnoStatus(errno != 0 ? errno : EIO, path);
}

}  // namespace

int RunPlan(absl::Span<const std::string> args) {
  FlagSet flags(
      "shoal plan",
      "Finds the layout of a model on a cluster that is only described: expert groups, how weights are kept, recomputation, "
      "parts of the batch, each with its best schedule; those that fit the devices' memory, fastest first.");
  PlanFlags values;
  AddPlanFlags(&flags, &values);
  int64_t top = 5;
  std::string apply;
  flags.Add({.name = "top", .value = "K", .help = "Layouts to print.", .min = 1}, &top);
  flags.Add({.name = "apply", .value = "FILE", .help = "Writes CONFIG with the best layout, defaults included."}, &apply);
  flags.Examples(
      {"./shoal plan configs/bench-small.yaml --cluster configs/clusters/emulated-4.yaml",
       "./shoal plan configs/bench-small.yaml --cluster configs/clusters/h100-8x.yaml --ranks 16 --skew 1 --apply best.yaml"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  auto inputs = LoadPlanInputs(values);
  if (!inputs.ok()) return Fail(flags.command(), inputs.status());
  const PlanOptions options = {.skew = inputs->skew,
                               .scheduler = SchedulerOptionsOf(inputs->config.config),
                               .base = LayoutOf(inputs->config.config, inputs->cluster.ranks())};
  const auto plan = FindPlan(inputs->model, inputs->cluster, options);
  if (!plan.ok()) return Fail(flags.command(), plan.status());
  Print(*plan, inputs->cluster, top);
  if (apply.empty()) return kExitOk;
  Apply(plan->ranked.front().layout, &inputs->config.config);
  const absl::Status written = WriteFile(apply, ConfigYaml(inputs->config.config));
  if (!written.ok()) return Fail(flags.command(), written);
  absl::PrintF("\nwrote the first to %s\n", apply);
  return kExitOk;
}

}  // namespace shoal
