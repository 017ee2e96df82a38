// What kernels are written with. A .cu file includes this alone and compiles twice: by nvcc for GPUs, and as C++ for the emulator
// (emulator.h), which runs its kernels on the CPU, so that they are tested on machines without a GPU.
//
//   template <typename T> __global__ void Scale(T* x, int64_t n, float by) { ... threadIdx.x ... __syncthreads() ... }
//   DeviceResult ScaleAll(const DeviceTensor& x, float by, DeviceStream* stream) {
//     return Launch({.blocks = Blocks(n, 256), .threads = 256}, stream, Scale<float>, Data<float>(x), n, by);
//   }
//
// Shared memory: SHOAL_SHARED(float, partial, [32]) of fixed size; SHOAL_DYNAMIC_SHARED(float, tile) of LaunchShape::shared_bytes.
// Kernels may not return before a barrier that other threads of their block reach.
#pragma once

#include <cstdint>
#include <type_traits>

#include "runtime/kernels/device_kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SHOAL_SHARED(type, name, extent) __shared__ type name extent
#define SHOAL_DYNAMIC_SHARED(type, name)                  \
  extern __shared__ __align__(1024) unsigned char shoal_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(shoal_dynamic_shared)
#else
#include "runtime/kernels/cuda/emulator.h"
#endif

namespace shoal::cuda {

struct LaunchShape {
  int64_t blocks = 1;        // gridDim.x
  int blocks_y = 1, blocks_z = 1;
  int threads = 256;         // Of a block.
  int64_t shared_bytes = 0;  // Dynamic shared memory.
};

__host__ __device__ constexpr int64_t Blocks(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// Memory for intermediate results of the kernels that are put on the stream until the next call for it. 256-byte aligned,
// uninitialised. It grows, and what it outgrew stays as long as the stream, because recorded graphs use it: growing never waits for
// the device. In plugin.cc.
DeviceResult Scratch(DeviceStream* stream, int64_t bytes, void** memory);

#ifdef __CUDACC__
DeviceResult Failed(cudaError_t error);  // In plugin.cc: kOk for cudaSuccess.

// More dynamic shared memory than this a kernel must be allowed to have: 48 KiB less room for its shared memory of fixed size.
constexpr int64_t kSharedUnasked = 32 * 1024;

// Nothing is launched without blocks.
template <typename... P, typename... A>
DeviceResult Launch(const LaunchShape& shape, DeviceStream* stream, void (*kernel)(P...), A&&... arguments) {
  if (shape.blocks == 0 || shape.blocks_y == 0 || shape.blocks_z == 0) return {};
  if (shape.shared_bytes > kSharedUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return Failed(error);
  }
  kernel<<<dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y), static_cast<unsigned>(shape.blocks_z)),
           static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.shared_bytes), reinterpret_cast<cudaStream_t>(stream)>>>(
      static_cast<P>(arguments)...);
  return Failed(cudaGetLastError());
}
int MultiProcessors();  // Of the calling thread's device, in plugin.cc.
#else
template <typename... P, typename... A>
DeviceResult Launch(const LaunchShape& shape, DeviceStream*, void (*kernel)(P...), A&&... arguments) {
  if (shape.blocks == 0 || shape.blocks_y == 0 || shape.blocks_z == 0) return {};
  emulator::Run({static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y), static_cast<unsigned>(shape.blocks_z)},
                static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.shared_bytes),
                [&] { kernel(static_cast<P>(arguments)...); });
  return {};
}
inline int MultiProcessors() { return 3; }  // Few: persistent kernels then have several tiles per block.
inline DeviceResult Scratch(DeviceStream*, int64_t bytes, void** memory) {
  *memory = emulator::Scratch(bytes);
  return {};
}
#endif

// The element of a tensor that a kernel reads or writes; bf16 is a type of our own, converted in registers.
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Nearest, ties to even; NaN stays NaN.
template <typename T> __device__ __forceinline__ T FromFloat(float value);
template <> __device__ __forceinline__ float FromFloat<float>(float value) { return value; }
template <> __device__ __forceinline__ Bf16 FromFloat<Bf16>(float value) {
#ifdef __CUDA_ARCH__
  Bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t word = __float_as_uint(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((word >> 16) | 0x40u)};
  return {static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
#endif
}

// N elements that lie together and are read and written by one access of at most 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T> T* Data(const DeviceTensor& tensor) { return static_cast<T*>(tensor.data); }

// Calls body(T{}) with the tensor's element type, f32 or bf16.
template <typename Body> DeviceResult WithType(const DeviceTensor& tensor, const Body& body) {
  if (tensor.dtype == DType::kF32) return body(float{});
  if (tensor.dtype == DType::kBF16) return body(Bf16{});
  return {DeviceResult::Code::kFailed, "a kernel for f32 or bf16 got another type"};
}

// The sum over the lanes of a warp, in every lane; all lanes call it. The same order always.
__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
__device__ __forceinline__ double WarpSum(double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The same over a block, in every thread; `scratch` has 33 elements in shared memory, and may be used again after the call.
template <typename V> __device__ __forceinline__ V BlockSum(V value, V* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = (static_cast<int>(blockDim.x) + 31) / 32;
  value = WarpSum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    const V sum = WarpSum(lane < warps ? scratch[lane] : V{0});
    if (lane == 0) scratch[32] = sum;
  }
  __syncthreads();
  value = scratch[32];
  __syncthreads();
  return value;
}
__device__ __forceinline__ float BlockMax(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = (static_cast<int>(blockDim.x) + 31) / 32;
  value = WarpMax(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    const float largest = WarpMax(lane < warps ? scratch[lane] : scratch[0]);
    if (lane == 0) scratch[32] = largest;
  }
  __syncthreads();
  value = scratch[32];
  __syncthreads();
  return value;
}

}  // namespace shoal::cuda
