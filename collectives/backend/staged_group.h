// A Communicator for tensors in the memory of a device, on top of one for host memory: what goes in is copied to pinned host memory,
// the host's group does the operation, and what comes out is copied back. Works with any group, and for any number of processes that
// share a device.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

// As `host`, whose contract holds, but that
// * tensors are in device memory (of Allocate or not) or in the host's; those of Allocate have a twin in host memory that peers map;
// * what a call reads must be there when it is made: streams that compute it have been waited for. Results are there when the
//   Work has ended;
// * a device that fails ends the group.
// `device` outlives the group. UNAVAILABLE: the device has no stream left.
absl::StatusOr<std::unique_ptr<Communicator>> StageThroughHost(std::unique_ptr<Communicator> host, Device& device);

}  // namespace shoal
