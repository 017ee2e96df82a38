// What the members of one group that share a host keep in shared memory: a segment per member, which that
// member alone writes (but for its doorbell) and the others read. Messages (engine/shm/shm_channel.h) and tiny
// operations (engine/shm/tiny.h) go through it.
//
// Lending. Members also write to memory that others lend them, and nobody may write there any more when its owner
// has gone on without him. So:
//   - A writer, for each piece: sets `writing` in its page; looks whether anybody has set `ended`, and if so
//     clears `writing` and never writes again; writes; clears `writing`.
//   - Who ends the group sets `ended`; then it sees `writing` clear, once, in the page of each member that it has
//     lent memory to. That is before anybody learns of the end (Fence).
// Both set and look in one order for all (sequentially consistent): either the writer sees `ended`, or its owner
// sees `writing` and waits until what was written is there. Whoever was seen with `writing` clear cannot begin
// again without seeing `ended`. A member that stays at `writing` is waited for no longer than kPatienceNs. It is
// either dead, and the kernel makes sure that it writes no more; or stopped, and its one piece is cut off: those pages
// become this process's own (SharedMemory::CutOff), before anybody learns of the end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/engine/group_life.h"
#include "collectives/engine/shm/shared_memory.h"
#include "runtime/base/mutex.h"

namespace shoal {

constexpr int kHostRanksMax = 256;  // Of one group on one host.

struct GroupPage;  // The layout of a member's segment: engine/shm/group_page.h.

// Members are counted by seat here: their position among the members on this host.
class HostGroup final : public Sleeper {
 public:
  // `members`: the indices in the group of those on this host, ascending, this process among them. Waits for
  // the others, until `deadline_ns`. DEADLINE_EXCEEDED names who did not come; RESOURCE_EXHAUSTED: too little
  // shared memory or too many members; ABORTED: the group ended, or a member left before it came. The caller ends the
  // group then. `left`: whether a member of the group will do nothing any more; null: none ever does.
  static absl::StatusOr<std::shared_ptr<HostGroup>> Create(std::shared_ptr<SharedMemory> memory,
                                                           std::shared_ptr<GroupLife> life,
                                                           std::vector<int> members, int64_t deadline_ns,
                                                           const std::function<bool(int member)>& left = nullptr);
  ~HostGroup() override;

  // The group is over: from now on no peer trusts what it read in this process's buffers, nor waits for it.
  // Wakes who sleeps in the peers. Waits for writers as said above.
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

  // What this process lends to a seat, from now until EndLoan, with SharedMemory::Cuts() from before it was found to
  // be shared. False: the group is over.
  struct Loan {
    int seat = 0;
    const std::byte* data = nullptr;
    int64_t bytes = 0;
    uint64_t cuts = 0;
  };
  bool Lend(const Loan& loan);
  // The seat has given it back. False: another group had to cut it off, so that what was written may be missing.
  bool EndLoan(int seat, const std::byte* data);
  // Around each write to what this process has borrowed, by one thread at a time; of each view the same bytes. False:
  // somebody has ended the group; of Begin: nothing may be written; of End: what was read does not count.
  bool BeginWrite(int64_t begin, int64_t bytes);
  bool EndWrite();

  // Sharing cores. Ranks that yield to each other look busy, not crowded, to the system, which may leave them together for
  // long while another core idles. So each says where it waits, and one that waits on a fuller core than another that it
  // may use moves there.
  void WaitsHere(int64_t now_ns);
  // Whether the seat last waited on the core of this thread.
  bool IsHere(int seat) const;
  // Somebody computes on this core, who is in no page: for a while the system alone places this rank.
  void LeavePlacement(int64_t now_ns);

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
  absl::Status FindPeers(int64_t deadline_ns, const std::function<bool(int member)>& left);
  bool FindPeer(int seat);
  bool AnyEnded() const;
  void AwaitWriters();
  bool AwaitWriter(int seat, int64_t until_ns) const;
  bool StopDying(int seat) const;

  const std::shared_ptr<SharedMemory> memory_;
  const std::shared_ptr<GroupLife> life_;
  const std::vector<int> members_;
  int own_ = 0;
  bool crowded_ = false;
  bool joined_ = false;
  bool sleepers_pay_ = false;  // Who goes to sleep has the kernel order everybody's memory accesses.
  std::vector<std::shared_ptr<const Segment>> segments_;  // By seat.
  std::vector<GroupPage*> pages_;

  Mutex loans_mutex_;
  bool fenced_ ABSL_GUARDED_BY(loans_mutex_) = false;  // Nothing is lent any more.
  std::vector<Loan> loans_ ABSL_GUARDED_BY(loans_mutex_);

  std::atomic<int64_t> place_ns_{0};  // WaitsHere moves nobody before.
};

}  // namespace shoal
