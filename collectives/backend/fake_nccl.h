// NCCL for tests: ranks are threads of this process, on devices of a fake one (runtime/device/fake_device.h) whose memory the host may
// touch. Operations end as kernels do: once those that they belong to run at the same time on all ranks, in the order of each rank's
// stream; so what would hang on GPUs hangs here, for a while, and is told. NCCL's rules are checked: what is called between start and
// end of a group, with which communicator when, and whether the ranks' arguments fit. One at a time per process.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "collectives/backend/nccl_api.h"
#include "runtime/device/fake_device.h"

namespace shoal {

// Thread-safe.
class FakeNccl {
 public:
  explicit FakeNccl(FakeDevice& device);
  ~FakeNccl();

  const NcclApi& api() const;
  // The table of the fake device, but that its streams and events wait for operations.
  const DeviceApi& device_api() const;

  // The `nth` call from now on of the function of this name by `rank` fails ("unique_id": by any).
  void FailCall(std::string_view function, int rank, int nth);
  int Calls(std::string_view function, int rank) const;
  // Rules that were broken, among them communicators that were neither destroyed nor aborted. To be asked at the end.
  std::vector<std::string> Faults() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace shoal
