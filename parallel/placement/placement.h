// How things are dealt over ranks: sequences of a batch, experts over the ranks of an expert group, blocks of a bucket over their
// owners. Pure. It never changes what is computed. Where experts are: expert_placement.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "runtime/base/status.h"

namespace shoal {

struct Layout {
  int ranks = 1;
  int expert = 1;   // Ranks of an expert group; divides `ranks`.
  int experts = 1;  // Experts of a layer.
};

struct Range {
  int64_t begin = 0;
  int64_t count = 0;
  friend bool operator==(const Range&, const Range&) = default;
};

// Part `index` of `total` things dealt evenly over `parts`: contiguous, the first total % parts get one more.
Range EvenPart(int64_t total, int parts, int index);

// INVALID_ARGUMENT: expert groups do not fit; the message says which sizes would.
absl::Status CheckLayout(const Layout& layout);

// Splits a list of sizes into `parts` contiguous pieces with the largest piece as small as a greedy cut at equal shares
// makes it. Returns the piece of each element.
std::vector<int> ContiguousPartition(absl::Span<const int64_t> sizes, int parts);

}  // namespace shoal
