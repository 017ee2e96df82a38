// Devices that this machine does not have, for experiments with more ranks than processors: tasks that are products of matrices take
// at least what their operations take at a rate; the thread sleeps the rest, and other ranks or the links have the processor.
// The arithmetic is done all the same.
#pragma once

#include "launch/trainer/step.h"
#include "models/model_config.h"

namespace shoal {

struct EmulatedDevice {
  double gflops = 4;
  double task_us = 30;  // Of each such task, beside its operations.
};

// For RankModel::Options. Sequences have `seq` tokens.
RankModel::Pace PaceOf(const EmulatedDevice& device, const ModelConfig& model, int64_t seq);

}  // namespace shoal
