// The learning rate over time. Pure.
#pragma once

#include "launch/config/config.pb.h"

namespace shoal {

// Of step `step`, counted from 0, of a resolved configuration: linear warm-up, lr * (step + 1) / warmup_steps while step <
// warmup_steps; then the decay of scheduler.kind, which reaches min_lr at decay_steps and stays there.
double LearningRate(const Config& config, int64_t step);

}  // namespace shoal
