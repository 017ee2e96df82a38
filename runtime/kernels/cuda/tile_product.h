// Tiles of matrix products, one after another by one block: each the sum over steps of k, which its caller hands out (so that they may
// come from any rows). bf16 by the tensor cores, f32 by plain multiply-adds.
//
// A Work hands out tiles: bool Next(Steps&, TileShape&, TileResult&), false behind the last; and its Steps the parts of one tile:
// bool Next(int most_k, Step<T>&). All threads of the block call both alike.
//
// Work::kGated: w has the F rows of a gate, then F of an up projection, and silu(gate) * up is written beside both (fused SwiGLU). A tile
// has half as many columns of each, 16 of the gate and then their 16 of up, so that a warp has what belongs together. In memory both lie
// as ever.
#pragma once

#include "runtime/kernels/cuda/gate.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/mma.h"
#include "runtime/kernels/cuda/warp_group.h"

namespace shoal::cuda {

// Dynamic shared memory that a block may have, at most; 0 if the device does not tell.
#ifdef __CUDACC__
inline int64_t SharedMemoryOfBlock() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : 0;
}
#else
inline int64_t SharedMemoryOfBlock() { return 227 * 1024; }
#endif

// Operands of one step: the first elements of a's and b's parts, and how many of k there are (at most TileProduct::kStep).
template <typename T> struct Step {
  const T* a;
  const T* b;
  int k;
};

struct TileShape {
  int64_t m, n;  // Rows and columns (gated: of the gate) of the result from the tile's first; may be more than the tile has.
  int64_t a_stride, b_stride;
  bool aligned;  // Addresses of all steps are multiples of 16 bytes; so are the strides and what is left of every row.
  int64_t inner = 0;  // F, where gated.
};

struct TileResult {
  void* data;  // Of the tile's first element.
  int64_t stride;
  bool f32;  // Else bf16.
  const float* addend;  // Added, f32 only: of the tile's first element, `stride` apart, maybe `data`. Null: none.
  // Gated, of bf16: F, and of h's first element of the tile; its rows lie F apart.
  int64_t inner = 0;
  void* h = nullptr;
};

// Columns that a tile of at most kColumns of both has for `gates` columns of the gate.
template <int kColumns> __device__ __forceinline__ int GatedColumns(int64_t gates) {
  return gates < kColumns / 2 ? static_cast<int>(Blocks(gates, 16)) * 32 : kColumns;
}
// Of a column of a gated tile: that of the gate, counted from the tile's first.
__device__ __forceinline__ int GateOf(int column) { return column / 32 * 16 + column % 16; }
__device__ __forceinline__ bool IsUp(int column) { return column % 32 >= 16; }

template <typename T> __device__ __forceinline__ bool AreAligned(const T* a, int64_t a_stride, const T* b, int64_t b_stride) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return IsAligned16(a) && IsAligned16(b) && a_stride % kElements == 0 && b_stride % kElements == 0;
}

// Eight elements of a row of the result, of which the first `count` exist.
__device__ __forceinline__ void Store8(const TileResult& result, int64_t at, int count, const float* values) {
  const bool whole = count >= 8 && IsAligned16(static_cast<unsigned char*>(result.data) + at * (result.f32 ? 4 : 2));
  if (result.f32) {
    float* const to = static_cast<float*>(result.data) + at;
    const float* const addend = result.addend == nullptr ? nullptr : result.addend + at;
    for (int i = 0; i < 8; i += 4) {
      if (whole && (addend == nullptr || IsAligned16(addend))) {
        Pack<float, 4> sums = addend == nullptr ? Pack<float, 4>{} : *reinterpret_cast<const Pack<float, 4>*>(addend + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.at[j] += values[i + j];
        *reinterpret_cast<Pack<float, 4>*>(to + i) = sums;
      } else {
        for (int j = i; j < i + 4 && j < count; ++j) to[j] = addend == nullptr ? values[j] : addend[j] + values[j];
      }
    }
  } else {
    Bf16* const to = static_cast<Bf16*>(result.data) + at;
    if (whole) {
      Pack<uint32_t, 4> pack;
#pragma unroll
      for (int j = 0; j < 4; ++j) pack.at[j] = PackBf16(values[2 * j], values[2 * j + 1]);
      *reinterpret_cast<Pack<uint32_t, 4>*>(to) = pack;
    } else {
      for (int j = 0; j < 8 && j < count; ++j) to[j] = FromFloat<Bf16>(values[j]);
    }
  }
}

// Sums go through shared memory on their way out, each warp's through its own kStaging floats, so that rows are written by accesses of 16
// bytes that lie together: 16 rows of 32 columns, from tile j on.
constexpr int kStagingStride = 36, kStaging = 16 * kStagingStride;
template <int kTilesN> __device__ __forceinline__ void Stage(const float (&sums)[kTilesN][4], int j, float* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const own = staging + lane / 4 * kStagingStride + lane % 4 * 2;
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    *reinterpret_cast<Pack<float, 2>*>(own + 8 * l) = {sums[j + l][0], sums[j + l][1]};
    *reinterpret_cast<Pack<float, 2>*>(own + 8 * l + 8 * kStagingStride) = {sums[j + l][2], sums[j + l][3]};
  }
}

// A warp's sums, 16 kTilesM x 8 kTilesN from (row, column) on, of a tile of m x n.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void StoreSums(const float (&sums)[kTilesM][kTilesN][4], int row, int column, int m, int n,
                                          const TileResult& result, float* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; j += 4) {
      Stage(sums[i], j, staging);
      __syncwarp();
      const int at_column = column + 8 * j + lane % 4 * 8;
      for (int r = lane / 4; r < 16; r += 8) {
        const int at_row = row + 16 * i + r;
        if (at_row < m && at_column < n) {
          Store8(result, at_row * result.stride + at_column, n - at_column, staging + r * kStagingStride + lane % 4 * 8);
        }
      }
      __syncwarp();
    }
  }
}

// The same of a gated tile; `gates`: the gate's columns from the tile's first.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void StoreGated(const float (&sums)[kTilesM][kTilesN][4], int row, int column, int m, int64_t gates,
                                           const TileResult& result, float* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const TileResult h = {result.h, result.inner, false, nullptr};
  const auto left = [&](int gate) { return gates - gate < 8 ? static_cast<int>(gates - gate) : 8; };
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; j += 4) {
      Stage(sums[i], j, staging);
      __syncwarp();
      const int of_lane = column + 8 * j + lane % 4 * 8, gate = GateOf(of_lane);
      for (int r = lane / 4; r < 16; r += 8) {
        const int64_t at = (row + 16 * i + r) * result.stride + gate + (IsUp(of_lane) ? result.inner : 0);
        if (row + 16 * i + r < m && gate < gates) Store8(result, at, left(gate), staging + r * kStagingStride + lane % 4 * 8);
      }
      const int of_h = GateOf(column + 8 * j) + lane % 2 * 8, h_row = row + 16 * i + lane / 2;
      if (h_row < m && of_h < gates) {
        const float* const gated = staging + lane / 2 * kStagingStride + lane % 2 * 8;
        float values[8];
        // Of what is stored, as if it was read again.
        for (int l = 0; l < 8; ++l) {
          values[l] = Gated<Bf16>(ToFloat(FromFloat<Bf16>(gated[l])), ToFloat(FromFloat<Bf16>(gated[16 + l])));
        }
        Store8(h, h_row * h.stride + of_h, left(of_h), values);
      }
      __syncwarp();
    }
  }
}

// Either, of a tile of work.
template <typename Work, int kTilesM, int kTilesN>
__device__ __forceinline__ void Store(const float (&sums)[kTilesM][kTilesN][4], int row, int column, int m, int n, int64_t gates,
                                      const TileResult& result, float* staging) {
  if constexpr (Work::kGated) {
    StoreGated(sums, row, column, m, gates, result, staging);
  } else {
    StoreSums(sums, row, column, m, n, result, staging);
  }
}

// The tiles c[m, n] = a b of a Work. kAAcross: a lies as [k][m], else [m][k]; kBAcross: b lies as [k][n], else [n][k].
template <typename T, bool kAAcross, bool kBAcross> struct TileProduct;

template <bool kAAcross, bool kBAcross> struct TileProduct<Bf16, kAAcross, kBAcross> {
  static constexpr int kRows = 128, kColumns = 256, kStep = 64, kStages = 3;
  static constexpr int kThreads = 256, kBlocks = 1;  // Of a multiprocessor.
  static constexpr int kABytes = kRows * kStep * 2, kStageBytes = kABytes + kColumns * kStep * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes + kThreads / 32 * kStaging * 4;
  // With warp groups one stage more: the products of one still run while the next ones are put there. Taken where a block may have it.
  static constexpr int kSharedBytesMost = kSharedBytes + kStageBytes;
  using ALayout = Swizzled<kAAcross ? kStep : kRows>;
  using BLayout = Swizzled<kBAcross ? kStep : kColumns>;
  // Of a warp's part of the tile.
  static constexpr int kWarpRows = 64, kWarpColumns = 64;

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
    typename Work::Steps steps;
    TileShape shape;
    TileResult result;
    int loaded = 0;  // Steps.

    __device__ int m() const { return static_cast<int>(shape.m < kRows ? shape.m : kRows); }
    __device__ int n() const {
      if constexpr (Work::kGated) return GatedColumns<kColumns>(shape.n);
      return static_cast<int>(shape.n < kColumns ? shape.n : kColumns);
    }
    // Takes the next tile and puts its first steps into stages 0 ... All stages must be free.
    __device__ bool Start(Work& work, unsigned char* shared) {
      if (!work.Next(steps, shape, result)) return false;
      loaded = 0;
      for (int stage = 0; stage < kStages - 1; ++stage) Load(shared + stage * kStageBytes);
      if (result.addend != nullptr) {  // Lines of 32 elements.
        for (int line = static_cast<int>(threadIdx.x); line < kRows * kColumns / 32; line += kThreads) {
          const int row = line / (kColumns / 32), column = line % (kColumns / 32) * 32;
          if (row < m() && column < n()) Prefetch(result.addend + row * result.stride + column);
        }
      }
      return true;
    }
    __device__ void Load(unsigned char* stage) { loaded += TileProduct::Load<Work::kGated>(steps, shape, m(), n(), stage); }
  };

  template <typename Work> __device__ static void ByWarps(Work& work, unsigned char* shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int row = warp % 2 * kWarpRows, column = warp / 2 * kWarpColumns;
    float* const staging = reinterpret_cast<float*>(shared + kStages * kStageBytes) + warp * kStaging;
    Loading<Work> tile;
    bool more = tile.Start(work, shared);
    while (more) {
      const int m = tile.m(), n = tile.n();
      const bool has_part = row < m && column < n;
      float sums[kWarpRows / 16][kWarpColumns / 8][4] = {};
      for (int done = 0; done < tile.loaded; ++done) {
        WaitCopies<kStages - 2>();
        __syncthreads();
        tile.Load(shared + (done + kStages - 1) % kStages * kStageBytes);
        if (has_part) Multiply(shared + done % kStages * kStageBytes, row, column, sums);
      }
      __syncthreads();
      const TileResult result = tile.result;
      const int64_t gates = tile.shape.n;
      const bool nothing = tile.loaded == 0 && result.addend == result.data;
      more = tile.Start(work, shared);
      if (has_part && !nothing) Store<Work>(sums, row, column, m, n, gates, result, staging);
    }
  }

#if SHOAL_HAS_WARP_GROUPS
  template <typename Work> __device__ static void ByWarpGroups(Work& work, unsigned char* shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4, row = warp * 16;
    float* const staging = reinterpret_cast<float*>(shared + (kStages + 1) * kStageBytes) + warp * kStaging;
    Loading<Work> tile;
    bool more = tile.Start(work, shared);
    while (more) {
      float sums[1][kColumns / 8][4] = {};
      for (int done = 0; done < tile.loaded; ++done) {
        WaitCopies<kStages - 2>();
        PublishShared();
        __syncthreads();
        const Bf16* const a = reinterpret_cast<const Bf16*>(shared + done % (kStages + 1) * kStageBytes) + group * 64 * kStep;
        const Bf16* const b = reinterpret_cast<const Bf16*>(shared + done % (kStages + 1) * kStageBytes + kABytes);
        StartProducts();
#pragma unroll
        for (int k = 0; k < kStep; k += 16) MultiplyWarpGroup<kAAcross, kBAcross>(sums[0], a, b, k);
        CommitProducts();
        // Over the operands of two steps ago: both groups had waited for their products before the barrier.
        tile.Load(shared + (done + kStages - 1) % (kStages + 1) * kStageBytes);
        WaitProducts<1>();
      }
      WaitProducts<0>(sums[0]);
      __syncthreads();
      const int m = tile.m(), n = tile.n();
      const TileResult result = tile.result;
      const int64_t gates = tile.shape.n;
      const bool nothing = tile.loaded == 0 && result.addend == result.data;
      more = tile.Start(work, shared);
      if (row < m && !nothing) Store<Work>(sums, row, 0, m, n, gates, result, staging);
    }
  }
#endif

  // One group of copies, empty behind the last step. Returns how many steps it loads.
  template <bool kGated, typename Steps>
  __device__ static int Load(Steps& steps, const TileShape& shape, int m, int n, unsigned char* stage) {
    Step<Bf16> step;
    const bool more = steps.Next(kStep, step);
    if (more) {
      Bf16* const a = reinterpret_cast<Bf16*>(stage);
      Bf16* const b = reinterpret_cast<Bf16*>(stage + kABytes);
      if (kAAcross) {
        LoadTile<ALayout, kStep, kRows, kThreads>(a, step.a, shape.a_stride, step.k, m, shape.aligned);
      } else {
        LoadTile<ALayout, kRows, kStep, kThreads>(a, step.a, shape.a_stride, m, step.k, shape.aligned);
      }
      if constexpr (kGated) {
        const auto row_at = [&](int line) {
          const int64_t gate = GateOf(line);
          return gate < shape.n ? step.b + (gate + (IsUp(line) ? shape.inner : 0)) * shape.b_stride : nullptr;
        };
        LoadRows<BLayout, kColumns, kStep, kThreads>(b, row_at, step.b, step.k, shape.aligned);
      } else if (kBAcross) {
        LoadTile<BLayout, kStep, kColumns, kThreads>(b, step.b, shape.b_stride, step.k, n, shape.aligned);
      } else {
        LoadTile<BLayout, kColumns, kStep, kThreads>(b, step.b, shape.b_stride, n, step.k, shape.aligned);
      }
    }
    CommitCopies();
    return more ? 1 : 0;
  }

  struct Fragments {
    uint32_t a[kWarpRows / 16][4], b[kWarpColumns / 16][4];

    __device__ void Load(const Bf16* shared_a, const Bf16* shared_b, int row, int column, int k) {
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        if (kAAcross) {
          LoadATransposed<ALayout>(a[i], shared_a, row + 16 * i, k);
        } else {
          LoadA<ALayout>(a[i], shared_a, row + 16 * i, k);
        }
      }
#pragma unroll
      for (int j = 0; j < kWarpColumns / 16; ++j) {
        if (kBAcross) {
          LoadBTransposed<BLayout>(b[j], shared_b, column + 16 * j, k);
        } else {
          LoadB<BLayout>(b[j], shared_b, column + 16 * j, k);
        }
      }
    }
  };

  __device__ static void Multiply(const unsigned char* stage, int row, int column, float (&sums)[kWarpRows / 16][kWarpColumns / 8][4]) {
    const Bf16* const a = reinterpret_cast<const Bf16*>(stage);
    const Bf16* const b = reinterpret_cast<const Bf16*>(stage + kABytes);
    Fragments fragments[2];  // One is loaded while the other is multiplied.
    fragments[0].Load(a, b, row, column, 0);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      if (k + 1 < kStep / 16) fragments[(k + 1) % 2].Load(a, b, row, column, 16 * (k + 1));
      const Fragments& now = fragments[k % 2];
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) Mma(sums[i][j], now.a[i], now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
};

template <bool kAAcross, bool kBAcross> struct TileProduct<float, kAAcross, kBAcross> {
  static constexpr int kRows = 64, kColumns = 64, kStep = 16;
  static constexpr int kThreads = 256, kBlocks = 3;
  static constexpr int kStride = kRows + 4;  // Both parts lie as [k][row or column].
  static constexpr int kSharedBytes = 2 * kStep * kStride * 4, kSharedBytesMost = kSharedBytes;

  template <typename Work> __device__ static void Run(Work& work, unsigned char* shared) {
    static_assert(!Work::kGated);
    typename Work::Steps steps;
    TileShape shape;
    TileResult result;
    while (work.Next(steps, shape, result)) Tile(steps, shape, result, shared);
  }

 private:
  template <typename Steps>
  __device__ static void Tile(Steps& steps, const TileShape& shape, const TileResult& result, unsigned char* shared) {
    const int m = static_cast<int>(shape.m < kRows ? shape.m : kRows), n = static_cast<int>(shape.n < kColumns ? shape.n : kColumns);
    float* const a = reinterpret_cast<float*>(shared);
    float* const b = a + kStep * kStride;
    const int row = static_cast<int>(threadIdx.x) / 16 * 4, column = static_cast<int>(threadIdx.x) % 16 * 4;
    float sums[4][4] = {};
    Step<float> step;
    while (steps.Next(kStep, step)) {
      Load<kAAcross>(a, step.a, shape.a_stride, m, step.k);
      Load<kBAcross>(b, step.b, shape.b_stride, n, step.k);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        const auto left = *reinterpret_cast<const Pack<float, 4>*>(a + k * kStride + row);
        const auto right = *reinterpret_cast<const Pack<float, 4>*>(b + k * kStride + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = __fmaf_rn(left.at[i], right.at[j], sums[i][j]);
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < 4 && row + i < m; ++i) {
      for (int j = 0; j < 4 && column + j < n; ++j) {
        const int64_t at = (row + i) * result.stride + column + j;
        static_cast<float*>(result.data)[at] = result.addend == nullptr ? sums[i][j] : result.addend[at] + sums[i][j];
      }
    }
  }

  template <bool kAcross> __device__ static void Load(float* to, const float* from, int64_t stride, int lines, int step_k) {
#pragma unroll
    for (int first = 0; first < kRows * kStep; first += kThreads) {
      const int item = first + static_cast<int>(threadIdx.x);
      const int line = kAcross ? item % kRows : item / kStep, k = kAcross ? item / kRows : item % kStep;
      const bool inside = line < lines && k < step_k;
      to[k * kStride + line] = inside ? from[kAcross ? k * stride + line : line * stride + k] : 0.0f;
    }
  }
};

}  // namespace shoal::cuda
