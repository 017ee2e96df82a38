// The gate of SwiGLU (swiglu.h), the same bits wherever it is computed.
#pragma once

#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

// At the rate of memory there are some thirty instructions for an element; the exact exponential and division take too many of them,
// and bf16 does not show the difference.
template <typename T> __device__ __forceinline__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

template <typename T> __device__ __forceinline__ float Gated(float gate, float up) { return gate * Sigmoid<T>(gate) * up; }

}  // namespace shoal::cuda
