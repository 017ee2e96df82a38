// Measures the links between the hosts of a group.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/communicator.h"
#include "collectives/program/cost.h"

namespace shoal {

// Each pair of ranks on different hosts sends a few messages to and fro, at most one pair per rank at a time: some
// milliseconds each on fast links, on slow ones about a second for all together, as long as that is enough for one message of
// 64 KiB each. Collective over the group; blocks until `deadline` at most. The result is equal on all ranks: `defaults` with
// the links that were measured, and an order of rings that fits them. Errors: the group is over.
absl::StatusOr<CostModel> ProbeLinks(Communicator& group, CostModel defaults, absl::Time deadline);

// Whom `rank` meets in `round` of so many that each pair of `size` ranks meets once; -1: nobody. Pure.
int PartnerIn(int round, int rank, int size);
inline int ProbeRounds(int size) { return size + size % 2 - 1; }

}  // namespace shoal
