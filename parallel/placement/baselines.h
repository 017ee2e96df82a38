// How other systems place experts, for comparison: static expert parallelism, FasterMoE, SmartMoE, FlexMoE. Only the decisions;
// what they cost follows from the placement (layer_cost.h, reshard.h). Pure integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/layer_cost.h"
#include "parallel/placement/topology.h"

namespace shoal {

// Expert parallelism: expert e on rank e * ranks / experts.
std::vector<int> ContiguousOwners(int experts, int ranks);

// FasterMoE (PPoPP'22): shadows, experts on all ranks in this step, decided from the true rows_SE [ranks, experts]. The hottest
// expert is shadowed as long as that shortens the step; every shadow is sent and its gradient returned on the critical path,
// which is 2 * GatherPs() of the placement.
ExpertPlacement FasterMoeShadows(absl::Span<const int> owners, absl::Span<const int64_t> rows, const Topology& topology,
                                 const LayerCosts& costs);

// SmartMoE (ATC'23): as many experts on every rank (or one more), packed by load: heaviest first, to the rank with least load
// that has room, on the host with least load if there are several. What moves takes its optimizer state along: MovesBetween().
std::vector<int> SmartMoeOwners(absl::Span<const int64_t> loads, const Topology& topology);

struct FlexMoeOptions {
  int slots_per_rank = 0;     // Copies that a rank has room for, owned experts included.
  int trigger_percent = 110;  // Nothing changes while the busiest rank has at most this share of the mean.
  LayerCosts costs;           // Those of experts also for the copies' gradients, which are all-reduced every step.
};

// FlexMoE (SIGMOD'23): copies persist from step to step. While it shortens the step, the expert with most load per copy gets
// one more ("expand") on the least busy rank with room, or in place of the copy that is needed least ("shrink").
ExpertPlacement FlexMoeAdjust(const ExpertPlacement& current, absl::Span<const int64_t> rows, const Topology& topology,
                              const FlexMoeOptions& options);

// The step under FlexMoE: rows, and the all-reduce of the gradients of the experts that have copies.
int64_t FlexMoeStepPs(const ExpertPlacement& placement, absl::Span<const int64_t> rows, const Topology& topology,
                      const LayerCosts& costs);

}  // namespace shoal
