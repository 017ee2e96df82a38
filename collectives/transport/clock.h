// The steady clock as plain nanoseconds, so that a deadline fits into one atomic.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace shoal {

constexpr int64_t kNeverNs = std::numeric_limits<int64_t>::max();

inline int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline std::chrono::steady_clock::time_point SteadyTime(int64_t ns) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}

// The steady instant that is as far away as `deadline` is on the wall clock.
inline int64_t SteadyDeadlineNs(absl::Time deadline) {
  if (deadline == absl::InfiniteFuture()) return kNeverNs;
  const absl::Duration left = deadline - absl::Now();
  if (left > absl::Hours(24 * 365)) return kNeverNs;
  if (left < -absl::Hours(1)) return NowNs();
  return NowNs() + absl::ToInt64Nanoseconds(left);
}

}  // namespace shoal
