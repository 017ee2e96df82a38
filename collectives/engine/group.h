// The communicator of a world that is connected.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/communicator.h"

namespace shoal {

class World;

// The group of all ranks of `world`, which lives as long as its groups. Blocks until `deadline` at most; errors as
// ConnectWorld.
absl::StatusOr<std::unique_ptr<Communicator>> NewWorldGroup(std::shared_ptr<World> world, absl::Time deadline);

}  // namespace shoal
