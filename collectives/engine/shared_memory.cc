#include "collectives/engine/shared_memory.h"

#include <algorithm>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kAlignment = 128;  // Two cache lines: the unit in which processors prefetch.
constexpr int64_t kArenaBytes = 2 << 20;
constexpr int64_t kSmallMax = 256 << 10;
constexpr int64_t kAwaitNs = 5'000'000;

}  // namespace

absl::StatusOr<std::shared_ptr<Segment>> SharedMemory::NewSegment(int64_t bytes) {
  uint32_t id = 0;
  {
    MutexLock lock(&mutex_);
    if (fenced_) return absl::AbortedError("the epoch is over");
    id = ++last_id_;
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment, Segment::Create(id, bytes));
  // The last user may outlive this object.
  std::weak_ptr<SharedMemory> memory = weak_from_this();
  std::shared_ptr<Segment> shared(segment.release(), [memory](Segment* done) {
    if (std::shared_ptr<SharedMemory> alive = memory.lock()) alive->Forget(done);
    delete done;
  });
  MutexLock lock(&mutex_);
  if (fenced_) {
    shared->MakePrivate();
  } else {
    own_[shared->base()] = shared.get();
    announcer_.added(*shared);
  }
  return shared;
}

void SharedMemory::Forget(Segment* segment) {
  MutexLock lock(&mutex_);
  if (own_.erase(segment->base()) == 1 && !fenced_) announcer_.freed(segment->id());
}

absl::StatusOr<std::shared_ptr<void>> SharedMemory::Allocate(int64_t bytes) {
  if (bytes > kSmallMax) {
    SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<Segment> segment, NewSegment(bytes));
    std::byte* base = segment->base();
    return std::shared_ptr<void>(std::move(segment), base);
  }
  const int64_t piece = std::max<int64_t>((bytes + kAlignment - 1) / kAlignment, 1) * kAlignment;
  std::shared_ptr<Segment>
      fresh;  // Also holds the old arena until the lock is released: its end takes the lock.
  while (true) {
    {
      MutexLock lock(&mutex_);
      if (fresh != nullptr) {
        arena_.swap(fresh);
        arena_used_ = 0;
      }
      if (arena_ != nullptr && arena_used_ + piece <= arena_->bytes()) {
        std::byte* base = arena_->base() + arena_used_;
        arena_used_ += piece;
        return std::shared_ptr<void>(arena_, base);
      }
    }
    SHOAL_ASSIGN_OR_RETURN(fresh, NewSegment(kArenaBytes));
  }
}

SharedMemory::Place SharedMemory::Locate(const void* data, int64_t bytes) {
  const auto* begin = static_cast<const std::byte*>(data);
  MutexLock lock(&mutex_);
  auto next = own_.upper_bound(begin);
  if (next == own_.begin()) return {};
  const Segment& segment = *std::prev(next)->second;
  if (!segment.Contains(data, bytes)) return {};
  return {segment.id(), begin - segment.base()};
}

absl::Status SharedMemory::AddPeerSegment(int rank, uint32_t id, int64_t bytes, Fd fd) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment, Segment::Map(id, bytes, std::move(fd)));
  {
    MutexLock lock(&mutex_);
    peers_[rank][id] = std::move(segment);
  }
  announced_.NotifyAll();
  return absl::OkStatus();
}

void SharedMemory::RemovePeerSegment(int rank, uint32_t id) {
  MutexLock lock(&mutex_);
  // After the end an operation of this rank may still be reading there.
  if (!fenced_) peers_[rank].erase(id);
}

absl::StatusOr<std::byte*> SharedMemory::FindPeer(int rank, Place place, int64_t bytes) {
  MutexLock lock(&mutex_);
  const auto found = peers_[rank].find(place.segment);
  if (found == peers_[rank].end()) return static_cast<std::byte*>(nullptr);
  const Segment& segment = *found->second;
  if (place.offset < 0 || bytes < 0 || place.offset + bytes > segment.bytes()) {
    return absl::OutOfRangeError(absl::StrCat("rank ", rank, " points past the end of its shared memory"));
  }
  return segment.base() + place.offset;
}

void SharedMemory::AwaitAnnouncement() {
  MutexLock lock(&mutex_);
  announced_.WaitUntil(&mutex_, SteadyTime(NowNs() + kAwaitNs));
}

void SharedMemory::Fence() {
  MutexLock lock(&mutex_);
  if (fenced_) return;
  fenced_ = true;
  for (const auto& [base, segment] : own_) segment->MakePrivate();
}

}  // namespace shoal
