// Traces of steps over all ranks (parallel/schedule/trace.h), on the clock of rank 0. Collective over all ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"

namespace shoal {

// What must be added to this rank's clock for rank 0's: from the quickest of some questions and answers, wrong by at most half of
// the time that it took (Cristian 1989), some 10 us between hosts. `now_ns`: the clock.
absl::StatusOr<int64_t> ClockOffset(Communicator& world, const std::function<int64_t()>& now_ns);

// The trace of a step (TraceJson) on rank 0, "" elsewhere. Graphs are equal on all ranks; `predicted` has no tasks where nothing
// was predicted, on all ranks alike.
absl::StatusOr<std::string> GatherTrace(int64_t step, const Graph& graph, const StepRecord& measured, const StepRecord& predicted,
                                        Communicator& world);

}  // namespace shoal
