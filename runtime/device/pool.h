// Memory of a device and pinned memory of the host, kept for reuse: asking the driver may wait for all work of the device.
// Decisions of the first are in blocks.h.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/base/mutex.h"
#include "runtime/device/blocks.h"
#include "runtime/device/device_api.h"
#include "runtime/device/memory.h"
#include "runtime/device/stream.h"

namespace shoal {

class Device;

// Points in the work of streams that must have passed before memory is used again. Of a stream that records a graph the point is
// taken later; when the device cannot be asked for one, the points never pass.
class StreamPoints {
 public:
  void Add(int stream) { unrecorded_.push_back(stream); }
  bool Passed(Device& device);
  // Makes the stream wait for them; false: they cannot be waited for yet.
  bool MakeWait(Device& device, Stream& stream);
  bool empty() const { return unrecorded_.empty() && events_.empty() && !lost_; }

 private:
  void Record(Device& device);

  std::vector<int> unrecorded_;
  std::vector<Event> events_;
  bool lost_ = false;
};

// Device memory in the order of streams, like PyTorch's allocator and cudaMallocAsync: what a stream frees, its later work can have
// at once, because it runs later; another stream only after an event. Thread-safe.
class DevicePool {
 public:
  explicit DevicePool(Device* device) : device_(*device) {}

  // At least `bytes` (0 gives a valid pointer), 512-byte aligned, uninitialised, for work on `stream`, which must be of this device.
  // Freed with the last reference, by any thread, without waiting. RESOURCE_EXHAUSTED says what is held. Asks the driver when the
  // pool has nothing; when that has nothing either, takes what other streams have freed (this one then waits for them) and
  // gives back what is idle.
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, Stream& stream);
  // Work on `stream`, put there before now, uses memory that was allocated for another: it is not used again before that work is
  // done. Nothing for memory of others.
  void UsedOn(const void* memory, const Stream& stream);

  // Where another process finds the memory at `address`. What it lies in stays of the pool's until the device ends, because no one
  // knows how long others have it open. NOT_FOUND: not in a block of this pool. Other errors are the device's.
  struct Exported {
    DeviceIpcHandle handle;  // For open_memory, which gives the address that `offset` is from.
    int64_t offset_bytes;
  };
  absl::StatusOr<Exported> Export(const void* address);

  HostMemoryStats stats() const;  // in_use: of blocks; reserved: asked of the driver.
  void ResetPeak();
  // Gives idle memory back to the driver. Waits for the device.
  void Trim();

 private:
  friend class Device;
  // A block that is free once these have passed.
  struct Pending {
    void* block;
    StreamPoints uses;
  };

  void Close();  // The device ends, and has no streams any more.
  void Free(void* block);
  void HandOver(int from, int to);
  void* TakeFrom(const BlockTable::Idle& idle, int64_t bytes, int owner) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void* TakePassed(int64_t bytes, int owner) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void* TakeWaiting(int64_t bytes, Stream& stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<void*> TakeNew(int64_t bytes, int owner) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<void*> Take(int64_t bytes, Stream& stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FreePassed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void GiveBackIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Device& device_;
  mutable Mutex mutex_;
  BlockTable table_ ABSL_GUARDED_BY(mutex_);
  std::vector<Pending> pending_ ABSL_GUARDED_BY(mutex_);
  std::map<void*, Event> fences_ ABSL_GUARDED_BY(mutex_);  // Of idle segments that another stream looked at.
  std::map<void*, DeviceIpcHandle> exported_ ABSL_GUARDED_BY(mutex_);  // Segments.
  int64_t peak_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Host memory that the device copies from and to without waiting. The host writes to it at once, so a block is used again only when
// the stream that it was for has passed the point where it was freed. Thread-safe.
class PinnedPool {
 public:
  explicit PinnedPool(Device* device) : device_(*device) {}

  // As DevicePool::Allocate; 4096-byte aligned.
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, Stream& stream);
  HostMemoryStats stats() const;

 private:
  friend class Device;
  struct Block {
    void* memory;
    int64_t bytes;
  };
  struct Pending {
    Block block;
    int graph;  // That has it until it ends; 0: none.
    StreamPoints uses;
  };

  void Close();
  void Free(Block block, int64_t needed_bytes, int stream, int graph);
  void HandOver(int graph, int stream);
  void FreePassed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void GiveBack() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Device& device_;
  mutable Mutex mutex_;
  std::multimap<int64_t, void*> free_ ABSL_GUARDED_BY(mutex_);
  std::vector<Pending> pending_ ABSL_GUARDED_BY(mutex_);
  HostMemoryStats stats_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
