// Redundant experts as DeepSeek's expert-parallel load balancer (EPLB, github.com/deepseek-ai/EPLB) places them: equally many
// slots on every rank, the hottest experts in several. Ties go as there, to the first.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/expert_placement.h"
#include "runtime/base/status.h"

namespace shoal {

struct EplbShape {
  int slots = 0;   // Of all ranks together, at least one per expert.
  int ranks = 1;   // Divides `slots`.
  int hosts = 1;   // Of equally many consecutive ranks.
  int groups = 1;  // Of consecutive experts that should stay on one host (group-limited routing).
};

// The expert in each slot of one layer; rank r has the n = slots / ranks slots from r * n on. Hierarchical (groups to hosts,
// then replicas within hosts) if `hosts` divides `groups`, else global. INVALID_ARGUMENT names the numbers that do not fit.
absl::StatusOr<std::vector<int>> BalanceReplicas(absl::Span<const int64_t> loads, const EplbShape& shape);

// The same as a placement: the first slot of an expert is its owner's, the other ranks with one are its holders (a rank with
// two slots of an expert has one copy).
ExpertPlacement PlacementOfSlots(absl::Span<const int> expert_of_slot, int experts, int ranks);

}  // namespace shoal
