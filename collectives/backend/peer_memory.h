// How ranks of one host reach each other's device memory: what one tells of a tensor, and what another one has opened by that.
//
// NVIDIA's terms (CUDA programming guide, "Interprocess Communication"): memory is opened by other processes than its owner's, on the
// same device or on one that can reach it, once for each opener and allocation; an owner that gives memory back while others have it open
// leaves them with anything, and so does one whose process ends. So DevicePool never gives exported memory back while its device lives,
// and nobody may begin to read a peer's memory once the group is over: of a read that was under way then, the result is undefined, and a
// driver that finds the memory gone may fail the reader's device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// Where others find a tensor of this rank. Sent as it is.
struct SharedTensor {
  DeviceIpcHandle handle;
  int64_t offset_bytes;
  int64_t bytes;
};

// Zeros for an empty tensor. NOT_FOUND: the tensor is not in memory of `device`; other errors are the device's.
absl::StatusOr<SharedTensor> Share(const Tensor& tensor, Device& device);

// What this rank has opened of its peers', until it ends; the device must have done by then what reads it. Not thread-safe.
class PeerMemory {
 public:
  explicit PeerMemory(Device& device) : device_(device) {}
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;

  // A tensor that another rank has shared, which is not empty: at an address that work of the device may read.
  absl::StatusOr<std::byte*> Open(const SharedTensor& shared);

 private:
  Device& device_;
  std::map<std::string, void*> opened_;  // By handle.
};

// Why these ranks cannot read each other's device memory, for example because they are on several hosts; "": they can, which each has
// tried with each. The same on all ranks. Collective.
absl::StatusOr<std::string> FindPeerObstacle(Communicator& host, Device& device, absl::Time deadline);

}  // namespace shoal
