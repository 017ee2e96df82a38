// Waiting for another core without sleeping, for as long as that is likely to pay: a peer on another core
// answers within a few hundred nanoseconds; with more ranks than cores only yielding lets it run at all;
// waking a sleeper costs 25 us.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>

#include "collectives/engine/shm/host_group.h"
#include "collectives/transport/clock.h"

namespace shoal {

inline void CpuPause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Of one waiting thread. Learns from its waits whether yielding pays.
class Spinner {
 public:
  explicit Spinner(HostGroup* group) : group_(group) {}

  // True as soon as `ready()` is. False: it is time to sleep, or `until_ns` has passed.
  template <class Ready>
  bool Spin(const Ready& ready, int64_t until_ns) {
    const bool crowded = group_->crowded();
    for (int i = 0; i < (crowded ? kTightCrowded : kTight); ++i) {
      if (ready()) return true;
    }
    if (!crowded) {
      for (int i = 0; i < kPauses; ++i) {
        CpuPause();
        if (ready()) return true;
      }
    }
    return Yield(ready, until_ns) || ready();
  }

 private:
  static constexpr int kTight = 64;
  static constexpr int kTightCrowded = 2;
  static constexpr int kPauses = 100;
  static constexpr int64_t kYieldMinNs = 20'000;
  static constexpr int64_t kYieldMaxNs = 200'000;
  // Longer turns than those of ranks that wait are of somebody who computes on this core.
  static constexpr int64_t kTurnMaxNs = 1'000'000;

  template <class Ready>
  bool Yield(const Ready& ready, int64_t until_ns) {
    const int64_t begin_ns = NowNs();
    group_->WaitsHere(begin_ns);
    const int64_t end_ns = std::min(begin_ns + yield_ns_, until_ns);
    for (int64_t now_ns = begin_ns; now_ns < end_ns;) {
      const int64_t left_ns = now_ns;
      sched_yield();
      const bool is_ready = ready();
      now_ns = NowNs();
      if (now_ns - left_ns > kTurnMaxNs) group_->LeavePlacement(now_ns);
      if (is_ready) {
        yield_ns_ = std::clamp(4 * (left_ns - begin_ns), yield_ns_, kYieldMaxNs);
        return true;
      }
    }
    yield_ns_ = std::max(yield_ns_ / 2, kYieldMinNs);
    return false;
  }

  HostGroup* const group_;
  int64_t yield_ns_ = kYieldMaxNs;
};

}  // namespace shoal
