// How ranks find out over a group in host memory whether they can have a communicator of NCCL, and get one. Collective.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/backend/nccl_api.h"
#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

// Why these ranks cannot have one, for example two on one device; "": they can. The same on all ranks. An error of `nccl` is that of
// a rank without NCCL.
absl::StatusOr<std::string> FindNcclObstacle(Communicator& host, const Device& device, const absl::StatusOr<const NcclApi*>& nccl,
                                             absl::Time deadline);

absl::StatusOr<NcclId> ShareNcclId(Communicator& host, const Device& device, const NcclApi& api, absl::Time deadline);

// Blocks until all ranks have met, `deadline` has passed (DEADLINE_EXCEEDED) or the host's group ends (its status).
absl::StatusOr<NcclComm*> MeetInNccl(const NcclId& id, Communicator& host, Device& device, const NcclApi& api, absl::Time deadline);

}  // namespace shoal
