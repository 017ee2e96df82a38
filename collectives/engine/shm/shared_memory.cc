#include "collectives/engine/shm/shared_memory.h"

#include <algorithm>
#include <map>
#include <set>

#include "collectives/transport/clock.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kAlignment = 128;  // Two cache lines: the unit in which processors prefetch.
constexpr int64_t kArenaBytes = 2 << 20;
constexpr int64_t kSmallMax = 256 << 10;
constexpr int64_t kAwaitNs = 5'000'000;

}  // namespace

// This process's segments, and the epochs whose peers hear of them. One per process, because tensors outlive
// epochs.
class OwnSegments {
 public:
  static OwnSegments& Get() {
    static auto* const own = new OwnSegments;  // Never destroyed: tensors may be freed at exit.
    return *own;
  }

  void Join(SharedMemory* epoch) {
    MutexLock lock(&mutex_);
    for (const auto& [base, own] : segments_) {
      if (!own.shared) continue;
      const absl::Status status = epoch->announcer_.added(*own.segment);
      if (!status.ok()) SHOAL_LOG(kError) << "shared memory stays unknown to the peers: " << status.message();
    }
    epochs_.insert(epoch);
  }

  void Leave(SharedMemory* epoch) {
    MutexLock lock(&mutex_);
    epochs_.erase(epoch);
  }

  absl::StatusOr<std::shared_ptr<Segment>> New(int64_t bytes) {
    const uint64_t id = last_id_.fetch_add(1, std::memory_order_relaxed) + 1;
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment, Segment::Create(id, bytes));
    std::shared_ptr<Segment> shared(segment.release(), [this](Segment* done) {
      Forget(*done);
      delete done;
    });
    MutexLock lock(&mutex_);  // Released before `shared`, whose end takes it.
    for (SharedMemory* epoch : epochs_)
      SHOAL_RETURN_IF_ERROR(epoch->announcer_.added(*shared), "announce it");
    segments_[shared->base()] = {shared.get()};
    return shared;
  }

  absl::Status Announce(SharedMemory* epoch, const Segment& segment) {
    MutexLock lock(&mutex_);
    if (epochs_.count(epoch) == 0) return absl::AbortedError("the epoch is over");
    return epoch->announcer_.added(segment);
  }

  void AnnounceFreed(const std::weak_ptr<SharedMemory>& epoch, uint64_t id) {
    const std::shared_ptr<SharedMemory> alive = epoch.lock();
    MutexLock lock(&mutex_);
    if (alive != nullptr && epochs_.count(alive.get()) != 0) alive->announcer_.freed(id);
  }

  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes) {
    const int64_t piece = std::max<int64_t>((bytes + kAlignment - 1) / kAlignment, 1) * kAlignment;
    std::shared_ptr<Segment> arena;  // Let go without the lock: its end takes it.
    for (bool fresh = false;; fresh = true) {
      {
        MutexLock lock(&mutex_);
        if (fresh) {
          arena_ = arena;
          arena_used_ = 0;
        } else {
          arena = arena_.lock();
        }
        if (arena != nullptr && arena_used_ + piece <= arena->bytes()) {
          std::byte* base = arena->base() + arena_used_;
          arena_used_ += piece;
          return std::shared_ptr<void>(std::move(arena), base);
        }
      }
      SHOAL_ASSIGN_OR_RETURN(arena, New(kArenaBytes));
    }
  }

  SharedMemory::Extent Surrounding(const void* data, int64_t bytes) {
    MutexLock lock(&mutex_);
    const Own* own = Find(data, bytes);
    if (own == nullptr || !own->shared) return {};
    return {own->segment->base(), own->segment->bytes(), own->segment->id()};
  }

  void CutOff(const std::byte* data, int64_t bytes) {
    std::shared_ptr<Segment> arena;  // Let go without the lock: its end takes it.
    MutexLock lock(&mutex_);
    Own* const own = Find(data, bytes);
    if (own == nullptr) return;
    Segment& segment = *own->segment;
    own->shared = false;
    arena = arena_.lock();
    if (arena.get() == &segment) arena_.reset();
    const absl::Status status = segment.MakePrivate(data - segment.base(), bytes);
    if (!status.ok()) {
      SHOAL_LOG(kError) << "a peer that stopped may write to " << bytes << " bytes when it runs again: " << status.message();
    }
    const int64_t page = segment.page_bytes();
    const int64_t begin = (data - segment.base()) / page * page;
    const int64_t end = (data - segment.base() + bytes + page - 1) / page * page;
    cut_.push_back({segment.base() + begin, segment.base() + end});
    // In this order: who sees the cut sees that the segment is not what it was.
    forgotten_.fetch_add(1, std::memory_order_acq_rel);
    cuts_.fetch_add(1, std::memory_order_acq_rel);
  }

  uint64_t Cuts() const { return cuts_.load(std::memory_order_acquire); }

  bool WasCutOff(const std::byte* data, int64_t bytes, uint64_t since) {
    MutexLock lock(&mutex_);
    return std::any_of(cut_.begin() + static_cast<int64_t>(since), cut_.end(), [&](const auto& cut) {
      return data < cut.second && cut.first < data + bytes;
    });
  }

  uint64_t Forgotten() const { return forgotten_.load(std::memory_order_acquire); }

 private:
  struct Own {
    Segment* segment = nullptr;
    bool shared = true;  // False: a part of it was cut off.
  };

  Own* Find(const void* data, int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto next = segments_.upper_bound(static_cast<const std::byte*>(data));
    if (next == segments_.begin()) return nullptr;
    Own& own = std::prev(next)->second;
    return own.segment->Contains(data, bytes) ? &own : nullptr;
  }

  void Forget(const Segment& segment) {
    forgotten_.fetch_add(1, std::memory_order_acq_rel);
    MutexLock lock(&mutex_);
    segments_.erase(segment.base());
    for (SharedMemory* epoch : epochs_) epoch->announcer_.freed(segment.id());
  }

  std::atomic<uint64_t> last_id_{0};
  std::atomic<uint64_t> forgotten_{0};
  Mutex mutex_;
  std::map<const std::byte*, Own> segments_ ABSL_GUARDED_BY(mutex_);  // By base.
  std::atomic<uint64_t> cuts_{0};
  std::vector<std::pair<const std::byte*, const std::byte*>> cut_ ABSL_GUARDED_BY(mutex_);  // All that ever were.
  std::set<SharedMemory*> epochs_ ABSL_GUARDED_BY(mutex_);
  std::weak_ptr<Segment> arena_ ABSL_GUARDED_BY(mutex_);  // Where small pieces are cut from.
  int64_t arena_used_ ABSL_GUARDED_BY(mutex_) = 0;
};

SharedMemory::SharedMemory(int ranks, Announcer announcer) : announcer_(std::move(announcer)), peers_(ranks) {
  OwnSegments::Get().Join(this);
}

SharedMemory::~SharedMemory() { Fence(); }

absl::StatusOr<std::shared_ptr<Segment>> SharedMemory::NewSegment(int64_t bytes) {
  return OwnSegments::Get().New(bytes);
}

absl::StatusOr<std::shared_ptr<Segment>> SharedMemory::NewGroupSegment(uint64_t key, int64_t bytes) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment, Segment::Create(GroupSegmentId(key), bytes));
  SHOAL_RETURN_IF_ERROR(OwnSegments::Get().Announce(this, *segment));
  segment->CloseDescriptor();
  // The last user may outlive this object.
  return std::shared_ptr<Segment>(segment.release(), [epoch = weak_from_this()](Segment* done) {
    OwnSegments::Get().AnnounceFreed(epoch, done->id());
    delete done;
  });
}

absl::StatusOr<std::shared_ptr<void>> SharedMemory::Allocate(int64_t bytes) {
  if (bytes <= kSmallMax) return OwnSegments::Get().Allocate(bytes);
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<Segment> segment, NewSegment(bytes));
  std::byte* base = segment->base();
  return std::shared_ptr<void>(std::move(segment), base);
}

SharedMemory::Extent SharedMemory::Surrounding(const void* data, int64_t bytes) {
  return OwnSegments::Get().Surrounding(data, bytes);
}

SharedMemory::Place SharedMemory::Locate(const void* data, int64_t bytes) {
  const Extent extent = Surrounding(data, bytes);
  if (extent.base == nullptr) return {};
  return {extent.segment, static_cast<const std::byte*>(data) - extent.base};
}

void SharedMemory::CutOff(const std::byte* data, int64_t bytes) { OwnSegments::Get().CutOff(data, bytes); }

uint64_t SharedMemory::Cuts() { return OwnSegments::Get().Cuts(); }

bool SharedMemory::WasCutOff(const std::byte* data, int64_t bytes, uint64_t since) {
  return OwnSegments::Get().WasCutOff(data, bytes, since);
}

uint64_t SharedMemory::Forgotten() { return OwnSegments::Get().Forgotten(); }

absl::Status SharedMemory::AddPeerSegment(int rank, uint64_t id, int64_t bytes, Fd fd) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment,
                         Segment::Map(id, bytes, std::move(fd), Segment::Access::kReadWrite));
  {
    MutexLock lock(&mutex_);
    peers_[rank][id] = std::move(segment);
    ranks_on_host_.insert(rank);
  }
  announced_.NotifyAll();
  return absl::OkStatus();
}

void SharedMemory::RemovePeerSegment(int rank, uint64_t id) {
  std::shared_ptr<Segment> last;  // Unmapped without the lock.
  MutexLock lock(&mutex_);
  // After the end an operation of this rank may still be reading there.
  if (fenced_) return;
  const auto found = peers_[rank].find(id);
  if (found == peers_[rank].end()) return;
  last = std::move(found->second);
  peers_[rank].erase(found);
  removed_.fetch_add(1, std::memory_order_acq_rel);
}

std::shared_ptr<const Segment> SharedMemory::FindPeerSegment(int rank, uint64_t id) {
  MutexLock lock(&mutex_);
  const auto found = peers_[rank].find(id);
  return found == peers_[rank].end() ? nullptr : found->second;
}

absl::StatusOr<std::byte*> SharedMemory::FindPeer(int rank, Place place, int64_t bytes) {
  const std::shared_ptr<const Segment> segment = FindPeerSegment(rank, place.segment);
  if (segment == nullptr) return static_cast<std::byte*>(nullptr);
  if (place.offset < 0 || bytes < 0 || bytes > segment->bytes() || place.offset > segment->bytes() - bytes) {
    return absl::OutOfRangeError(absl::StrCat("rank ", rank, " points past the end of its shared memory"));
  }
  return segment->base() + place.offset;
}

int SharedMemory::RanksOnHost() {
  MutexLock lock(&mutex_);
  return static_cast<int>(ranks_on_host_.size()) + 1;
}

void SharedMemory::AwaitAnnouncement() {
  MutexLock lock(&mutex_);
  announced_.WaitUntil(&mutex_, SteadyTime(NowNs() + kAwaitNs));
}

void SharedMemory::Fence() {
  OwnSegments::Get().Leave(this);
  MutexLock lock(&mutex_);
  fenced_ = true;
}

}  // namespace shoal
