// A Communicator for tensors in the memory of a device, of ranks on one host whose devices are the same or can reach each other: each
// rank's copies and kernels read the tensors of the others where they are (peer_memory.h); nothing passes through the host's memory.
//
// Groups in host memory of the same ranks carry what must be agreed on: with each operation the ranks tell each other where their
// tensors are, which says that these may be read, and after each phase that they have done it, so that what was read may be overwritten.
// They also learn of deaths, missed deadlines and aborts. Ranks only read memory of others, never write to it.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

// As `host`, whose contract holds, but that
// * tensors are in memory of `device`, of Allocate or not;
// * what a call reads must be there when it is made: streams that compute it have been waited for. Results are there when the Work has
//   ended;
// * sums of f32 and bf16 add in f32 in the order of ranks (sparse: the owner's, then the holders') and round once: the same bits from
//   run to run;
// * what peers do not do by themselves is staged through the host's memory (staged_group.h): other reductions and types in reductions,
//   wire formats, named algorithms, and operations that on any rank have a tensor outside of the device's pool;
// * an operation without a deadline has the timeout of the host's group for each of its phases;
// * ranks whose arguments do not fit, and a device that fails, end the group. Work that reads peers' memory is waited for before a Work
//   ends, whatever happened; none begins after the group was found to be over.
// Takes the host's group, whose ranks FindPeerObstacle has found no obstacle for. Collective. `device` outlives the group.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectPeers(std::unique_ptr<Communicator> host, Device& device);

}  // namespace shoal
