// A device for tests: a table of functions on host memory. Streams note their work and do it when they are told, so that what waits for
// too little shows; device memory cannot be touched by the host (PROT_NONE) while no work of the device runs; every call can be made to
// fail, and is counted. Devices of several processes can open each other's memory (fake_memory.h). One at a time per process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/mutex.h"
#include "runtime/device/device_api.h"

namespace shoal {

struct FakeDeviceOptions {
  // When a stream does its work: when the host waits for it (or for one that waits for it), by one piece for each query that finds it
  // unfinished too, or at once.
  enum class Progress : uint8_t { kByWaits, kByQueries, kAtOnce };
  Progress progress = Progress::kByQueries;
  int devices = 1;
  int64_t memory_bytes = int64_t{1} << 32;  // Of each device.
  bool protect = true;                      // Device memory from the host.
  const DeviceKernels* kernels = nullptr;   // Of the table; they use Submit.
};

// Thread-safe; work runs on the thread that waits, one piece at a time.
class FakeDevice {
 public:
  explicit FakeDevice(const FakeDeviceOptions& options = {});
  ~FakeDevice();  // CHECKs that all memory was given back, and that what was opened was closed.
  static FakeDevice& Current();

  const DeviceApi& api() const { return api_; }

  // Puts work on a stream.
  DeviceResult Submit(DeviceStream* stream, std::function<DeviceResult()> work);

  // The `nth` call from now on (1: the next) of the function of this name of the table fails. "kernel": as work of a stream.
  void FailCall(std::string_view function, int nth, DeviceResult::Code code, std::string_view message);
  // How often a function was called.
  int64_t Calls(std::string_view function) const;
  // Calls that made the host wait, pageable copies among them.
  int64_t Waits() const;

  // One piece of work of the stream; false: it has none. Or all of all streams.
  bool RunOne(DeviceStream* stream);
  void RunAll();
  int64_t allocated_bytes() const;

  // Implementation of the table.
  struct State;
  State& state() { return *state_; }

 private:
  DeviceApi api_;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
