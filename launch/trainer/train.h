// The training loop of one rank: reads like a recipe. What it calls is elsewhere: the step in step.h, data in models/data,
// reports in launch/status, checkpoints in launch/checkpoint.
#pragma once

#include "launch/agent/environment.h"
#include "launch/config/config.h"

namespace shoal {

// Trains as this process's rank of the job, blocking until the run is over. Collective over all ranks. Takes SIGUSR1 (save) and,
// once it trains, SIGTERM (save and end) for the job, whichever rank gets them. ABORTED: another
// rank ended the epoch; the message names it. CANCELLED: as asked by SIGTERM, in order and on all ranks after the same step; the
// message says whether it is saved. Other codes: what this rank met (data, disk, configuration, loss not finite).
absl::Status TrainRank(const LoadedConfig& loaded, const RankEnvironment& environment);

}  // namespace shoal
