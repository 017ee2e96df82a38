// Attention at a given instruction set: what runtime/kernels/attention.h calls with ActiveIsa(), and tests
// with each level that the processor has.
#pragma once

#include "runtime/device/cpu.h"
#include "runtime/kernels/attention.h"

namespace shoal::kernels::cpu {

void Attention(Isa isa, const AttentionShape& shape, const Tensor& qkv, const Tensor& first,
               const Tensor& out, const Tensor& lse);
void AttentionBackward(Isa isa, const AttentionShape& shape, const Tensor& qkv, const Tensor& first,
                       const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv);

}  // namespace shoal::kernels::cpu
