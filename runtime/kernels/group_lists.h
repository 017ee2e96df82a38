// The lists of a grouped product in the memory of a stream.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "runtime/kernels/matmul.h"

namespace shoal::kernels {

struct GroupLists {
  Tensor matrices;  // i64 [E], addresses.
  Tensor segments;  // i32 [S, 3]
};

// Both in one copy, without waiting.
GroupLists UploadLists(absl::Span<const Tensor> matrices, absl::Span<const Segment> segments, Stream& stream);

// Of a list in host memory.
std::vector<Segment> SegmentsOf(const Tensor& list);

}  // namespace shoal::kernels
