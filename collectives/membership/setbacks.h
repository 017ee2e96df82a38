// How a process takes its time with epochs that it cannot work in: what it lacks (descriptors, memory) ends them for all
// others too. Decisions alone; seat.h carries them out. Not thread-safe.
#pragma once

#include "absl/time/time.h"

namespace shoal {

class Setbacks {
 public:
  // An epoch has formed with this process in it.
  void OnFormed() { counted_ = entered_ = false; }
  // Its caller works in it.
  void OnEntered() { entered_ = true; }
  // It is over by what this process lacked; counts once. Returns how long this process is to stand back, as RejoinDelay
  // counts; 0: not at all. One such epoch may be bad luck, but who lacks something is likely to lack it again.
  int OnLack();
  // It is over, for another reason.
  void OnLeft();

 private:
  int lacks_ = 0;  // Epochs in a row.
  bool counted_ = false;
  bool entered_ = false;
};

// How long a process waits before it joins again after the `times`-th setback in a row, doubling up to a bound, as each
// attempt costs all others an epoch. 0: not at all.
absl::Duration RejoinDelay(absl::Duration heartbeat_timeout, int times);

}  // namespace shoal
