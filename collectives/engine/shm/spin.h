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

// Moves this thread off a core that it shares with the peer whose answers it waits for. Two that yield to each other look
// busy, not crowded, to the system, which may leave them together for long while another core idles: 2.5 us an exchange instead
// of 0.2.
class CoreSharing {
 public:
  // After each wait that came to yielding. `at_once`: the first yield brought the answer, so the peer ran right here.
  static void Note(bool at_once, int64_t now_ns) {
    thread_local int row = 0;
    thread_local int64_t moved_ns = 0;
    row = at_once ? row + 1 : 0;
    if (row < kRow || now_ns - moved_ns < kMoveNs) return;
    row = 0;
    moved_ns = now_ns;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    cpu_set_t others = allowed;
    CPU_CLR(sched_getcpu(), &others);
    if (CPU_COUNT(&others) == 0) return;
    if (sched_setaffinity(0, sizeof others, &others) == 0) (void)sched_setaffinity(0, sizeof allowed, &allowed);
  }

 private:
  static constexpr int kRow = 16;
  static constexpr int64_t kMoveNs = 10'000'000;
};

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
        if (!crowded_) CoreSharing::Note(/*at_once=*/now_ns == begin_ns, now_ns);
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
