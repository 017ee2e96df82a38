// Which copies of a layer's experts pay, and how many: between none (expert parallelism) and all experts on
// all ranks (fully sharded data parallelism), by what they save and what they cost. Hecate (arXiv 2502.02581,
// Algorithm 1) sends as many as attention hides; here every plan is priced instead, also those that nothing
// hides, so a plan is never predicted to be slower than having no copies. Switching between plans costs
// nothing, because copies are made anew in every step anyway (as Tutel's, arXiv 2206.03382). Pure integers.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "parallel/placement/dispatch.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/layer_cost.h"
#include "parallel/placement/topology.h"

namespace shoal {

struct CopyCosts {
  LayerCosts layer;
  // What other work of the layer hides of communication, per step: forward of gathering copies; backward of
  // returning their gradients and, where they are gathered again for the backward pass, of that.
  int64_t hidden_forward_ps = 0, hidden_backward_ps = 0;
  int gradient_percent = 200;  // Bytes of an expert's gradients on the wire, of those of its weights.
  bool gather_twice = false;   // Copies are released after the forward pass.
  friend bool operator==(const CopyCosts&, const CopyCosts&) = default;
};

// Bringing weights from owners to holders by two-level trees, as Communicator::SparseAllGather does: an owner
// sends once to each other host with holders. Returning gradients by the mirrored trees takes
// gradient_percent of it.
int64_t CopiesPs(const Topology& topology, const ExpertPlacement& placement, const LayerCosts& costs);

// What is not hidden of returning gradients of copies, and of gathering copies again where they were released.
int64_t ReturnCopiesPs(const Topology& topology, const ExpertPlacement& placement, const CopyCosts& costs);

// A layer's forward and backward pass, and what is not hidden of its copies. rows_SE [ranks, experts]: of a
// whole step.
int64_t StepWithCopiesPs(const Topology& topology, const ExpertPlacement& placement,
                         absl::Span<const int64_t> rows, DispatchRule rule, const CopyCosts& costs);

struct CopyOptions {
  int room = 0;  // Copies that a rank can hold.
  DispatchRule rule = DispatchRule::kNearest;
  CopyCosts costs;
};

// The plan that is predicted to be fastest for rows_SE, ties to fewer copies, among: `before` (the last
// step's, with these owners or none at all); copies of the 1, 2, 4, ... hottest experts, of all ranks' tokens
// or of those of each host, with 1, 2, 4, ... of a rank's places (hecate.h); and copies that relieve the
// busiest rank, one after the other. Another plan than `before` must save at least 2% of the layer's time,
// lest copies come and go for nothing.
ExpertPlacement ChooseCopies(absl::Span<const int> owners, absl::Span<const int64_t> rows,
                             const Topology& topology, const CopyOptions& options,
                             const ExpertPlacement& before = {});

}  // namespace shoal
