// Sharing out whole things in proportion to integer weights. Pure integers, so every rank comes to the same answer.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

// `total` things shared in proportion to `weights` by largest remainders (ties to the lower index), none getting more than
// `cap`; what the capped cannot take goes to the others in proportion. Weights are >= 0, and 0 gets nothing, so the sum is
// min(total, cap * number of positive weights).
std::vector<int64_t> Apportion(int64_t total, absl::Span<const int64_t> weights,
                               int64_t cap = std::numeric_limits<int64_t>::max());

// Indices of `values` by descending value, equal ones by ascending index.
std::vector<int> ByDescending(absl::Span<const int64_t> values);

}  // namespace shoal
