#include "launch/trainer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace shoal {

double LearningRate(const Config& config, int64_t step) {
  const Scheduler& scheduler = config.scheduler();
  const double peak = config.optimizer().lr(), low = scheduler.min_lr();
  const int64_t warmup = scheduler.warmup_steps();
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (scheduler.kind() == "constant") return peak;
  const int64_t end = scheduler.decay_steps();
  if (step >= end) return low;
  // wsd stays at the peak until its last part.
  const int64_t begin =
      scheduler.kind() == "wsd" ? std::max(warmup, end - scheduler.wsd_decay_steps()) : warmup;
  if (step < begin) return peak;
  const double progress = static_cast<double>(step - begin) / static_cast<double>(std::max<int64_t>(1, end - begin));
  if (scheduler.kind() == "cosine") return low + 0.5 * (peak - low) * (1 + std::cos(std::numbers::pi * progress));
  return low + (peak - low) * (1 - progress);
}

}  // namespace shoal
