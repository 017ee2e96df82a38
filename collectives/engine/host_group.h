// What the members of one group that share a host keep in shared memory: a segment per member, which that
// member alone writes (but for its doorbell) and the others read. Messages (engine/shm_channel.h) and tiny
// operations (engine/tiny.h) go through it. A process that was stopped and comes back late finds only its own
// memory to write to.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/engine/group_life.h"
#include "collectives/engine/shared_memory.h"

namespace shoal {

constexpr int kHostRanksMax = 256;  // Of one group on one host.

struct GroupPage;  // The layout of a member's segment: engine/group_page.h.

// Members are counted by seat here: their position among the members on this host.
class HostGroup final : public Sleeper {
 public:
  // `members`: the indices in the group of those on this host, ascending, this process among them. Waits for
  // the others, until `deadline_ns`. DEADLINE_EXCEEDED names who did not come; RESOURCE_EXHAUSTED: too little
  // shared memory or too many members; ABORTED: the group ended. The caller ends the group then.
  static absl::StatusOr<std::shared_ptr<HostGroup>> Create(std::shared_ptr<SharedMemory> memory,
                                                           std::shared_ptr<GroupLife> life,
                                                           std::vector<int> members, int64_t deadline_ns);
  ~HostGroup() override;

  // The group is over: from now on no peer trusts what it read in this process's buffers, nor waits for it.
  // Wakes who sleeps in the peers.
  void Fence(const std::string& cause) override;
  void Wake() override { RingOwn(); }

  int seats() const { return static_cast<int>(members_.size()); }
  int own_seat() const { return own_; }
  int member(int seat) const { return members_[seat]; }  // Its index in the group.
  int SeatOf(int member) const;                          // -1: on another host.
  GroupPage& page(int seat) const { return *pages_[seat]; }
  SharedMemory& memory() const { return *memory_; }
  GroupLife& life() const { return *life_; }
  // More ranks than cores: whoever waits lets others run at once.
  bool crowded() const { return crowded_; }

  // OK, or ABORTED because the group ended here or in a peer (which ends it here too).
  absl::Status CheckAlive();
  // Of one peer: OK if what this thread has read in the peer's memory before the call is what the peer meant
  // to be read.
  absl::Status CheckPeer(int seat);

  // Sleeping. A thread that is about to sleep announces it, looks once more, and sleeps; peers ring after
  // they wrote.
  uint32_t PrepareSleep();  // Returns what Sleep wants.
  void Sleep(uint32_t seen, int64_t until_ns);
  void CancelSleep();
  uint32_t Sleepers() const;    // Of this process, for tests.
  void RingOwn();               // Thread-safe.
  void RingIfAsleep(int seat);  // After what the peer is to see was written.
  // Needed once between the writes and the calls of RingIfAsleep: either we see the sleeper or it sees what
  // we wrote.
  void OrderBeforeRing() const {
    if (sleepers_pay_) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
    } else {
      std::atomic_thread_fence(std::memory_order_seq_cst);
    }
  }

 private:
  HostGroup(std::shared_ptr<SharedMemory> memory, std::shared_ptr<GroupLife> life, std::vector<int> members);
  absl::Status FindPeers(int64_t deadline_ns);
  bool FindPeer(int seat);

  const std::shared_ptr<SharedMemory> memory_;
  const std::shared_ptr<GroupLife> life_;
  const std::vector<int> members_;
  int own_ = 0;
  bool crowded_ = false;
  bool joined_ = false;
  bool sleepers_pay_ = false;  // Who goes to sleep has the kernel order everybody's memory accesses.
  std::vector<std::shared_ptr<const Segment>> segments_;  // By seat.
  std::vector<GroupPage*> pages_;
};

}  // namespace shoal
