// Runs a graph: each lane is a thread that runs its tasks in list order (LaneOrder), a task when what it waits for is done. The compute lane
// is the calling thread (kernels use its OpenMP team), so that a graph of compute tasks alone costs no more than calling them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/schedule/graph.h"

namespace shoal {

// When a task ran, on the clock of std::chrono::steady_clock, and the units that its body reported.
struct TaskRecord {
  int64_t begin_ns = 0, end_ns = 0;
  double units = 0;
};
struct StepRecord {
  int64_t begin_ns = 0, end_ns = 0;
  std::vector<TaskRecord> tasks;  // By task.
};

class Executor {
 public:
  // What a task does, on the thread of its lane; blocks until it is done, or until those that wait for it can look after the rest
  // (launch/trainer/stream_lanes.h). Returns the units that it did. Bodies of different lanes run at the same time. Those on lanes
  // other than kCompute must not use the OpenMP team.
  using Body = std::function<absl::StatusOr<double>(const Task&)>;

  Executor();
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Blocks until all tasks are done. After the first failure no further task begins; `on_failure` is called at once with it, on
  // the thread that met it, and must make bodies that still wait return (Communicator::Abort); then Run returns it, with the
  // task's name. Not thread-safe; a body must not call it. `record` may be null.
  absl::Status Run(const Graph& graph, const Body& body, const std::function<void(const absl::Status&)>& on_failure,
                   StepRecord* record);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace shoal
