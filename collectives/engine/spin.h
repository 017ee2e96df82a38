// Waiting for another core without sleeping, for as long as that is likely to pay: a peer on another core
// answers within a few hundred nanoseconds; with more ranks than cores only yielding lets it run at all;
// waking a sleeper costs 25 us.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>

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
  // `crowded`: the peer may need this core.
  explicit Spinner(bool crowded) : crowded_(crowded) {}

  // True as soon as `ready()` is. False: it is time to sleep, or `until_ns` has passed.
  template <class Ready>
  bool Spin(const Ready& ready, int64_t until_ns) {
    for (int i = 0; i < (crowded_ ? kTightCrowded : kTight); ++i) {
      if (ready()) return true;
    }
    if (!crowded_) {
      for (int i = 0; i < kPauses; ++i) {
        CpuPause();
        if (ready()) return true;
      }
    }
    const int64_t begin_ns = NowNs();
    const int64_t end_ns = std::min(begin_ns + yield_ns_, until_ns);
    for (int64_t now_ns = begin_ns; now_ns < end_ns; now_ns = NowNs()) {
      sched_yield();
      if (ready()) {
        yield_ns_ = std::clamp(4 * (now_ns - begin_ns), yield_ns_, kYieldMaxNs);
        return true;
      }
    }
    yield_ns_ = std::max(yield_ns_ / 2, kYieldMinNs);
    return ready();
  }

 private:
  static constexpr int kTight = 64;
  static constexpr int kTightCrowded = 2;
  static constexpr int kPauses = 100;
  static constexpr int64_t kYieldMinNs = 20'000;
  static constexpr int64_t kYieldMaxNs = 200'000;

  const bool crowded_;
  int64_t yield_ns_ = kYieldMaxNs;
};

}  // namespace shoal
