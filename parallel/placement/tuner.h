// Owners of experts by optimisation: MoETuner's goal (arXiv 2502.06643), even load and little traffic, for training. There a
// token returns to its rank after every layer, so what makes traffic is which ranks' tokens use which experts, layer by layer.
// Which experts follow each other in a token's path, the other half of MoETuner's goal and all of ExFlow's (arXiv 2401.08383),
// moves no byte less: it counts where tokens stay with their last expert, as in inference. Greedy plus local search instead of
// an integer program: within 2 % of the best where that can be checked. Deterministic, in integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
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

// rows_SE: rows of each rank's tokens for each expert [ranks, experts]. start: owners to improve on, or none; what is returned
// is never worse.
TunedOwners TuneOwners(absl::Span<const int64_t> rows, absl::Span<const int> start, const Topology& topology,
                       const TuneOptions& options);

}  // namespace shoal
