// SwiGLU (Shazeer, 2020, arXiv 2002.05202) between an expert's matrix products: h = silu(gate) * up.
// gate_up[R, 2F] holds a row's F gate values, then its F up values. Tensors are f32 or bf16 alike; arithmetic is f32.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

void SwiGlu(const Tensor& gate_up, const Tensor& h, Stream& stream);  // h[R, F]

// From dh[R, F]: dgate_up[R, 2F], and h[R, F] once more, which the weight gradient needs. dgate_up may be gate_up, h may
// be dh.
void SwiGluBackward(const Tensor& dh, const Tensor& gate_up, const Tensor& dgate_up, const Tensor& h, Stream& stream);

namespace ref {
void SwiGlu(const Tensor& gate_up, const Tensor& h, Stream& stream);
void SwiGluBackward(const Tensor& dh, const Tensor& gate_up, const Tensor& dgate_up, const Tensor& h, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
