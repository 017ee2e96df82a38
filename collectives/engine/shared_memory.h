// The memory that this rank shares with peers on its host: its own segments, and the peers' ones as they
// announce them. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "collectives/transport/segment.h"
#include "runtime/base/mutex.h"

namespace shoal {

class SharedMemory : public std::enable_shared_from_this<SharedMemory> {
 public:
  // Tells the peers about a new segment, or that one is no longer used. Called with a lock held: must not
  // block.
  struct Announcer {
    std::function<void(const Segment&)> added;
    std::function<void(uint32_t id)> freed;
  };

  // `ranks`: of the whole job.
  SharedMemory(int ranks, Announcer announcer) : announcer_(std::move(announcer)), peers_(ranks) {}

  // A segment of its own. RESOURCE_EXHAUSTED as Segment::Create.
  absl::StatusOr<std::shared_ptr<Segment>> NewSegment(int64_t bytes);
  // Zeroed, 128-byte aligned; small pieces share a segment.
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes);

  struct Place {
    uint32_t segment = 0;  // 0: not shared memory.
    int64_t offset = 0;
  };
  // Where the bytes lie in this rank's segments.
  Place Locate(const void* data, int64_t bytes);

  absl::Status AddPeerSegment(int rank, uint32_t id, int64_t bytes, Fd fd);
  void RemovePeerSegment(int rank, uint32_t id);
  // Null while the peer's announcement has not arrived (it was sent before the peer used the memory).
  // OUT_OF_RANGE: the segment is smaller.
  absl::StatusOr<std::byte*> FindPeer(int rank, Place place, int64_t bytes);
  // Returns when an announcement arrives, at the latest after a few milliseconds.
  void AwaitAnnouncement();

  // The epoch ended: cuts this rank's memory off from the peers' writes, keeps theirs mapped, announces
  // nothing any more.
  void Fence();

 private:
  void Forget(Segment* segment);

  Mutex mutex_;
  CondVar announced_;
  Announcer announcer_ ABSL_GUARDED_BY(mutex_);
  bool fenced_ ABSL_GUARDED_BY(mutex_) = false;
  uint32_t last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<const std::byte*, Segment*> own_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<Segment> arena_ ABSL_GUARDED_BY(mutex_);  // Where small pieces are cut from.
  int64_t arena_used_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<absl::flat_hash_map<uint32_t, std::unique_ptr<Segment>>> peers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
