// Where kernels run. A stream is an order of work on one device; every kernel takes one as its last argument. A kernel never
// returns an error: the first failure poisons the stream, later work on it is not even started, and whoever needs the results asks
// Wait() or status().
//
// The CPU stream runs work at once, on the calling thread and the process's OpenMP team. A device's stream (Device::NewStream) only
// notes it: results are there after Wait(), or for work on another stream that waits for this one. A stream is used by one thread at
// a time; events by any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

class Device;
struct DeviceEvent;
struct DeviceGraph;
struct DeviceStream;

enum class Timing : uint8_t { kNo, kYes };

// What streams that record one graph share.
struct StreamCapture {
  std::atomic<bool> open = true;
  std::vector<int> owners;  // Of the graph's memory: one for each stream, for each has an order of its own.
};

// A point in the work of a stream. Move-only; must not outlive its device.
class Event {
 public:
  Event() = default;  // Has passed. So have those of the CPU stream.
  Event(Event&& other) noexcept { *this = std::move(other); }
  Event& operator=(Event&& other) noexcept;
  ~Event();

  // Never blocks. True also when the device failed: Wait() says how.
  bool Done() const;
  absl::Status Wait() const;  // Blocks.

  // From begin to end, both passed and recorded with Timing::kYes.
  static absl::StatusOr<double> Milliseconds(const Event& begin, const Event& end);

 private:
  friend class Device;
  friend class Stream;
  Device* device_ = nullptr;
  DeviceEvent* handle_ = nullptr;
  Timing timing_ = Timing::kNo;
  std::shared_ptr<StreamCapture> capture_;  // Recorded for a graph.
  absl::Status status_;                     // Of the stream when it was recorded.
};

// Work of one stream that was recorded once and can be done often by one call. Move-only; ends before its stream's device. Its
// memory goes back to the stream that recorded it.
class CapturedGraph {
 public:
  CapturedGraph() = default;
  CapturedGraph(CapturedGraph&& other) noexcept { *this = std::move(other); }
  CapturedGraph& operator=(CapturedGraph&& other) noexcept;
  ~CapturedGraph();

 private:
  friend class Stream;
  Device* device_ = nullptr;
  DeviceGraph* handle_ = nullptr;
  std::vector<int> owners_;
  int stream_ = 0;
};

class Stream {
 public:
  Stream() = default;  // The CPU's.
  ~Stream();           // A device's: blocks until its work is done.
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device* device() const { return device_; }  // Null: the CPU.
  DeviceStream* handle() const { return handle_; }

  void Fail(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }
  const absl::Status& status() const { return status_; }

  // Blocks until all work is done; the first failure.
  absl::Status Wait();

  Event Record(Timing timing = Timing::kNo);
  // Later work of this stream starts after that point. Only a CPU stream that waits for a device's blocks. A failure passes on.
  void WaitFor(const Event& event);
  void WaitFor(Stream& other) { WaitFor(other.Record()); }

  // What is put on a device's stream between these is recorded, not done; so is that of other streams that wait for it meanwhile, which it
  // must wait for before the end. One thread uses all of them, and the host waits for none. Memory allocated on them is the graph's; other
  // tensors and events with times (each launch records them) must outlive it. Failures meanwhile are EndCapture's, not the stream's.
  absl::Status BeginCapture();
  absl::StatusOr<CapturedGraph> EndCapture();
  void Launch(const CapturedGraph& graph);  // On the stream that recorded it.

  // To whom allocations for this stream belong (pool.h): the stream, or the graph that it records.
  int memory_owner() const { return capturing() ? capture_owner_ : id_; }
  bool capturing() const { return capture_ != nullptr && capture_->open; }

 private:
  friend class Device;
  void Join(std::shared_ptr<StreamCapture> capture);

  Device* device_ = nullptr;
  DeviceStream* handle_ = nullptr;
  int id_ = 0;  // Of the device's owners of memory, from 1.
  std::shared_ptr<StreamCapture> capture_;
  int capture_owner_ = 0;  // Below 0.
  absl::Status status_;
};

}  // namespace shoal
