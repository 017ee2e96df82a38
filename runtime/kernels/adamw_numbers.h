// What AdamW reads and ClipGradients writes in memory of a stream (optimizer.h), for kernels too.
#pragma once

#include <cstdint>

namespace shoal::kernels {

// Places in f64 [kAdamWNumbers].
enum AdamWNumber : int64_t {
  kLearningRate,
  kStepSize,   // learning_rate / (1 - beta1^update)
  kRootScale,  // 1 / sqrt(1 - beta2^update)
  kGradScale,  // An f32.
  kApply,      // 0: the update does nothing.
  kGradNorm,   // Before clipping.
  kAdamWNumbers,
};

}  // namespace shoal::kernels
