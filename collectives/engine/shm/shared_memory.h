// The memory that this process shares with peers on its host: its own segments, which live as long as their
// users and are announced to the peers of every epoch, and the segments that the peers of one epoch
// announced. Peers may write to what a rank lends them (engine/shm/host_group.h). Thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "collectives/transport/segment.h"
#include "runtime/base/mutex.h"

namespace shoal {

class SharedMemory : public std::enable_shared_from_this<SharedMemory> {
 public:
  // Tells the peers about a new segment, or that one is no longer used. Called with a lock held: must not
  // block. RESOURCE_EXHAUSTED: no descriptors are left.
  struct Announcer {
    std::function<absl::Status(const Segment&)> added;
    std::function<void(uint64_t id)> freed;
  };

  // One epoch's view of the process's memory. `ranks`: of the whole job. Announces what exists already.
  SharedMemory(int ranks, Announcer announcer);
  ~SharedMemory();

  // A segment of its own. RESOURCE_EXHAUSTED as Segment::Create.
  absl::StatusOr<std::shared_ptr<Segment>> NewSegment(int64_t bytes);
  // Memory of one group of this epoch, which peers find and may write under GroupSegmentId(key). Takes no
  // descriptor for longer than the announcement. ABORTED: the epoch is over.
  absl::StatusOr<std::shared_ptr<Segment>> NewGroupSegment(uint64_t key, int64_t bytes);
  static uint64_t GroupSegmentId(uint64_t key) { return key | kGroupBit; }
  // Zeroed, 128-byte aligned; small pieces share a segment.
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes);

  struct Place {
    uint64_t segment = 0;  // 0: not shared memory.
    int64_t offset = 0;
  };
  // Where the bytes lie in this process's segments.
  static Place Locate(const void* data, int64_t bytes);
  // As Locate: the whole segment that contains the bytes; `base` null: none. Right until Forgotten() changes.
  struct Extent {
    const std::byte* base = nullptr;
    int64_t bytes = 0;
    uint64_t segment = 0;
  };
  static Extent Surrounding(const void* data, int64_t bytes);
  // Counts the own segments that are gone. Cheap.
  static uint64_t Forgotten();

  // Takes the pages of these bytes away from peers that would write to them at a wrong time: they hold what they hold, in
  // memory of this process alone, and the segment around them counts as not shared any more.
  static void CutOff(const std::byte* data, int64_t bytes);
  // Counts the calls of CutOff. Cheap.
  static uint64_t Cuts();
  // Whether one of them, after the first `since`, took pages of these bytes.
  static bool WasCutOff(const std::byte* data, int64_t bytes, uint64_t since);

  absl::Status AddPeerSegment(int rank, uint64_t id, int64_t bytes, Fd fd);
  void RemovePeerSegment(int rank, uint64_t id);
  // Null while the peer's announcement has not arrived (it was sent before the peer used the memory).
  std::shared_ptr<const Segment> FindPeerSegment(int rank, uint64_t id);
  // The ranks that have announced memory, and this one.
  int RanksOnHost();
  // Counts the peers' segments that are gone: who keeps some looks now and then. Cheap.
  uint64_t Removed() const { return removed_.load(std::memory_order_acquire); }
  // OUT_OF_RANGE: the segment is smaller.
  absl::StatusOr<std::byte*> FindPeer(int rank, Place place, int64_t bytes);
  // Returns when an announcement arrives, at the latest after a few milliseconds.
  void AwaitAnnouncement();

  // The epoch ended: keeps the peers' memory mapped, announces nothing any more.
  void Fence();

 private:
  static constexpr uint64_t kGroupBit = uint64_t{1} << 63;
  friend class OwnSegments;

  Announcer announcer_;  // Used by OwnSegments, under its lock.
  Mutex mutex_;
  CondVar announced_;
  bool fenced_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<uint64_t> removed_{0};
  std::set<int> ranks_on_host_ ABSL_GUARDED_BY(mutex_);
  std::vector<absl::flat_hash_map<uint64_t, std::shared_ptr<Segment>>> peers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
