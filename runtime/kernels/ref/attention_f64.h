// Causal grouped-query attention by its definition, in f64: what ref::Attention computes with, and what tests
// differentiate numerically. Layouts as in runtime/kernels/attention.h.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "runtime/kernels/attention.h"

namespace shoal::kernels::ref {

struct AttentionF64 {
  std::vector<double> out;  // [T, heads * dim]
  std::vector<double> lse;  // [T, heads]
};
AttentionF64 AttentionForwardF64(const AttentionShape& shape, const std::vector<double>& qkv,
                                 absl::Span<const int32_t> first);

// The gradient of sum(out * dout) by qkv.
std::vector<double> AttentionBackwardF64(const AttentionShape& shape, const std::vector<double>& qkv,
                                         absl::Span<const int32_t> first, const std::vector<double>& dout);

}  // namespace shoal::kernels::ref
