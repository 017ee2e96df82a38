// Tiles of matrix products of e4m3 codes with a scale for each 128 of k, of rows of a and of 128 columns of b (fp8.h), one after another
// by one block. The tensor cores add the products of 128 k with less than the precision of f32 (some 14 bits on Hopper: arXiv 2412.19437,
// 3.3.2), so these sums are added up in f32, with their scales, outside of them.
//
// A Work hands out tiles: bool Next(Fp8Tile&), false behind the last. All threads of the block call it alike. Work::kGated as in
// tile_product.h.
#pragma once

#include "runtime/kernels/cuda/tile_product.h"

namespace shoal::cuda {

struct Fp8Tile {
  int64_t m, n;  // Rows and columns (gated: of the gate) of the result from the tile's first; may be more than the tile has.
  int blocks;    // Of k.
  // Codes as [row][k] and [column][k], of the tile's first; lines are `blocks` * 128 bytes, aligned to 16.
  const uint8_t *a, *b;
  const float* a_scales;  // Of row r and block s: [r * blocks + s].
  const float* b_scales;  // Of all columns of the tile, for block s: [s * b_step].
  int64_t b_step;
  TileResult result;
  const float* up_scales = nullptr;  // Gated: as b_scales, those of the up projection.
};

// c[m, n] = addend + a b^T.
struct Fp8TileProduct {
  static constexpr int kRows = 128, kColumns = 128, kStages = 4;
  static constexpr int kStep = 64;  // Of k, in pairs of codes, which lie where a bf16 would: mma.h.
  static constexpr int kThreads = 256, kBlocks = 1;  // Of a multiprocessor.
  static constexpr int kABytes = kRows * kStep * 2, kStageBytes = kABytes + kColumns * kStep * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes + kThreads / 32 * kStaging * 4;
  // Of a warp's part of the tile, without warp groups.
  static constexpr int kWarpRows = 64, kWarpColumns = 32;

  // All threads of the block; barriers within.
  template <typename Work> __device__ static void Run(Work& work, unsigned char* shared) {
#ifdef __CUDACC__
#if SHOAL_HAS_WARP_GROUPS
    ByWarpGroups(work, shared);
#else
    ByWarps(work, shared);
#endif
#else
    if (blockIdx.x % 2 == 0) return ByWarpGroups(work, shared);  // The emulator has both, with the same bits.
    ByWarps(work, shared);
#endif
  }

 private:
  // The tile that is loaded, which is the next one while the sums of one are written.
  template <typename Work> struct Loading {
    Fp8Tile tile;
    int loaded = 0;  // Blocks.

    __device__ int m() const { return static_cast<int>(tile.m < kRows ? tile.m : kRows); }
    __device__ int n() const {
      if constexpr (Work::kGated) return GatedColumns<kColumns>(tile.n);
      return static_cast<int>(tile.n < kColumns ? tile.n : kColumns);
    }
    // Takes the next tile and puts its first blocks into stages 0 ... All stages must be free.
    __device__ bool Start(Work& work, unsigned char* shared) {
      if (!work.Next(tile)) return false;
      loaded = 0;
      for (int stage = 0; stage < kStages - 1; ++stage) Load(shared + stage * kStageBytes);
      return true;
    }
    // One group of copies, empty behind the last block.
    __device__ void Load(unsigned char* stage) {
      if (loaded < tile.blocks) {
        const int64_t stride = int64_t{kStep} * tile.blocks;
        const auto pairs = [&](const uint8_t* codes) { return reinterpret_cast<const Bf16*>(codes) + loaded * kStep; };
        LoadTile<Swizzled<kRows>, kRows, kStep, kThreads>(reinterpret_cast<Bf16*>(stage), pairs(tile.a), stride, m(), kStep, true);
        const auto row_at = [&](int line) -> const Bf16* {
          if constexpr (Work::kGated) {
            const int64_t gate = GateOf(line);
            return gate < tile.n ? pairs(tile.b) + (gate + (IsUp(line) ? tile.result.inner : 0)) * stride : nullptr;
          } else {
            return line < n() ? pairs(tile.b) + line * stride : nullptr;
          }
        };
        LoadRows<Swizzled<kColumns>, kColumns, kStep, kThreads>(reinterpret_cast<Bf16*>(stage + kABytes), row_at, pairs(tile.b), kStep, true);
        ++loaded;
      }
      CommitCopies();
    }
  };

  // The scales of a thread's rows, `row` + 8 i, for one block, 0 for rows that are not there: times those of b's columns, gated times
  // those of the gate and of the up projection.
  template <bool kGated, int kRowsOfThread> struct Scales {
    float of[kGated ? 2 : 1][kRowsOfThread];

    __device__ __forceinline__ void Load(const Fp8Tile& tile, int row, int block) {
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const float of_a = row + 8 * i < tile.m ? tile.a_scales[(row + 8 * i) * int64_t{tile.blocks} + block] : 0.0f;
        of[0][i] = of_a * tile.b_scales[block * tile.b_step];
        if constexpr (kGated) of[1][i] = of_a * tile.up_scales[block * tile.b_step];
      }
    }
  };

  template <bool kGated, int kTilesM, int kTilesN>
  __device__ __forceinline__ static void AddScaled(float (&sums)[kTilesM][kTilesN][4], const float (&part)[kTilesM][kTilesN][4],
                                                   const Scales<kGated, 2 * kTilesM>& scales) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int l = 0; l < 4; ++l) {
          sums[i][j][l] = __fmaf_rn(part[i][j][l], scales.of[kGated && j % 4 >= 2 ? 1 : 0][2 * i + l / 2], sums[i][j][l]);
        }
      }
    }
  }

  template <typename Work> __device__ static void ByWarps(Work& work, unsigned char* shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int row = warp % 2 * kWarpRows, column = warp / 2 * kWarpColumns, own_row = row + static_cast<int>(threadIdx.x) % 32 / 4;
    float* const staging = reinterpret_cast<float*>(shared + kStages * kStageBytes) + warp * kStaging;
    Loading<Work> loading;
    bool more = loading.Start(work, shared);
    while (more) {
      const int m = loading.m(), n = loading.n(), blocks = loading.tile.blocks;
      const bool has_part = row < m && column < n;
      float sums[kWarpRows / 16][kWarpColumns / 8][4] = {};
      for (int done = 0; done < blocks; ++done) {
        Scales<Work::kGated, kWarpRows / 8> scales;
        scales.Load(loading.tile, own_row, done);
        WaitCopies<kStages - 2>();
        __syncthreads();
        loading.Load(shared + (done + kStages - 1) % kStages * kStageBytes);
        if (!has_part) continue;
        float part[kWarpRows / 16][kWarpColumns / 8][4] = {};
        Multiply(shared + done % kStages * kStageBytes, row, column, part);
        AddScaled(sums, part, scales);
      }
      __syncthreads();
      const TileResult result = loading.tile.result;
      const int64_t gates = loading.tile.n;
      more = loading.Start(work, shared);
      if (has_part) Store<Work>(sums, row, column, m, n, gates, result, staging);
    }
  }

  __device__ static void Multiply(const unsigned char* stage, int row, int column, float (&part)[kWarpRows / 16][kWarpColumns / 8][4]) {
    const Bf16* const of_a = reinterpret_cast<const Bf16*>(stage);
    const Bf16* const of_b = reinterpret_cast<const Bf16*>(stage + kABytes);
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kWarpRows / 16][4], b[kWarpColumns / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) LoadA<Swizzled<kRows>>(a[i], of_a, row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kWarpColumns / 16; ++j) LoadB<Swizzled<kColumns>>(b[j], of_b, column + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) MmaE4m3(part[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

#if SHOAL_HAS_WARP_GROUPS
  template <typename Work> __device__ static void ByWarpGroups(Work& work, unsigned char* shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4, row = warp * 16;
    float* const staging = reinterpret_cast<float*>(shared + kStages * kStageBytes) + warp * kStaging;
    Loading<Work> loading;
    bool more = loading.Start(work, shared);
    while (more) {
      const int m = loading.m(), n = loading.n(), blocks = loading.tile.blocks;
      float sums[1][kColumns / 8][4] = {}, part[1][kColumns / 8][4];
      for (int done = 0; done < blocks; ++done) {
        WaitCopies<kStages - 2>();
        PublishShared();
        __syncthreads();
        const Bf16* const a = reinterpret_cast<const Bf16*>(shared + done % kStages * kStageBytes) + group * 64 * kStep;
        const Bf16* const b = reinterpret_cast<const Bf16*>(shared + done % kStages * kStageBytes + kABytes);
        StartProducts();
        MultiplyWarpGroupE4m3<true>(part[0], a, b, 0);
#pragma unroll
        for (int k = 16; k < kStep; k += 16) MultiplyWarpGroupE4m3<false>(part[0], a, b, k);
        CommitProducts();
        // Over the operands of the block before: both groups had waited for their products before the barrier.
        loading.Load(shared + (done + kStages - 1) % kStages * kStageBytes);
        Scales<Work::kGated, 2> scales;
        scales.Load(loading.tile, row + static_cast<int>(threadIdx.x) % 32 / 4, done);
        WaitProducts<0>(part[0]);
        AddScaled(sums, part, scales);
      }
      __syncthreads();
      const TileResult result = loading.tile.result;
      const int64_t gates = loading.tile.n;
      more = loading.Start(work, shared);
      if (row < m) Store<Work>(sums, row, 0, m, n, gates, result, staging);
    }
  }
#endif
};

}  // namespace shoal::cuda
