#include "collectives/membership/setbacks.h"

#include <algorithm>
#include <utility>

namespace shoal {
namespace {

constexpr int kLacksAtOnce = 1;        // So many epochs may end by what this process lacks before it stands back.
constexpr int kDelayDoublingsMax = 4;  // Of the heartbeat timeout.

}  // namespace

int Setbacks::OnLack() {
  if (std::exchange(counted_, true)) return 0;
  return std::max(++lacks_ - kLacksAtOnce, 0);
}

void Setbacks::OnLeft() {
  if (std::exchange(entered_, false) && !counted_) lacks_ = 0;
}

absl::Duration RejoinDelay(absl::Duration heartbeat_timeout, int times) {
  if (times == 0) return absl::ZeroDuration();
  return heartbeat_timeout * (1 << std::min(times - 1, kDelayDoublingsMax));
}

}  // namespace shoal
