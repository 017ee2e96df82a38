// Owners of experts by optimisation: MoETuner's goal (arXiv 2502.06643), even load and little traffic, for training. There a
// token returns to its rank after every layer, so what makes traffic is which ranks' tokens use which experts, not which
// experts follow each other; the latter can be added where tokens do stay (inference; ExFlow, arXiv 2401.08383). Greedy plus
// local search instead of an integer program: within 2 % of the best where that can be checked. Deterministic, in integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/layer_cost.h"
#include "parallel/placement/topology.h"

namespace shoal {

struct TuneOptions {
  LayerCosts costs;               // Of rows; those of experts are not used: nothing is materialised.
  int experts_per_rank_max = 0;   // 0: any number. Times ranks at least the number of experts.
  int restarts = 24;              // Local searches from a disturbed best solution.
};

struct TunedOwners {
  std::vector<int> owners;   // By expert.
  int64_t forward_ps = 0;    // ForwardPs() of it, links shared with other layers included.
  int64_t bound_ps = 0;      // No owners can do better: the mean load, or the largest expert, without any traffic.
};

// rows_SE: rows of each rank's tokens for each expert [ranks, experts]. linked_SE: as many, or none: rows that come to each
// expert from, or go from it to, experts of other layers on each rank; they make traffic only. start: owners to improve on, or
// none; what is returned is never worse.
TunedOwners TuneOwners(absl::Span<const int64_t> rows, absl::Span<const int64_t> linked, absl::Span<const int> start,
                       const Topology& topology, const TuneOptions& options);

// Layer by layer, each after the one before it, then again with both neighbours while that improves.
// transitions[l][a * experts + b]: rows that go from expert a of layer l to expert b of layer l + 1 without going home; none,
// or one matrix per pair of layers.
OwnerMap TuneLayers(absl::Span<const std::vector<int64_t>> rows_SE, absl::Span<const std::vector<int64_t>> transitions,
                    const Topology& topology, const TuneOptions& options);

}  // namespace shoal
