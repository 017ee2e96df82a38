#include "runtime/device/pool.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "runtime/device/device.h"

namespace shoal {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kMiB = int64_t{1} << 20;

// Small pinned blocks have sizes of powers of two, so that few sizes serve all; large ones waste at most a MiB.
int64_t PinnedBytes(int64_t bytes) {
  if (bytes > kMiB) return (bytes + kMiB - 1) / kMiB * kMiB;
  int64_t size = kPage;
  while (size < bytes) size *= 2;
  return size;
}

// A block may be this large for a request of `bytes`.
int64_t PinnedBytesMax(int64_t bytes) { return bytes <= kMiB ? bytes * 2 : bytes + bytes / 4; }

// Of what must be tried again when memory is freed.
bool OutOfMemory(const absl::Status& status) { return absl::IsResourceExhausted(status); }

}  // namespace

void StreamPoints::Record(Device& device) {
  std::erase_if(unrecorded_, [&](int stream) {
    Event event;
    const absl::Status status = device.RecordOn(stream, &event);
    if (absl::IsFailedPrecondition(status)) return false;
    if (!status.ok()) SHOAL_LOG(kWarning) << "memory is not used again: " << std::string(status.message());
    lost_ = lost_ || !status.ok();
    events_.push_back(std::move(event));
    return true;
  });
}

bool StreamPoints::Passed(Device& device) {
  Record(device);
  std::erase_if(events_, [](const Event& event) { return event.Done(); });
  return empty();
}

bool StreamPoints::MakeWait(Device& device, Stream& stream) {
  Record(device);
  if (lost_ || !unrecorded_.empty()) return false;
  for (const Event& event : events_) stream.WaitFor(event);
  return true;
}

void DevicePool::Close() {
  MutexLock lock(&mutex_);
  for (const Pending& pending : pending_) table_.Free(pending.block);
  pending_.clear();
  exported_.clear();
  SHOAL_CHECK_EQ(table_.in_use_bytes(), 0);
  GiveBackIdle();
}

absl::StatusOr<std::shared_ptr<void>> DevicePool::Allocate(int64_t bytes, Stream& stream) {
  SHOAL_CHECK(stream.device() == &device_) << "memory of " << device_.name() << " for a stream of another device";
  MutexLock lock(&mutex_);
  SHOAL_ASSIGN_OR_RETURN(void* const block, Take(bytes, stream));
  peak_bytes_ = std::max(peak_bytes_, table_.in_use_bytes());
  return std::shared_ptr<void>(block, [this](void* freed) { Free(freed); });
}

absl::StatusOr<void*> DevicePool::Take(int64_t bytes, Stream& stream) {
  const int owner = stream.memory_owner();
  if (!stream.capturing()) FreePassed();
  if (void* block = table_.Take(bytes, owner)) return block;
  if (!stream.capturing()) {
    if (void* block = TakePassed(bytes, owner)) return block;
  }
  absl::StatusOr<void*> block = TakeNew(bytes, owner);
  if (block.ok() || !OutOfMemory(block.status()) || stream.capturing()) return block;
  if (void* waited = TakeWaiting(bytes, stream)) return waited;
  GiveBackIdle();
  block = TakeNew(bytes, owner);
  if (block.ok() || !OutOfMemory(block.status())) return block;
  return absl::ResourceExhaustedError(absl::StrFormat(
      "%s; %.2f GiB wanted on %s of %.2f GiB: this process has %.2f GiB in use and %.2f GiB in free pieces, the largest %.2f GiB",
      std::string(block.status().message()), static_cast<double>(bytes) / 0x1p30, device_.name(),
      static_cast<double>(device_.properties().memory_bytes) / 0x1p30, static_cast<double>(table_.in_use_bytes()) / 0x1p30,
      static_cast<double>(table_.reserved_bytes() - table_.in_use_bytes()) / 0x1p30,
      static_cast<double>(table_.largest_free_bytes()) / 0x1p30));
}

void* DevicePool::TakeFrom(const BlockTable::Idle& idle, int64_t bytes, int owner) {
  table_.Give(idle.base, owner);
  fences_.erase(idle.base);
  void* const block = table_.Take(bytes, owner);
  SHOAL_CHECK(block != nullptr) << bytes << " bytes in an idle segment of " << idle.bytes;
  return block;
}

// From an idle segment of another owner whose work with it is done; where that is not known yet, an event is put there for the next
// time. Not from far too large ones.
void* DevicePool::TakePassed(int64_t bytes, int owner) {
  const int64_t segment_bytes_max = 2 * SegmentBytes(BlockBytes(bytes));
  for (const BlockTable::Idle& idle : table_.IdleFor(bytes, owner, segment_bytes_max)) {
    auto fence = fences_.find(idle.base);
    if (fence == fences_.end()) {
      Event event;
      if (!device_.RecordOn(idle.owner, &event).ok()) continue;
      fence = fences_.emplace(idle.base, std::move(event)).first;
    }
    if (fence->second.Done()) return TakeFrom(idle, bytes, owner);
  }
  return nullptr;
}

// The same from any segment of any size, after which the stream waits for its owner; and what other streams still use of its own.
void* DevicePool::TakeWaiting(int64_t bytes, Stream& stream) {
  std::erase_if(pending_, [&](Pending& pending) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const bool own = table_.OwnerOf(*table_.Find(pending.block)) == stream.memory_owner();
    if (!own || !pending.uses.MakeWait(device_, stream)) return false;
    table_.Free(pending.block);
    return true;
  });
  if (void* block = table_.Take(bytes, stream.memory_owner())) return block;
  for (const BlockTable::Idle& idle : table_.IdleFor(bytes, stream.memory_owner(), std::numeric_limits<int64_t>::max())) {
    Event event;
    if (!device_.RecordOn(idle.owner, &event).ok()) continue;
    stream.WaitFor(event);
    return TakeFrom(idle, bytes, stream.memory_owner());
  }
  return nullptr;
}

absl::StatusOr<void*> DevicePool::TakeNew(int64_t bytes, int owner) {
  const int64_t segment_bytes = SegmentBytes(BlockBytes(bytes));
  void* base = nullptr;
  device_.Use();
  device_.CountAllocation();
  SHOAL_RETURN_IF_ERROR(device_.StatusOf(device_.api().allocate(segment_bytes, &base), "allocating memory"));
  table_.AddSegment(base, segment_bytes, owner);
  return table_.Take(bytes, owner);
}

void DevicePool::FreePassed() {
  std::erase_if(pending_, [&](Pending& pending) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (!pending.uses.Passed(device_)) return false;
    table_.Free(pending.block);
    return true;
  });
}

// The driver waits for the device's work before it takes memory back, so nothing uses it any more.
void DevicePool::GiveBackIdle() {
  device_.Use();
  for (const BlockTable::Idle& idle : table_.AllIdle()) {
    if (exported_.contains(idle.base)) continue;
    device_.CountAllocation();
    const absl::Status status = device_.StatusOf(device_.api().release(idle.base), "giving memory back");
    if (!status.ok()) SHOAL_LOG(kWarning) << std::string(status.message());
    fences_.erase(idle.base);
    table_.RemoveSegment(idle.base);
  }
}

void DevicePool::UsedOn(const void* memory, const Stream& stream) {
  if (stream.device() != &device_ || stream.capturing()) return;
  MutexLock lock(&mutex_);
  BlockTable::Block* block = table_.Find(memory);
  if (block == nullptr || table_.OwnerOf(*block) == stream.memory_owner()) return;
  const auto known = std::find(block->users.begin(), block->users.end(), stream.memory_owner());
  if (known == block->users.end()) block->users.push_back(stream.memory_owner());
}

void DevicePool::Free(void* memory) {
  MutexLock lock(&mutex_);
  const BlockTable::Block* block = table_.Find(memory);
  SHOAL_CHECK(block != nullptr) << "not a block of the pool: " << memory;
  Pending pending = {.block = memory};
  for (const int user : block->users) pending.uses.Add(user);
  // The owner's next work is behind all of its own; the points of others are from now.
  if (pending.uses.empty() || pending.uses.Passed(device_)) {
    table_.Free(memory);
  } else {
    pending_.push_back(std::move(pending));
  }
}

absl::StatusOr<DevicePool::Exported> DevicePool::Export(const void* address) {
  MutexLock lock(&mutex_);
  const BlockTable::Block* block = table_.Find(address);
  if (block == nullptr) return absl::NotFoundError(absl::StrCat("not memory of ", device_.name()));
  void* const base = table_.BaseOf(*block);
  auto exported = exported_.find(base);
  if (exported == exported_.end()) {
    DeviceIpcHandle handle = {};
    device_.Use();
    SHOAL_RETURN_IF_ERROR(device_.StatusOf(device_.api().export_memory(base, &handle), "exporting memory"));
    exported = exported_.emplace(base, handle).first;
  }
  return Exported{exported->second, static_cast<const char*>(address) - static_cast<const char*>(base)};
}

void DevicePool::HandOver(int from, int to) {
  MutexLock lock(&mutex_);
  table_.HandOver(from, to);
}

HostMemoryStats DevicePool::stats() const {
  MutexLock lock(&mutex_);
  return {.in_use_bytes = table_.in_use_bytes(), .peak_bytes = peak_bytes_, .reserved_bytes = table_.reserved_bytes()};
}

void DevicePool::ResetPeak() {
  MutexLock lock(&mutex_);
  peak_bytes_ = table_.in_use_bytes();
}

void DevicePool::Trim() {
  MutexLock lock(&mutex_);
  GiveBackIdle();
}

void PinnedPool::Close() {
  MutexLock lock(&mutex_);
  SHOAL_CHECK_EQ(stats_.in_use_bytes, 0);
  for (const Pending& pending : pending_) free_.emplace(pending.block.bytes, pending.block.memory);
  pending_.clear();
  GiveBack();
}

absl::StatusOr<std::shared_ptr<void>> PinnedPool::Allocate(int64_t bytes, Stream& stream) {
  SHOAL_CHECK(stream.device() == &device_) << "memory of " << device_.name() << " for a stream of another device";
  const int64_t needed = PinnedBytes(bytes);
  Block block = {nullptr, needed};
  MutexLock lock(&mutex_);
  FreePassed();
  if (const auto found = free_.lower_bound(needed); found != free_.end() && found->first <= PinnedBytesMax(needed)) {
    block = {found->second, found->first};
    free_.erase(found);
  } else {
    device_.Use();
    device_.CountAllocation();
    absl::Status status = device_.StatusOf(device_.api().allocate_host(needed, &block.memory), "allocating pinned memory");
    if (OutOfMemory(status)) {
      GiveBack();
      device_.CountAllocation();
      status = device_.StatusOf(device_.api().allocate_host(needed, &block.memory), "allocating pinned memory");
    }
    SHOAL_RETURN_IF_ERROR(status, bytes, " bytes wanted, ", stats_.reserved_bytes, " pinned");
    stats_.reserved_bytes += needed;
  }
  stats_.in_use_bytes += needed;
  stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.in_use_bytes);
  const int owner = stream.memory_owner();
  const int graph = stream.capturing() ? owner : 0;
  return std::shared_ptr<void>(block.memory, [this, block, needed, owner, graph](void*) { Free(block, needed, owner, graph); });
}

void PinnedPool::Free(Block block, int64_t needed_bytes, int stream, int graph) {
  Pending pending = {.block = block, .graph = graph};
  if (graph == 0) pending.uses.Add(stream);
  MutexLock lock(&mutex_);
  stats_.in_use_bytes -= needed_bytes;
  if (graph == 0 && pending.uses.Passed(device_)) {
    free_.emplace(block.bytes, block.memory);
  } else {
    pending_.push_back(std::move(pending));
  }
}

void PinnedPool::HandOver(int graph, int stream) {
  MutexLock lock(&mutex_);
  for (Pending& pending : pending_) {
    if (pending.graph != graph) continue;
    pending.graph = 0;
    pending.uses.Add(stream);
  }
}

void PinnedPool::FreePassed() {
  std::erase_if(pending_, [&](Pending& pending) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (pending.graph != 0 || !pending.uses.Passed(device_)) return false;
    free_.emplace(pending.block.bytes, pending.block.memory);
    return true;
  });
}

void PinnedPool::GiveBack() {
  device_.Use();
  for (const auto& [bytes, memory] : free_) {
    device_.CountAllocation();
    const absl::Status status = device_.StatusOf(device_.api().release_host(memory), "giving pinned memory back");
    if (!status.ok()) SHOAL_LOG(kWarning) << std::string(status.message());
    stats_.reserved_bytes -= bytes;
  }
  free_.clear();
}

HostMemoryStats PinnedPool::stats() const {
  MutexLock lock(&mutex_);
  return stats_;
}

}  // namespace shoal
