// When experts get other owners, and which: one of three ways to find them, and whether moving pays. Owners
// keep what never travels in a step, weights' masters and optimizer state, so a move costs several times what
// a copy does. Pure integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/copies.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"

namespace shoal {

enum class OwnerPolicy : uint8_t {
  kHecate,  // Reshard(): what is not copied is spread evenly (Hecate, arXiv 2502.02581, Algorithm 2).
  kEplb,    // EPLB's packing of experts and copies on the ranks together; each expert's owner is one of the
            // ranks that it is on.
  kTuned,   // TuneOwners(): even load and little traffic without any copies (MoETuner, arXiv 2502.06643).
};

struct OwnerOptions {
  OwnerPolicy policy = OwnerPolicy::kHecate;
  int overlap = 0;  // kHecate: experts of a layer that are copied anyway.
  CopyOptions copies;
  // Steps over which a move must pay, and what an expert that moves takes in bytes, in percent of its weights
  // on the wire. 0 steps: it need not.
  int64_t steps = 0;
  int move_percent = 600;
};

// Owners for rows_SE [ranks, experts] of each layer, in a whole step. Every rank owns as many experts over
// all layers as now, or the mean, whichever is more, at most. `current` if the move would not pay: if the
// steps, each with its best copies, are not predicted to save more in total than what moving takes.
OwnerMap ChooseOwners(absl::Span<const std::vector<int64_t>> rows, const Topology& topology,
                      const OwnerMap& current, const OwnerOptions& options);

// Moving experts to other owners, with nothing beside it, layer after layer.
int64_t MovePs(const Topology& topology, const OwnerMap& before, const OwnerMap& after,
               const LayerCosts& costs, int move_percent);

}  // namespace shoal
