// Gradients of experts in the pinned order (Numerics::kPinned): the sum over the parts of the batch, of each over source ranks in
// their order, of *partials*, each of the rows that one rank has for the expert, on whichever rank they are computed. An owner
// cannot be sent sums of partials, so all that copies have travel, one by one: a rank has room for one partial of each source that it
// computes rows of for an expert with copies, and as owner for those of all sources, from the layer's backward pass until Collect
// has returned.
//
// Begin and Keep are called by one thread, Collect by another, in the order of a layer's parts: Begin of a part after Collect of the
// part before.
#pragma once

#include <functional>
#include <vector>

#include "collectives/communicator.h"
#include "parallel/placement/dispatch.h"
#include "parallel/placement/expert_placement.h"

namespace shoal {

class ExpertPartials {
 public:
  // Of experts with `elements` elements. Borrows `group` for life.
  ExpertPartials(Communicator& group, int64_t elements, int layers)
      : group_(&group), elements_(elements), layers_(static_cast<size_t>(layers)) {}

  // A part's backward pass of a layer: who computes which rows, by source, as of a rule that IsWhole.
  void Begin(int layer, const ExpertPlacement& placement, absl::Span<const std::vector<DispatchShare>> shares);
  // Takes the partial [elements] (f32, where the group's tensors are) of rows of `source` that were computed here, for an expert with holders.
  void Keep(int layer, int expert, int source, Tensor partial);
  // Collective, blocks. Calls `add` for each partial of each expert that is owned here and has holders, ascending by source. Those of
  // others come to memory of `stream`. Returns the bytes that this rank sent or received, the larger. ABORTED: the group is over.
  absl::StatusOr<int64_t> Collect(int layer, Stream& stream, const std::function<void(int expert, const Tensor& partial)>& add);

 private:
  struct Partial {
    int source = 0, expert = 0, rank = 0, owner = 0;  // `rank` computes it.
    Tensor gradient;
  };

  Communicator* group_;
  const int64_t elements_;
  std::vector<std::vector<Partial>> layers_;  // Of experts with holders; by source, then expert.
};

}  // namespace shoal
