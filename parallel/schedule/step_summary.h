// Where the time of a step went on one rank, from when its tasks ran. Pure.
#pragma once

#include <array>
#include <cstdint>

#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"

namespace shoal {

// Nanoseconds. step = busy[compute] + exposed + overhead.
struct StepSummary {
  int64_t step_ns = 0;
  std::array<int64_t, kLanes> busy_ns = {};  // By lane.
  // The compute lane waits for tasks of other lanes while at least one of those lanes works: communication that nothing hides.
  int64_t exposed_ns = 0;
  // The compute lane idles although what its next task waits for is done, or while no lane does anything: the executor's and the
  // system's.
  int64_t overhead_ns = 0;
};

StepSummary Summarise(const Graph& graph, const StepRecord& record);

}  // namespace shoal
