#include <cerrno>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/cli/plan_flags.h"
#include "parallel/planner/plan.h"
#include "parallel/planner/sweeps.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Chrome's trace format: a process for each class of ranks, a thread for each lane. Times in microseconds.
absl::Status WriteTrace(const StepEstimate& estimate, const std::string& path) {
  nlohmann::json events = nlohmann::json::array();
  for (size_t i = 0; i < estimate.classes.size(); ++i) {
    const RankClass& ranks = estimate.classes[i];
    const std::string name =
        absl::StrCat("rank ", ranks.first_rank, ranks.ranks > 1 ? absl::StrCat(" and ", ranks.ranks - 1, " alike") : "");
    events.push_back({{"ph", "M"}, {"name", "process_name"}, {"pid", i}, {"args", {{"name", name}}}});
    for (int lane = 0; lane < kLanes; ++lane) {
      events.push_back(
          {{"ph", "M"}, {"name", "thread_name"}, {"pid", i}, {"tid", lane}, {"args", {{"name", Name(static_cast<Lane>(lane))}}}});
    }
    for (size_t t = 0; t < estimate.graph.tasks.size(); ++t) {
      const TaskRecord& record = ranks.prediction.record.tasks[t];
      events.push_back({{"ph", "X"},
                        {"name", Name(estimate.graph.tasks[t])},
                        {"pid", i},
                        {"tid", static_cast<int>(estimate.graph.tasks[t].lane)},
                        {"ts", static_cast<double>(record.begin_ns) / 1e3},
                        {"dur", static_cast<double>(record.end_ns - record.begin_ns) / 1e3},
                        {"args", {{"units", record.units}}}});
    }
  }
  errno = 0;
  std::ofstream file(path);
  file << nlohmann::json{{"traceEvents", std::move(events)}}.dump() << "\n";
  file.close();
  return file ? absl::OkStatus() : ErrnoStatus(errno != 0 ? errno : EIO, path);
}

void Print(const PlanInputs& inputs, const StepEstimate& estimate) {
  const double step = estimate.step_ns;
  absl::PrintF("ranks        %d on %d host%s\n", inputs.cluster.ranks(), inputs.cluster.hosts,
               inputs.cluster.hosts == 1 ? "" : "s");
  absl::PrintF("layout       %s\n", estimate.layout.ToString());
  for (size_t i = 0; i < estimate.choice.reasons.size(); ++i) {
    absl::PrintF("%s%s\n", i == 0 ? "schedule     " : "             ", estimate.choice.reasons[i]);
  }
  absl::PrintF("step         %s, %.4g tokens/s, MFU %.1f%%\n", TimeText(step), estimate.tokens_per_s, 100 * estimate.mfu);
  absl::PrintF("exposed      %s (%.1f%%) of communication that nothing hides, on the rank with most to compute\n",
               TimeText(estimate.exposed_ns), 100 * estimate.exposed_ns / step);
  std::string busy;
  for (int lane = 0; lane < kLanes; ++lane) {
    const double share = estimate.busy_ns[static_cast<size_t>(lane)] / step;
    absl::StrAppendFormat(&busy, "%s%s %.0f%%", busy.empty() ? "" : ", ", std::string(Name(static_cast<Lane>(lane))),
                          100 * share);
  }
  absl::PrintF("busy         %s\n", busy);
  absl::PrintF("peak memory  %s\n", estimate.memory.ToString());
}

void PrintJson(const StepEstimate& estimate) {
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  const MemoryUse& memory = estimate.memory;
  absl::PrintF("{\"step_ms\":%.3f,\"exposed_ms\":%.3f,\"compute_ms\":%.3f,\"intra_ms\":%.3f,\"inter_ms\":%.3f,"
               "\"peak_memory_mib\":%.2f,\"weights_mib\":%.2f,\"gradients_mib\":%.2f,\"state_mib\":%.2f,"
               "\"copies_mib\":%.2f,\"activations_mib\":%.2f,\"buffers_mib\":%.2f,\"working_mib\":%.2f,\"partials_mib\":%.2f,"
               "\"quantised_mib\":%.2f}\n",
               estimate.step_ns / 1e6, estimate.exposed_ns / 1e6, estimate.busy_ns[static_cast<size_t>(Lane::kCompute)] / 1e6,
               estimate.busy_ns[static_cast<size_t>(Lane::kIntra)] / 1e6,
               estimate.busy_ns[static_cast<size_t>(Lane::kInter)] / 1e6, mib(memory.total()), mib(memory.weights), mib(memory.gradients), mib(memory.optimizer), mib(memory.copies),
               mib(memory.activations), mib(memory.buffers), mib(memory.working), mib(memory.partials),
               mib(memory.quantised));
}

int RunSweep(absl::Span<const std::string> args) {
  FlagSet flags(
      "shoal simulate sweep",
      "Simulates the experiments of a paper with Shoal's own scheduler and placements, and prints the results beside the "
      "paper's: fsmoe (arXiv 2501.10714, 1,458 layers on two testbeds) or hecate (arXiv 2502.02581, load skew on two "
      "clusters); or what might be: calibration (parallel.calibrate there, where loads change from step to step), dispatch (rows "
      "that cross hosts in two levels).");
  std::string name;
  flags.AddPositional("NAME", "fsmoe, hecate, calibration or dispatch.", &name);
  flags.Examples({"./shoal simulate sweep fsmoe"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const std::map<std::string, std::string (*)()> sweeps = {{"fsmoe", FsmoeSweepReport},
                                                           {"hecate", HecateSweepReport},
                                                           {"calibration", CalibrationSweepReport},
                                                           {"dispatch", DispatchSweepReport}};
  const auto sweep = sweeps.find(name);
  if (sweep == sweeps.end()) {
    return Fail(flags.command(), absl::InvalidArgumentError(absl::StrCat(
                                     "NAME: ", name, " is no sweep; fsmoe, hecate, calibration or dispatch would fit")));
  }
  absl::PrintF("%s", sweep->second());
  return kExitOk;
}

}  // namespace

int RunSimulate(absl::Span<const std::string> args) {
  if (!args.empty() && args[0] == "sweep") return RunSweep(args.subspan(1));
  FlagSet flags(
      "shoal simulate",
      "Predicts a training step on a cluster that is only described: time, communication that nothing hides, peak memory "
      "of a rank. `shoal simulate sweep` regenerates published experiments (docs/planning.md).");
  PlanFlags values;
  AddPlanFlags(&flags, &values);
  std::string trace;
  bool json = false;
  flags.Add({.name = "trace", .value = "FILE", .help = "Writes the predicted timeline for chrome://tracing or ui.perfetto.dev."},
            &trace);
  flags.Add({.name = "json", .help = "Prints one line of JSON instead of a report."}, &json);
  flags.Examples({"./shoal simulate configs/bench-small.yaml --cluster configs/clusters/laptop.yaml",
                  "./shoal simulate configs/bench-small.yaml --cluster configs/clusters/emulated-4.yaml --set parallel.expert=4 "
                  "--trace step.json",
                  "./shoal simulate sweep fsmoe"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto inputs = LoadPlanInputs(values);
  if (!inputs.ok()) return Fail(flags.command(), inputs.status());
  const int ranks = inputs->cluster.ranks();
  const absl::Status fits = CheckParallel(inputs->config.config, inputs->config.positions, ranks);
  if (!fits.ok()) return Fail(flags.command(), fits);
  const auto estimate = EstimateStep(inputs->model, inputs->cluster, LayoutOf(inputs->config.config, ranks), inputs->skew,
                                     SchedulerOptionsOf(inputs->config.config), trace.empty() ? Record::kNo : Record::kYes);
  if (!estimate.ok()) return Fail(flags.command(), estimate.status());
  if (json) {
    PrintJson(*estimate);
  } else {
    Print(*inputs, *estimate);
  }
  if (!trace.empty()) {
    const absl::Status written = WriteTrace(*estimate, trace);
    if (!written.ok()) return Fail(flags.command(), written);
  }
  return kExitOk;
}

}  // namespace shoal
