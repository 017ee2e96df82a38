// The Communicator of ranks with devices: which way their tensors travel.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "collectives/backend/nccl_group.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

// The first that these ranks can have of
// * NCCL (nccl_group.h): each rank has a `nccl` (of LoadNccl) and a device of its own;
// * peers (peer_group.h): all ranks are on one host, and their devices read each other's memory;
// * staged (staged_group.h): always.
// SHOAL_DEVICE_GROUP=nccl|peers|staged allows one of them alone. Rank 0 logs which it is, and why not one before it. Collective; takes
// the host's group. Its contract is that of `host` with tensors in memory of `device`, as those headers say; what all three have is what
// nccl_group.h promises.
//
// FAILED_PRECONDITION: these ranks cannot have what SHOAL_DEVICE_GROUP says, or it differs between them. INVALID_ARGUMENT: it says
// something else. DEADLINE_EXCEEDED, ABORTED.
absl::StatusOr<std::unique_ptr<Communicator>> DeviceGroup(std::unique_ptr<Communicator> host, Device& device,
                                                          const absl::StatusOr<const NcclApi*>& nccl,
                                                          const NcclOptions& options = {});

}  // namespace shoal
