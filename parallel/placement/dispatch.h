// How the tokens of an expert are spread over the ranks that hold it. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"

namespace shoal {

enum class DispatchRule : uint8_t {
  // Tokens of a rank that holds the expert stay; else the copies of its host share them equally; else all copies do
  // (Hecate, arXiv 2502.02581).
  kNearest,
  // As kNearest, but where copies share, they are levelled (water-filling): ranks that compute less get more. The busiest
  // rank never has more rows than with kNearest, and shares are fewer.
  kWaterFill,
  // As these, but the rows of a source for an expert are never split: all go to one copy. Which one, goes round among those that
  // would share them; with kWaterFillWhole it is the emptiest so far, the largest parcels first. What one rank computes of an
  // expert is then always the same product, wherever that is (Numerics::kPinned).
  kNearestWhole,
  kWaterFillWhole,
};
inline bool IsWhole(DispatchRule rule) { return rule == DispatchRule::kNearestWhole || rule == DispatchRule::kWaterFillWhole; }

// The rows of one source rank for one expert that go to one rank. A source's rows of an expert are cut in the order of its
// shares, so shares say which rows as well.
struct DispatchShare {
  int expert = 0;
  int rank = 0;
  int64_t rows = 0;  // > 0
};

// rows_SE: rows of each source rank for each expert, row-major [ranks, experts]. Returns for each source its shares, ordered by
// expert, those of an expert by rank; every row is in exactly one. O(ranks * experts + shares), and sorting to fill.
std::vector<std::vector<DispatchShare>> SplitTokens(DispatchRule rule, const Topology& topology,
                                                    const ExpertPlacement& placement, absl::Span<const int64_t> rows);

}  // namespace shoal
