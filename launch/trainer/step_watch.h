// What a run learns from its steps while it trains: the costs of tasks (parallel/schedule/profiler.h), where time goes
// (/metrics), traces of chosen steps. Not thread-safe; its calls are collective over all ranks.
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
  std::string run_dir;  // profile.json and trace-step-N.json are written there, by rank 0.
  std::string about;    // What is trained, where: a profile of something else is not gone on from.
  std::vector<int64_t> trace_steps;
  int64_t write_interval = 100;  // Steps between writings of profile.json.
  Metrics metrics;
};

class StepWatch {
 public:
  // Goes on from what profile.json has learnt, where it is of the same `about`. Borrows `world` for life.
  static absl::StatusOr<std::unique_ptr<StepWatch>> Create(StepWatchOptions options, Communicator& world);

  // After each step. Every rank learns the same from it. Costs two small reductions; what cannot be written ends the run.
  absl::Status AfterStep(int64_t step, const Graph& graph, const StepRecord& record);
  // After the last step.
  absl::Status Finish();

  // Equal on all ranks.
  const Profiler& profiler() const { return profiler_; }
  CostTable costs() const { return profiler_.table(); }

 private:
  StepWatch(StepWatchOptions options, Communicator& world) : options_(std::move(options)), world_(&world) {}
  absl::Status ReadPrior();
  absl::Status WriteProfile() const;
  absl::Status Learn(const Graph& graph, const StepRecord& record);

  const StepWatchOptions options_;
  Communicator* world_;
  Profiler profiler_;
  int64_t jumps_ = 0;
  bool unwritten_ = false;
};

// The name of a run's profile and of a step's trace, in its folder.
std::string ProfilePath(const std::string& run_dir);
std::string TracePath(const std::string& run_dir, int64_t step);

}  // namespace shoal
