// Which rank owns which expert (Hecate, arXiv 2502.02581, Algorithm 2): experts that are not hot enough to be materialised are
// spread so that every layer's cold load is even over hosts and ranks, while every rank owns as many experts in total. Moving
// an expert moves its weights and its optimizer state, so this is done every so many steps only. Pure integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"

namespace shoal {

// loads: of each expert of each layer. `overlap`: the experts of a layer that Materialise() sends anyway; they take the places
// left over, those of one layer on different hosts and ranks if they can. Every rank gets the same number of experts over all
// layers, or one more.
//
// An expert stays with its owner where that keeps rank and host at most `slack_percent` above the mean of its layer: 0 gives
// the evenest load, 20 a maximum that is a tenth higher for less than half of the moves. `current` comes back unchanged if
// nothing better was found, so equal loads move nothing twice.
OwnerMap Reshard(absl::Span<const std::vector<int64_t>> loads, const Topology& topology, const OwnerMap& current, int overlap,
                 int slack_percent = 10);

struct OwnerMove {
  int layer = 0, expert = 0, from = 0, to = 0;
  friend bool operator==(const OwnerMove&, const OwnerMove&) = default;
};

// What has another owner in `after`, by layer and expert. Both have the same shape.
std::vector<OwnerMove> MovesBetween(const OwnerMap& before, const OwnerMap& after);

}  // namespace shoal
