// The product before a SwiGLU and the SwiGLU (swiglu.h) at once: gate_up[rows, 2F] = x w^T, which the backward pass needs, and h[rows, F]
// of it, with the bits of GroupedMatMul and SwiGlu one after the other. On devices in bf16 it is one kernel, which does not read gate_up
// again; else both.
#pragma once

#include "runtime/kernels/matmul.h"

namespace shoal::kernels {

// As GroupedMatMul, with w [2F, K]. Rows of h outside all segments are undefined.
void GroupedMatMulSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments, const Tensor& gate_up,
                         const Tensor& h, Stream& stream, Numerics numerics = Numerics::kFast);
void GroupedMatMulSwiGlu(const Tensor& x, const Tensor& weights, const Tensor& segments, const Tensor& gate_up, const Tensor& h,
                         Stream& stream);

}  // namespace shoal::kernels
