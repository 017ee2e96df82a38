// A GPU on the CPU, for tests: the words of CUDA C++ that our kernels use, and Run(), which executes a grid block by block, the threads of
// a block as fibers of the calling thread that take turns at barriers and exchanges, of every second block from the last to the first. It
// shows wrong results, missing barriers that change results in one of these orders, exchanges that not all named lanes reach (CHECKed)
// and accesses out of bounds (with AddressSanitizer's allocator or guarded memory); not races that both orders hide, and not speed. Loops
// without a barrier run to their end, so a block may not wait for another one.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace shoal::cuda::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of the fiber that is running.
extern thread_local Dim3 t_thread_index, t_block_index, t_block_dim, t_grid_dim;
extern thread_local unsigned char* t_dynamic_shared;

// Returns when all blocks are done. Blocks of concurrent calls exclude each other, because shared memory of fixed size is static.
// `body` is the kernel with its arguments. CHECKs that no thread waits for ever.
void Run(Dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);
// Grids that Run has executed in this process.
int64_t Launches();

void SyncThreads();
void SyncWarp(uint32_t mask);
// Every lane of `mask` gives its value (at most 16 bytes) and gets that of lane `source`; a source outside of the mask or the warp gives
// the lane's own.
void Exchange(uint32_t mask, const void* own, int source, void* result, size_t bytes);
// All 32 lanes of the warp give `bytes` (at most 64) and get those of all, by lane: for operations of a warp on fragments.
void Gather(const void* own, size_t bytes, void* all);
uint32_t Ballot(uint32_t mask, bool predicate);

// Of the calling thread, until its next call; full of NaN.
void* Scratch(int64_t bytes);

template <typename T> T Shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 16);
  T result;
  Exchange(mask, &value, source, &result, sizeof(T));
  return result;
}
inline int Lane() { return static_cast<int>(t_thread_index.x % 32); }

}  // namespace shoal::cuda::emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SHOAL_SHARED(type, name, extent) static type name extent
#define SHOAL_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::shoal::cuda::emulator::t_dynamic_shared)
#define threadIdx ::shoal::cuda::emulator::t_thread_index
#define blockIdx ::shoal::cuda::emulator::t_block_index
#define blockDim ::shoal::cuda::emulator::t_block_dim
#define gridDim ::shoal::cuda::emulator::t_grid_dim

// NOLINTBEGIN: the names are CUDA's.
inline void __syncthreads() { shoal::cuda::emulator::SyncThreads(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { shoal::cuda::emulator::SyncWarp(mask); }
template <typename T> T __shfl_sync(uint32_t mask, T value, int lane) { return shoal::cuda::emulator::Shuffle(mask, value, lane); }
template <typename T> T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return shoal::cuda::emulator::Shuffle(mask, value, shoal::cuda::emulator::Lane() ^ lanes);
}
template <typename T> T __shfl_up_sync(uint32_t mask, T value, unsigned lanes) {
  return shoal::cuda::emulator::Shuffle(mask, value, shoal::cuda::emulator::Lane() - static_cast<int>(lanes));
}
template <typename T> T __shfl_down_sync(uint32_t mask, T value, unsigned lanes) {
  return shoal::cuda::emulator::Shuffle(mask, value, shoal::cuda::emulator::Lane() + static_cast<int>(lanes));
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) { return shoal::cuda::emulator::Ballot(mask, predicate); }
inline bool __any_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, !predicate) == 0; }
// The lanes that have the same value; of whole warps.
inline uint32_t __match_any_sync(uint32_t mask, uint32_t value) {
  uint32_t all[32], same = 0;
  shoal::cuda::emulator::Gather(&value, sizeof(value), all);
  for (uint32_t lane = 0; lane < 32; ++lane) same |= (all[lane] == value ? 1u : 0u) << lane;
  return same & mask;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <typename T> T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}
template <typename T> T atomicMin(T* address, T value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}
template <typename T> T atomicExch(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}
template <typename T> T atomicCAS(T* address, T expected, T value) {
  const T before = *address;
  if (before == expected) *address = value;
  return before;
}

inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t value) { return std::bit_cast<float>(value); }
inline int __popc(uint32_t value) { return std::popcount(value); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(value)) + 1; }
inline int __clz(int value) { return std::countl_zero(static_cast<uint32_t>(value)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float value) { return 1.0f / value; }
// NOLINTEND
