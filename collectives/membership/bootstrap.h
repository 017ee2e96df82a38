// How the processes of a job find each other, once per epoch. Rank 0 listens on the master address; the
// others dial it, say who they are and get the table of all ranks; then every pair connects. Everything that
// is not a process of this job, this epoch and this version is refused with a log line. No data passes here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "collectives/transport/socket.h"

namespace shoal {

struct PeerLink {
  int64_t pid = 0;
  std::string host_name;
  int host = 0;          // The lowest rank that shares memory with this one (its own rank when nobody does).
  Fd control;            // Invalid in the entry of this process.
  std::vector<Fd> data;  // `flows` connections; none unless the job needs TCP: several hosts, or transport tcp.
};

// Entry r is about rank r. Blocks, at most connect_timeout; errors as ConnectWorld.
absl::StatusOr<std::vector<PeerLink>> FormMesh(const WorldOptions& options);

}  // namespace shoal
