// How the processes of a job find each other, once per epoch. Rank 0 listens on the master address; the
// others dial it, say who they are and get the table of all ranks; then every pair connects. Everything that
// is not a process of this job, this epoch and this version is refused with a log line. No data passes here.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "collectives/membership/mesh.h"

namespace shoal {

// Entry r is about rank r. Blocks, at most connect_timeout; errors as ConnectWorld.
absl::StatusOr<std::vector<PeerLink>> FormMesh(const WorldOptions& options);

}  // namespace shoal
