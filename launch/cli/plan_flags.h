// What the commands that predict share: flags, and a configuration as the planner sees it.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "launch/cli/flags.h"
#include "launch/config/config.h"
#include "parallel/planner/cluster.h"
#include "parallel/planner/layout.h"
#include "parallel/planner/model_shape.h"
#include "parallel/schedule/scheduler.h"

namespace shoal {

struct PlanFlags {
  std::string config, cluster;
  std::vector<std::string> overrides;
  int64_t ranks = 0;
  double skew = 0;
  int64_t seed = 0;
};

// Declares CONFIG, --cluster, --set, --ranks, --skew and --seed; `values` is borrowed until Parse().
void AddPlanFlags(FlagSet* flags, PlanFlags* values);

struct PlanInputs {
  LoadedConfig config;
  Cluster cluster;
  ModelShape model;
  LoadSkew skew;
};
// Reads both files. INVALID_ARGUMENT, NOT_FOUND: what is wrong with them, or a number of ranks that the cluster has not.
absl::StatusOr<PlanInputs> LoadPlanInputs(const PlanFlags& flags);

// Of a resolved configuration.
ModelShape ModelShapeOf(const Config& config);
StepLayout LayoutOf(const Config& config, int ranks);
SchedulerOptions SchedulerOptionsOf(const Config& config);

}  // namespace shoal
