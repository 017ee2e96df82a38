// Steps as a trace that ui.perfetto.dev and chrome://tracing show: a process per rank, a thread per lane, and beside it, where a
// prediction is given, a process with the predicted tasks. Pure.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"

namespace shoal {

struct RankTrace {
  int rank = 0;
  std::string host;      // May be empty.
  int64_t clock_ns = 0;  // To be added to the rank's times for those of the clock that all share.
  StepRecord measured;
  StepRecord predicted;  // From any begin: shown from when the measured step began. No tasks: not shown.
};

// {"traceEvents": [...]}, in microseconds of the shared clock, so that the events of several steps make one trace. Arguments of a
// task: its cost key, its units and, where a prediction is given, predicted_us.
std::string TraceJson(const Graph& graph, int64_t step, absl::Span<const RankTrace> ranks);

// One trace of several. INVALID_ARGUMENT: one is no trace.
absl::StatusOr<std::string> JoinTraces(absl::Span<const std::string> traces);

}  // namespace shoal
