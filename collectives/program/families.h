// The algorithms by family, one file each.
#pragma once

#include "collectives/program/algorithms.h"

namespace shoal {

absl::Span<const Algorithm> DirectAlgorithms();
absl::Span<const Algorithm> RingAlgorithms();
absl::Span<const Algorithm> RecursiveAlgorithms();
absl::Span<const Algorithm> TreeAlgorithms();
absl::Span<const Algorithm> AllToAllAlgorithms();
absl::Span<const Algorithm> TwoLevelAlgorithms();
absl::Span<const Algorithm> SparseAlgorithms();

}  // namespace shoal
