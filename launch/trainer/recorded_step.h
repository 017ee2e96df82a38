// Which training steps are recorded as a graph of the device, and done again by one call (CUDA graphs): steps whose launches are the
// same each time, because none of them depends on what the step computes.
#pragma once

#include <cstdint>
#include <optional>

#include "launch/trainer/routing_sums.h"
#include "launch/trainer/stream_lanes.h"
#include "runtime/device/stream.h"

namespace shoal {

enum class StepWay : uint8_t {
  kRun,     // The host puts each launch on its stream.
  kRecord,  // The same, recorded; then as kReplay.
  kReplay,  // All launches by one call.
};

struct StepFacts {
  bool wanted = false;             // schedule.device_graphs, and recording has not failed.
  bool on_device = false;
  int ranks = 1;                   // Between several the host drives what they tell each other.
  bool routes_on_stream = false;   // Else the host plans rows by what routers counted.
  bool observed = false;           // Somebody looks at gradients before the update.
  bool ran = false;                // A step of this schedule, with tokens of this shape, was run: memory and libraries are set up.
  bool recorded = false;           // One was recorded.
};
// Pure: the one place that decides.
StepWay WayOf(const StepFacts& facts);

// Members end in the order that the graph needs: what it left for the host before it, the events that it records after it.
struct RecordedStep {
  RecordedStep(const Graph& tasks, Stream& compute, Stream& copy) : lanes(tasks, compute, copy, Timing::kYes) {}

  StreamLanes lanes;
  StepRecord record;  // Units of tasks; times are each launch's own.
  CapturedGraph graph;
  std::optional<StepRouting> routing;
};

}  // namespace shoal
