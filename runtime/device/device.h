// A device of this process, as a plug-in's table (device_api.h) shows it: its streams, its memory, its kernels. All calls of the
// table go through here or through Stream, so that each is made with the device chosen and waiting is counted.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/device_api.h"
#include "runtime/device/pool.h"
#include "runtime/device/stream.h"

namespace shoal {

// How often the host waited, or did what may make it wait: a training step that overlaps has few of these.
struct DeviceWaits {
  int64_t waits = 0;        // Of the host, for a stream or an event.
  int64_t allocations = 0;  // Memory asked of the driver or given back to it.
};

// Thread-safe. Outlives its streams, events and memory (CHECKed for memory).
class Device {
 public:
  // `api` lives as long. UNAVAILABLE says what is missing.
  static absl::StatusOr<std::unique_ptr<Device>> Create(const DeviceApi& api, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const { return name_; }  // "cuda:0"
  int ordinal() const { return ordinal_; }
  const DeviceProperties& properties() const { return properties_; }
  const DeviceApi& api() const { return api_; }
  const DeviceKernels& kernels() const { return *api_.kernels; }
  DevicePool& memory() { return memory_; }
  PinnedPool& pinned() { return pinned_; }
  DeviceWaits waits() const { return {waits_, allocations_}; }

  absl::StatusOr<std::unique_ptr<Stream>> NewStream();

  // Chooses this device for the calling thread: before a call of the table. Failures show in that call.
  void Use() const;
  // The outcome of a call: OK, or a status "cuda:0: WHAT: cause".
  absl::Status StatusOf(const DeviceResult& result, std::string_view what) const;

 private:
  friend class DevicePool;
  friend class Event;
  friend class CapturedGraph;
  friend class PinnedPool;
  friend class StreamPoints;
  friend class Stream;
  Device(const DeviceApi& api, int ordinal);

  int NewOwner() { return ++owners_; }
  void CountWait() { ++waits_; }
  void CountAllocation() { ++allocations_; }
  // `record`: of the table.
  absl::Status Record(DeviceStream* stream, Timing timing, DeviceResult (*record)(DeviceEvent*, DeviceStream*), Event* event);
  // A point after the work of the stream with this id so far; one that has passed if it is gone. FAILED_PRECONDITION: it records a
  // graph; later.
  absl::Status RecordOn(int stream, Event* event);
  void SetCapture(int stream, std::shared_ptr<StreamCapture> capture);
  // Memory of a graph that has ended to the stream that launched it.
  void HandOver(const std::vector<int>& owners, int stream);
  void Recycle(DeviceEvent* event, Timing timing);
  void Remove(Stream* stream);

  const DeviceApi& api_;
  const int ordinal_;
  std::string name_;
  DeviceProperties properties_ = {};
  std::atomic<int64_t> waits_ = 0;
  std::atomic<int64_t> allocations_ = 0;
  std::atomic<int> owners_ = 0;
  Mutex mutex_;
  struct Running {
    DeviceStream* handle;
    std::shared_ptr<StreamCapture> capture;
  };
  std::map<int, Running> streams_ ABSL_GUARDED_BY(mutex_);
  std::vector<DeviceEvent*> spare_events_[2] ABSL_GUARDED_BY(mutex_);  // By Timing.
  DevicePool memory_;
  PinnedPool pinned_;
};

// The device of a plug-in, "cuda": the same one for the life of the process. Loads libshoal_NAME.so beside the executable, or what
// SHOAL_DEVICE_PLUGIN names. The vendor's libraries come from where the loader finds them, or from the folders listed in
// SHOAL_CUDA_LIBRARIES (separated by colons), of the toolkit, or of Python's packages. NOT_FOUND: no plug-in; UNAVAILABLE: no
// driver, device or library; FAILED_PRECONDITION: a plug-in of another version. Thread-safe.
absl::StatusOr<Device*> LoadDevice(std::string_view name, int ordinal);

}  // namespace shoal
