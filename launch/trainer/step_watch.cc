#include "launch/trainer/step_watch.h"

#include <algorithm>

#include "launch/trainer/trace.h"
#include "parallel/schedule/profile_file.h"
#include "parallel/schedule/simulate.h"
#include "parallel/schedule/step_summary.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

// The bytes of rank 0's `text` on every rank.
absl::StatusOr<std::string> BroadcastText(Communicator& world, const std::string& text) {
  if (world.size() == 1) return text;
  const Tensor size = Empty({1}, DType::kI64);
  size.data<int64_t>()[0] = static_cast<int64_t>(text.size());
  SHOAL_RETURN_IF_ERROR(world.Broadcast(size, 0, {.label = "profile"}).Await());
  const int64_t bytes = size.data<int64_t>()[0];
  if (bytes == 0) return std::string();
  const Tensor content = Empty({bytes}, DType::kU8);
  if (world.index() == 0) std::copy(text.begin(), text.end(), content.data<uint8_t>());
  SHOAL_RETURN_IF_ERROR(world.Broadcast(content, 0, {.label = "profile"}).Await());
  return std::string(content.data<uint8_t>(), content.data<uint8_t>() + bytes);
}

// What the costs say of a step in which every rank did what this one did.
Prediction PredictStep(Graph graph, const StepRecord& record, const CostTable& costs, Record with_record) {
  for (size_t i = 0; i < graph.tasks.size(); ++i) graph.tasks[i].units = record.tasks[i].units;
  return SimulateAlike(graph, FlatCosts(costs), with_record);
}

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

std::string ProfilePath(const std::string& run_dir) { return run_dir + "/profile.json"; }
std::string TracePath(const std::string& run_dir, int64_t step) { return absl::StrCat(run_dir, "/trace-step-", step, ".json"); }

absl::StatusOr<std::unique_ptr<StepWatch>> StepWatch::Create(StepWatchOptions options, Communicator& world, Profiler& profiler) {
  std::unique_ptr<StepWatch> watch(new StepWatch(std::move(options), world, profiler));
  if (!watch->options_.run_dir.empty()) SHOAL_RETURN_IF_ERROR(watch->ReadProfile(), "the profile of an earlier run");
  watch->costs_ = profiler.table();
  return watch;
}

absl::Status StepWatch::ReadProfile() {
  std::string text;
  if (world_.index() == 0) {
    const std::string path = ProfilePath(options_.run_dir);
    absl::StatusOr<std::string> read = ReadFile(path);
    if (read.ok()) {
      const auto file = ProfileFromJson(*read);
      // It is measured anew: a broken file is no reason not to train.
      if (!file.ok()) SHOAL_LOG(kWarning) << path << ": " << file.status().message() << "; it is not used";
      if (file.ok() && file->about == options_.about) text = *std::move(read);
    } else if (!absl::IsNotFound(read.status())) {
      SHOAL_LOG(kWarning) << read.status().message() << "; no profile is used";
    }
  }
  SHOAL_ASSIGN_OR_RETURN(text, BroadcastText(world_, text));
  if (text.empty()) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(const ProfileFile file, ProfileFromJson(text));
  profiler_.StartFrom(file.profile);
  return absl::OkStatus();
}

void StepWatch::FeedMetrics(const Graph& graph, const StepRecord& record) {
  const StepSummary summary = Summarise(graph, record);
  const Metrics& metrics = options_.metrics;
  for (size_t lane = 0; lane < kStepLanes.size(); ++lane) metrics.lane_busy[lane].Add(Seconds(summary.busy_ns[lane]));
  metrics.exposed_communication.Add(Seconds(summary.exposed_ns));
  metrics.scheduling_overhead.Add(Seconds(summary.overhead_ns));
  if (predicted_seconds_ > 0) metrics.predicted_step_duration.Set(predicted_seconds_);
  metrics.task_prediction_error.Set(profiler_.prediction_error());
  metrics.cost_changes.Add(static_cast<double>(profiler_.jumps() - jumps_));
  jumps_ = profiler_.jumps();
}

absl::Status StepWatch::Trace(int64_t step, const Graph& graph, const StepRecord& record, const StepRecord& predicted) {
  SHOAL_ASSIGN_OR_RETURN(std::string trace, GatherTrace(step, graph, record, predicted, world_));
  if (world_.index() != 0) return absl::OkStatus();
  if (!options_.run_dir.empty()) return WriteFileAtomic(TracePath(options_.run_dir, step), trace);
  traces_.push_back(std::move(trace));
  return absl::OkStatus();
}

absl::Status StepWatch::AfterStep(int64_t step, const Graph& graph, const StepRecord& record) {
  const bool traced = std::find(options_.trace_steps.begin(), options_.trace_steps.end(), step) != options_.trace_steps.end();
  const Prediction prediction = PredictStep(graph, record, costs_, traced ? Record::kYes : Record::kNo);
  predicted_seconds_ = prediction.step_ns * 1e-9;
  costs_ = profiler_.table();
  FeedMetrics(graph, record);
  unwritten_ = true;
  if (traced) SHOAL_RETURN_IF_ERROR(Trace(step, graph, record, prediction.record), "tracing");
  return options_.write_interval > 0 && (step + 1) % options_.write_interval == 0 ? Finish() : absl::OkStatus();
}

absl::Status StepWatch::Finish() {
  if (!unwritten_ || options_.run_dir.empty() || world_.index() != 0) return absl::OkStatus();
  unwritten_ = false;
  return WriteFileAtomic(ProfilePath(options_.run_dir), ToJson({.about = options_.about, .profile = profiler_.profile()}));
}

}  // namespace shoal
