// The products of attention_mma.h by either kind of instruction, for tiles in shared memory that hold a head's vectors in rows: 16 rows
// of sums per warp, as fragments of mma.h.
#pragma once

#include "runtime/kernels/cuda/mma.h"
#include "runtime/kernels/cuda/warp_group.h"

namespace shoal::cuda {

// By warps.
template <int kDim> struct WarpProducts {
  template <int kRows> using Layout = Padded<kDim>;
  static constexpr int kRowElements = Padded<kDim>::kStride;  // Of shared memory.

  // sums[j] = rows [row + 16 w, ... + 16) of a for warp w of four, times rows [8 j, 8 j + 8) of b, both over the `dim` columns of a head.
  // `row` is a multiple of 64. kRows: of a's tile. Done, as are those of MultiplyBy, after a Wait for
  // `sums` that leaves only later calls' products under way.
  template <int kRows, int kTiles>
  __device__ __forceinline__ static void MultiplyRows(const Bf16* a, int row, const Bf16* b, int dim, float (&sums)[kTiles][4]) {
    row += static_cast<int>(threadIdx.x) % 128 / 32 * 16;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0;
    }
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      if (k >= dim) break;
      uint32_t left[4], right[4];
      LoadA<Padded<kDim>>(left, a, row, k);
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        LoadB<Padded<kDim>>(right, b, 16 * j, k);
        Mma(sums[2 * j], left, right[0], right[1]);
        Mma(sums[2 * j + 1], left, right[2], right[3]);
      }
    }
  }

  // sums += p b[:, first_column ...], p being the fragments of 16 rows and 16 kSteps columns.
  template <int kSteps, int kTiles>
  __device__ __forceinline__ static void MultiplyBy(const uint32_t (&p)[kSteps][4], const Bf16* b, int first_column, int dim,
                                                    float (&sums)[kTiles][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n) {
        if (first_column + 16 * n >= dim) break;
        uint32_t right[4];
        LoadBTransposed<Padded<kDim>>(right, b, first_column + 16 * n, 16 * k);
        Mma(sums[2 * n], p[k], right[0], right[1]);
        Mma(sums[2 * n + 1], p[k], right[2], right[3]);
      }
    }
  }

  template <int kNewest, typename... Sums> __device__ __forceinline__ static void Wait(Sums&...) {}
  // What this thread wrote to shared memory may be multiplied by others after the barrier that follows.
  __device__ __forceinline__ static void Publish() {}
};

#if SHOAL_HAS_WARP_GROUPS
// The same by warp groups, for kDim 64 and 128, b of 64 rows. Each call is a group of products, over zeros too where a head is narrower:
// a branch among the products would make them wait for each other.
template <int kDim> struct GroupProducts {
  template <int kRows> using Layout = Swizzled<kRows>;
  static constexpr int kRowElements = kDim;

  template <int kRows, int kTiles>
  __device__ __forceinline__ static void MultiplyRows(const Bf16* a, int row, const Bf16* b, int, float (&sums)[kTiles][4]) {
    StartProducts();
    MultiplyWarpGroup<false, false, true>(sums, a + row * 64, b, 0);
#pragma unroll
    for (int k = 16; k < kDim; k += 16) {
      MultiplyWarpGroup<false, false>(sums, a + k / 64 * kRows * 64 + row * 64, b + k / 64 * 64 * 64, k % 64);
    }
    CommitProducts();
  }

  template <int kSteps, int kTiles>
  __device__ __forceinline__ static void MultiplyBy(const uint32_t (&p)[kSteps][4], const Bf16* b, int, int, float (&sums)[kTiles][4]) {
    StartProducts();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) MultiplyWarpGroup(sums, p[k], b, 16 * k);
    CommitProducts();
  }

  template <int kNewest, typename... Sums> __device__ __forceinline__ static void Wait(Sums&... sums) { WaitProducts<kNewest>(sums...); }
  __device__ __forceinline__ static void Publish() { PublishShared(); }
};
#endif

}  // namespace shoal::cuda
