// Measures training steps: `shoal bench train`.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "launch/agent/environment.h"
#include "launch/config/config.h"
#include "launch/trainer/emulated_device.h"

namespace shoal {

struct BenchOptions {
  int64_t warmup = 5;
  int64_t steps = 20;
  bool json = false;  // One line of JSON instead of a table.
  std::optional<EmulatedDevice> device;  // In place of this machine's processors.
};

// Order statistics of step times. Pure; `seconds` is not empty.
struct StepTimes {
  double median = 0, p10 = 0, p90 = 0, best = 0;
};
StepTimes Summarize(std::vector<double> seconds);

// As this process's rank: verifies that the loss is finite and falls or stays on one batch, then times steps. Rank 0
// prints to stdout: tokens/s, GFLOP/s and the share of the GEMM peak measured in the same run, phases, memory. Collective.
absl::Status BenchRank(const LoadedConfig& loaded, const RankEnvironment& environment, const BenchOptions& options);

}  // namespace shoal
