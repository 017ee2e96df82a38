#include "collectives/membership/coordinator.h"

namespace shoal {

absl::StatusOr<std::unique_ptr<CoordinatorServer>> CoordinatorServer::Start(const CoordinatorServerOptions&) {
  return absl::UnimplementedError("elastic groups");
}

}  // namespace shoal
