#include "launch/trainer/trace_run.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "launch/trainer/device.h"
#include "launch/trainer/schedule.h"
#include "launch/trainer/session.h"
#include "launch/trainer/step_watch.h"
#include "models/data/batches.h"
#include "parallel/schedule/profile_file.h"
#include "parallel/schedule/step_summary.h"
#include "parallel/schedule/trace.h"
#include "runtime/device/cpu.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

constexpr int64_t kWarmup = 3;

absl::StatusOr<Dataset> OpenData(const Config& config) {
  SHOAL_ASSIGN_OR_RETURN(const DataKind kind, ParseDataKind(config.data().kind()));
  SHOAL_ASSIGN_OR_RETURN(const DataOrder order, ParseDataOrder(config.data().order()));
  return OpenDataset({.kind = kind,
                      .path = config.data().path(),
                      .order = order,
                      .validation_fraction = config.data().validation_fraction(),
                      .seed = config.run().seed(),
                      .end_of_document = EndOfDocument(config),
                      .vocab_size = config.model().vocab_size(),
                      .seq = config.train().seq_length(),
                      .global_batch = config.train().global_batch_size()});
}

// This rank's rows of each part of the batch of a step.
absl::StatusOr<std::vector<Tensor>> ReadParts(const Config& config, const BatchSource& source, int64_t step, const RankModel& model) {
  const int64_t parts = config.train().gradient_accumulation_steps(), rows = config.train().global_batch_size() / parts;
  const Range mine = model.RowsOf(rows);
  std::vector<Tensor> tensors;
  for (int64_t part = 0; part < parts; ++part) {
    tensors.push_back(Empty({mine.count, config.train().seq_length() + 1}, DType::kI32));
    SHOAL_RETURN_IF_ERROR(source.ReadRows(step, part * rows + mine.begin, tensors.back()));
  }
  return tensors;
}

// Field by field: single steps are disturbed by whatever else runs on the machine.
StepSummary MedianOf(const std::vector<StepSummary>& steps) {
  const auto median = [&](const auto& field) {
    std::vector<int64_t> values;
    for (const StepSummary& step : steps) values.push_back(field(step));
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
  };
  StepSummary summary;
  summary.step_ns = median([](const StepSummary& step) { return step.step_ns; });
  summary.exposed_ns = median([](const StepSummary& step) { return step.exposed_ns; });
  summary.overhead_ns = median([](const StepSummary& step) { return step.overhead_ns; });
  for (size_t lane = 0; lane < kLanes; ++lane) {
    summary.busy_ns[lane] = median([lane](const StepSummary& step) { return step.busy_ns[lane]; });
  }
  return summary;
}

void PrintSummary(const std::vector<StepSummary>& steps, double predicted_seconds, const Profiler& profiler,
                  const std::string& about) {
  const StepSummary summary = MedianOf(steps);
  const double step = static_cast<double>(std::max<int64_t>(summary.step_ns, 1));
  const auto line = [&](const std::string& what, int64_t ns) {
    absl::PrintF("  %-24s %10.2f ms %6.1f %%\n", what, static_cast<double>(ns) / 1e6, 100 * static_cast<double>(ns) / step);
  };
  absl::PrintF("Rank 0, medians of the last %d steps:\n", steps.size());
  line("step", summary.step_ns);
  if (predicted_seconds > 0) line("  the last, predicted", static_cast<int64_t>(predicted_seconds * 1e9));
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t busy = summary.busy_ns[static_cast<size_t>(lane)];
    if (busy > 0) line(absl::StrCat("lane ", AbslSv(Name(static_cast<Lane>(lane))), " busy"), busy);
  }
  line("exposed communication", summary.exposed_ns);
  line("scheduling overhead", summary.overhead_ns);
  absl::PrintF("\n%s", ProfileText({.about = about, .profile = profiler.profile()}));
}

absl::Status TrainAndTrace(const Config& config, const TraceOptions& options, RankModel& model, Communicator& world) {
  SHOAL_ASSIGN_OR_RETURN(const Dataset data, OpenData(config), "data");
  const std::string about = absl::StrCat(config.run().name(), ", ", world.size(), " ranks");
  StepWatchOptions watched{.about = about};
  for (int64_t step = std::max<int64_t>(options.steps - options.traced, 0); step < options.steps; ++step) {
    watched.trace_steps.push_back(step);
  }
  Profiler& profiler = model.tuner()->profiler();
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<StepWatch> watch, StepWatch::Create(std::move(watched), world, profiler));
  std::vector<StepSummary> summaries;
  for (int64_t step = 0; step < options.steps; ++step) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<Tensor> parts, ReadParts(config, *data.train, step, model), "data");
    SHOAL_ASSIGN_OR_RETURN(const StepResult result, model.Train(parts, LearningRate(config, step), step + 1), "step ", step);
    if (!result.finite) return absl::FailedPreconditionError(absl::StrCat("step ", step, ": loss ", result.loss, " is not finite"));
    const Graph& graph = model.graph();
    SHOAL_RETURN_IF_ERROR(watch->AfterStep(step, graph, model.record()), "step ", step);
    if (step >= std::min(kWarmup, options.steps - 1)) summaries.push_back(Summarise(graph, model.record()));
  }
  if (world.index() != 0) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(const std::string trace, JoinTraces(watch->traces()));
  SHOAL_RETURN_IF_ERROR(WriteFileAtomic(options.path, trace), "writing the trace");
  PrintSummary(summaries, watch->predicted_seconds(), profiler, about);
  absl::PrintF("\nWrote %s (%d steps, all ranks): open it in https://ui.perfetto.dev\n", options.path, watch->traces().size());
  return absl::OkStatus();
}

}  // namespace

absl::Status TraceRank(const LoadedConfig& loaded, const RankEnvironment& environment, const TraceOptions& options) {
  const Config& config = loaded.config;
  SetThreads(ThreadsPerRank(config, environment));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, ConnectWorld(WorldOptionsFor(environment, config)),
                         "connecting the ranks");
  SHOAL_ASSIGN_OR_RETURN(Device* const device, DeviceFor(config, environment));
  RankModel::Options setting{.host = environment.node_rank, .device = device};
  if (options.device.has_value()) setting.pace = PaceOf(*options.device, ModelConfigOf(config), config.train().seq_length());
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<RankModel> model,
                         RankModel::Create(config, ModelConfigOf(config), *world, setting), "setting up");
  SHOAL_RETURN_IF_ERROR(LoadWeights({.init_from = config.run().init_from(), .seed = config.run().seed()}, *model), "initial weights");
  const absl::Status status = TrainAndTrace(config, options, *model, *world);
  if (!status.ok() && world->status().ok()) world->Abort(status);
  return status;
}

}  // namespace shoal
