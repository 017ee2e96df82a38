// What a run tells of its steps while it trains: where time goes (/metrics), the costs of tasks (profile.json), traces of chosen
// steps. Not thread-safe; its calls are collective over all ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"
#include "parallel/schedule/profiler.h"
#include "runtime/metrics/server.h"

namespace shoal {

struct StepWatchOptions {
  std::string run_dir;  // profile.json and trace-step-N.json are written there, by rank 0. Empty: nothing is read or written.
  std::string about;    // What is trained, where: a profile of something else is not gone on from.
  std::vector<int64_t> trace_steps;
  int64_t write_interval = 100;  // Steps between writings of profile.json; 0: only at the end.
  Metrics metrics;
};

class StepWatch {
 public:
  // Borrows `world` and `profiler` for life. Where profile.json is of the same `about`, the profiler begins with it, on all ranks.
  static absl::StatusOr<std::unique_ptr<StepWatch>> Create(StepWatchOptions options, Communicator& world, Profiler& profiler);

  // After each step that the profiler has learnt from: the graph that ran, not one that was emitted since, and its record. Waits
  // for other ranks only where the step is traced; what cannot be written ends the run.
  absl::Status AfterStep(int64_t step, const Graph& graph, const StepRecord& record);
  // After the last step.
  absl::Status Finish();

  // Seconds of the last step as predicted by what was known before it; 0: nothing was.
  double predicted_seconds() const { return predicted_seconds_; }
  // On rank 0 the traces of all traced steps, as JSON, where run_dir is empty.
  const std::vector<std::string>& traces() const { return traces_; }

 private:
  StepWatch(StepWatchOptions options, Communicator& world, Profiler& profiler)
      : options_(std::move(options)), world_(world), profiler_(profiler), jumps_(profiler.jumps()) {}
  absl::Status ReadProfile();
  void FeedMetrics(const Graph& graph, const StepRecord& record);
  absl::Status Trace(int64_t step, const Graph& graph, const StepRecord& record, const StepRecord& predicted);

  const StepWatchOptions options_;
  Communicator& world_;
  Profiler& profiler_;
  CostTable costs_;  // Before the next step.
  double predicted_seconds_ = 0;
  int64_t jumps_;
  bool unwritten_ = false;
  std::vector<std::string> traces_;
};

// Where a run keeps its profile and a step's trace.
std::string ProfilePath(const std::string& run_dir);
std::string TracePath(const std::string& run_dir, int64_t step);

}  // namespace shoal
