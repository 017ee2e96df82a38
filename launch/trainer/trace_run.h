// A short training run for its trace: `shoal trace`. Leaves nothing behind but the trace.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "launch/agent/environment.h"
#include "launch/config/config.h"
#include "launch/trainer/emulated_device.h"

namespace shoal {

struct TraceOptions {
  int64_t steps = 5;  // The profiler learns from the first ones.
  int64_t traced = 2;  // The last ones.
  std::string path;
  std::optional<EmulatedDevice> device;  // In place of this machine's processors.
};

// As this process's rank, collective: trains `steps` steps from random weights. Rank 0 writes the trace to `path` and prints where
// the time of steps went and what their tasks cost.
absl::Status TraceRank(const LoadedConfig& loaded, const RankEnvironment& environment, const TraceOptions& options);

}  // namespace shoal
