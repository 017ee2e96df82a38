// What ranks tell each other outside of steps: an integer each.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"

namespace shoal {

// Collective, blocks. One value of every rank, in rank order. `label` names the operation in errors. ABORTED: the group is over.
absl::StatusOr<std::vector<int64_t>> GatherValues(Communicator& world, int64_t value, std::string_view label = "rank values");

}  // namespace shoal
