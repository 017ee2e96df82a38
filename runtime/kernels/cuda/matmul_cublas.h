// DeviceKernels::matmul by cuBLASLt, which is loaded when it is first needed.
#pragma once

#include "runtime/kernels/device_kernels.h"

namespace shoal::cuda {

// f32 in f32 (TF32 with SHOAL_CUDA_TF32=1), bf16 with f32 sums. Algorithms are chosen by cuBLASLt's heuristics once per shape, among
// those that add parts in f32 and in a fixed order.
DeviceResult MatMul(const DeviceTensor& a, bool transpose_a, const DeviceTensor& b, bool transpose_b, const DeviceTensor& addend,
                    const DeviceTensor& c, DeviceStream* stream);

}  // namespace shoal::cuda
