// The tensor-core words: matrices of 8 x 8 bf16 loaded from shared memory into registers, products of fragments, and copies from global
// to shared memory that run beside the computation. For GPUs these are the instructions ldmatrix, mma and cp.async (sm_80 on); for the
// emulator mma_emulated.h does the same on the same layouts. All lanes of a warp call a function of fragments together.
//
// Fragments of a warp, lane = 4 g + t with g in [0, 8), t in [0, 4); a pair is two bf16, the lower index in the lower half:
//   a[0..3]: the pairs (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) of a 16 x 16 matrix;
//   b[0..1]: the pairs (k 2t, column g), (2t + 8, g) of a 16 x 8 matrix, adjacent in k;
//   c[0..3]: (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of a 16 x 8 matrix of f32.
// Two c beside each other (columns 0-7 and 8-15), rounded to bf16 pairwise, are the a of the next product.
//
// Matrices of e4m3 codes lie as if each two of them, adjacent in k, were one bf16: a fragment's pairs are then four codes, 32 k long.
#pragma once

#include <cstdint>

#include "runtime/kernels/cuda/launch.h"

#ifndef __CUDACC__
#include "runtime/kernels/cuda/mma_emulated.h"
#endif

namespace shoal::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// c += a b.
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with codes: of sm_89 on, before it c stays as it is.
__device__ __forceinline__ void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices: lanes 8 i .. 8 i + 7 give the addresses (shared memory, 16-byte aligned) of the rows of matrix i; lane 4 g + t
// gets in to[i] the pair (row g, columns 2t, 2t + 1) of it, or with the other function of its transpose.
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(row)));
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&to)[4], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(row)));
}

// 16 bytes from global to shared memory, both 16-byte aligned, or zeros where not `inside` (then nothing is read). Seen by the thread
// after it has waited for the group of copies, by its block after a barrier that follows.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(shared)), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until all groups of this thread but the last kNewest are there.
template <int kNewest> __device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewest) : "memory");
}

// Brings a line of global memory near, for a later read.
__device__ __forceinline__ void Prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global)); }

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x, to about 2 units in the last place.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
#endif

// A matrix of bf16 in shared memory, 1024-byte aligned: blocks of 64 columns behind each other, in each kRows rows of 8 chunks of 8
// elements, placed so that a chunk of 8 rows one below another lies in different banks (the 128-byte swizzle of the hardware).
template <int kRows> struct Swizzled {
  static_assert(kRows % 8 == 0);
  __device__ static int At(int row, int chunk) { return (chunk / 8 * kRows + row) * 64 + (chunk % 8 ^ (row & 7)) * 8; }
};

// Rows of kColumns, a multiple of 16, with the same property by an odd number of chunks per row.
template <int kColumns> struct Padded {
  static_assert(kColumns % 16 == 0);
  static constexpr int kStride = kColumns + 8;
  __device__ static int At(int row, int chunk) { return row * kStride + chunk * 8; }
};

// Fragment a of rows [row, row + 16) and k [k, k + 16); the matrix lies as [row][k], or for the second as [k][row].
template <typename Layout> __device__ __forceinline__ void LoadA(uint32_t (&a)[4], const Bf16* matrix, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LoadMatrices(a, matrix + Layout::At(row + lane % 16, k / 8 + lane / 16));
}
template <typename Layout> __device__ __forceinline__ void LoadATransposed(uint32_t (&a)[4], const Bf16* matrix, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LoadMatricesTransposed(a, matrix + Layout::At(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
}

// Fragments b of columns [column, column + 8) in b[0], b[1] and of the 8 columns after them in b[2], b[3], k [k, k + 16); the matrix
// lies as [column][k], or for the second as [k][column].
template <typename Layout> __device__ __forceinline__ void LoadB(uint32_t (&b)[4], const Bf16* matrix, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LoadMatrices(b, matrix + Layout::At(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
}
template <typename Layout> __device__ __forceinline__ void LoadBTransposed(uint32_t (&b)[4], const Bf16* matrix, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LoadMatricesTransposed(b, matrix + Layout::At(k + lane / 8 % 2 * 8 + lane % 8, column / 8 + lane / 16));
}

// A matrix of at most kRows x kColumns of global memory into shared memory by all kThreads of the block; zeros beside it. row_at(row) is
// the address of a row, null behind the last; `some` any of them. `aligned`: addresses are multiples of 16 bytes, columns are multiples
// of 8: then by asynchronous copies, which the caller commits; else element by element.
template <typename Layout, int kRows, int kColumns, int kThreads, typename RowAt>
__device__ __forceinline__ void LoadRows(Bf16* shared, const RowAt& row_at, const Bf16* some, int columns, bool aligned) {
  constexpr int kChunks = kColumns / 8;
#pragma unroll
  for (int first = 0; first < kRows * kChunks; first += kThreads) {
    const int item = first + static_cast<int>(threadIdx.x);
    if (kRows * kChunks % kThreads != 0 && item >= kRows * kChunks) break;
    const int row = item / kChunks, chunk = item % kChunks;
    Bf16* const to = shared + Layout::At(row, chunk);
    const Bf16* const own = row_at(row);
    const bool inside = own != nullptr && chunk * 8 < columns;
    const Bf16* const from = inside ? own + chunk * 8 : some;
    if (aligned) {
      CopyAsync16(to, from, inside);
    } else {
      Pack<Bf16, 8> pack{};
      for (int i = 0; i < 8; ++i) {
        if (inside && chunk * 8 + i < columns) pack.at[i] = from[i];
      }
      *reinterpret_cast<Pack<Bf16, 8>*>(to) = pack;
    }
  }
}

// The same of `rows` rows that lie `stride` apart.
template <typename Layout, int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void LoadTile(Bf16* shared, const Bf16* global, int64_t stride, int rows, int columns, bool aligned) {
  const auto row_at = [&](int row) { return row < rows ? global + row * stride : nullptr; };
  LoadRows<Layout, kRows, kColumns, kThreads>(shared, row_at, global, columns, aligned);
}

__host__ __device__ __forceinline__ bool IsAligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace shoal::cuda
