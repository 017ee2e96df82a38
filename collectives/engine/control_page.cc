#include "collectives/engine/control_page.h"

#include <algorithm>

#include "runtime/base/status.h"

namespace shoal {

absl::StatusOr<ControlBlock*> ControlSlots::Claim(uint64_t key) {
  MutexLock lock(&mutex_);
  ControlBlock* block = nullptr;
  const auto free = std::find_if(retired_.begin(), retired_.end(), [](const Retired& retired) {
    const uint64_t old_key = retired.block->key.load(std::memory_order_relaxed);
    return std::all_of(retired.peers.begin(), retired.peers.end(), [old_key](const ControlBlock* peer) {
      return peer->key.load(std::memory_order_acquire) != old_key ||
             peer->closed.load(std::memory_order_acquire) != 0;
    });
  });
  if (free != retired_.end()) {
    block = free->block;
    retired_.erase(free);
  } else if (used_ < kGroupsMax) {
    block = &page_->blocks[used_++];
  } else {
    return absl::ResourceExhaustedError(absl::StrCat(kGroupsMax, " groups are alive"));
  }
  block->arrived.store(0, std::memory_order_relaxed);
  block->sleepers.store(0, std::memory_order_relaxed);
  block->closed.store(0, std::memory_order_relaxed);
  block->key.store(key, std::memory_order_release);
  return block;
}

void ControlSlots::Retire(ControlBlock* block, std::vector<ControlBlock*> peers) {
  block->closed.store(1, std::memory_order_release);
  MutexLock lock(&mutex_);
  retired_.push_back({block, std::move(peers)});
}

}  // namespace shoal
