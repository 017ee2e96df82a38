// A Communicator for tensors in the memory of GPUs: NCCL moves the data, a group in host memory of the same ranks says who lives.
//
// The host's group exchanges what NCCL needs to connect, and learns of deaths, missed deadlines and aborts: then every rank calls
// ncclCommAbort, which ends its kernels, so that nothing hangs. With each operation the ranks compare over it, at the same time,
// what they have issued; so an operation that a rank never issues, or another one in its place, ends the group as it does elsewhere.
// NCCL's communicators are never repaired: the group of the next epoch connects anew (nccl_api.h says why).
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/backend/nccl_api.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

struct NcclOptions {
  absl::Duration connect_timeout = absl::Seconds(60);
  // Of an operation whose caller gives no deadline, from its issue. The timeout of the host's group holds too, until all ranks have
  // issued it.
  absl::Duration timeout = absl::Minutes(10);
  // How long to wait, when the group is closed, for peers that have not closed it; then NCCL is aborted instead.
  absl::Duration close_timeout = absl::Seconds(5);
};

// As `host`, whose contract holds, but that
// * tensors are in memory of `device`, of Allocate or not;
// * what a call reads must be there when it is made: streams that compute it have been waited for. Results are there when the Work has
//   ended;
// * Send and Receive go through the host's memory (staged_group.h): NCCL's would have to be issued in one order on both sides;
// * 16-bit floats are rounded whenever two partial sums are added; averages of floats divide before they add. Bits repeat from run to
//   run where NCCL's choice of algorithms does: with the same library, environment and GPUs;
// * INVALID_ARGUMENT: wire formats, named algorithms, Order::kFixed, and sparse reductions other than sums of f32 and bf16;
// * a device or an NCCL that fails ends the group.
// Collective; takes the host's group, which ends on all ranks when connecting fails on one. `device` and `api` outlive the group.
// FAILED_PRECONDITION: ranks share a device, or have different versions of NCCL. DEADLINE_EXCEEDED, ABORTED.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectNccl(std::unique_ptr<Communicator> host, Device& device, const NcclApi& api,
                                                          const NcclOptions& options = {});

// The NCCL of a device's plug-in. UNAVAILABLE, NOT_FOUND or FAILED_PRECONDITION says what is missing. Thread-safe.
absl::StatusOr<const NcclApi*> LoadNccl(const Device& device);

}  // namespace shoal
