// One layer as FSMoE (arXiv 2501.10714) lays it out, expert-sharding parallel: rows cross hosts by all-to-all and are gathered
// inside a host, where every expert is cut over the devices; results are scattered and go back. So a chunk is five tasks, with
// both kinds of communication in a row, and the backward pass can carry a slice of dense gradients. Pure.
#pragma once

#include "parallel/schedule/graph.h"

namespace shoal {

// Nanoseconds of a whole pass over the layer: fixed costs are paid per chunk.
struct FsmoeLayer {
  struct Term {
    double fixed = 0, whole = 0;
    double OfChunk(int chunks) const { return fixed + whole / chunks; }
  };
  Term all_to_all, gather, scatter, experts;
  double dense = 0;  // Attention: before the experts in the forward pass, after them in the backward pass.
  Term gradients;    // All-reduce of what the layers above left to send.
};

struct FsmoeSchedule {
  int chunks = 1;
  bool overlap_links = true;  // Communication inside hosts and across hosts at the same time.
  // Of the gradients: the share sent between the dispatches and the returns of rows, and that beside the dense part; the rest
  // follows the layer.
  double beside_experts = 0, beside_dense = 0;
};

// Durations are Task::units; simulate with a nanosecond a unit.
Graph FsmoeGraph(const FsmoeLayer& layer, const FsmoeSchedule& schedule, Phase phase);

// Nanoseconds of the graph. `interference` slows communication while there is some of the other kind.
double FsmoeTime(const FsmoeLayer& layer, const FsmoeSchedule& schedule, Phase phase, double interference);

}  // namespace shoal
