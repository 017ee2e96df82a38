// Causal attention of bf16 by the tensor cores, forward and backward (Dao, 2023, "FlashAttention-2", arXiv 2307.08691): scores and their
// gradients stay in registers, where the sums of one product are the left operand of the next. No atomic additions: the backward pass
// has one kernel for the gradients of keys and values and one for those of queries, each of which recomputes the scores, so that every
// sum has one order.
#pragma once

#include "runtime/kernels/cuda/attention_shape.h"
#include "runtime/kernels/cuda/mma.h"

namespace shoal::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// For heads of up to kDim (64, 128 or 256), a multiple of 16 or not: shared memory has zeros beside.
template <int kDim> struct AttentionTiles {
  using Layout = Padded<kDim>;
  static constexpr bool kWide = kDim > 128;
  static constexpr int kOther = kWide ? 32 : 64;           // Rows of the operands that a kernel walks over.
  static constexpr int kOtherElements = kOther * Layout::kStride;
  static constexpr int kRowTiles = kWide ? 1 : 2;          // Forward: 16 queries each, per warp.
  static constexpr int kQueries = 64 * kRowTiles;          // Forward, of a block of 4 warps.
  static constexpr int kOwn = 64;                          // Backward: rows of a block's own, 16 of a warp.
  static constexpr int kOwnElements = kOwn * Layout::kStride;
  static constexpr int kParts = kWide ? 2 : 1;             // Of the columns of dK and dV: registers of one warp hold 128 of both.
  static constexpr int kForwardShared = (kQueries * Layout::kStride + 4 * kOtherElements) * 2;
  static constexpr int kBackwardShared = (2 * kOwnElements + 4 * kOtherElements) * 2 + 4 * kOther * 4;
};

// sums[j] += rows [row, row + 16) of a times rows [8 j, 8 j + 8) of b, both over the columns of a head.
template <typename Layout, int kDim, int kTiles>
__device__ __forceinline__ void MultiplyRows(const Bf16* a, int row, const Bf16* b, int dim, float (&sums)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    if (k >= dim) break;
    uint32_t left[4], right[4];
    LoadA<Layout>(left, a, row, k);
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      LoadB<Layout>(right, b, 16 * j, k);
      Mma(sums[2 * j], left, right[0], right[1]);
      Mma(sums[2 * j + 1], left, right[2], right[3]);
    }
  }
}

// sums += p b[:, first_column ...], p being the fragments of 16 rows and 16 kSteps columns.
template <typename Layout, int kSteps, int kTiles>
__device__ __forceinline__ void MultiplyBy(const uint32_t (&p)[kSteps][4], const Bf16* b, int first_column, int dim, float (&sums)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      if (first_column + 16 * n >= dim) break;
      uint32_t right[4];
      LoadBTransposed<Layout>(right, b, first_column + 16 * n, 16 * k);
      Mma(sums[2 * n], p[k], right[0], right[1]);
      Mma(sums[2 * n + 1], p[k], right[2], right[3]);
    }
  }
}

template <int kTiles> __device__ __forceinline__ void RoundToFragments(const float (&sums)[kTiles][4], uint32_t (&p)[kTiles / 2][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[k][i] = PackBf16(sums[2 * k + i / 2][i % 2 * 2], sums[2 * k + i / 2][i % 2 * 2 + 1]);
  }
}

// The maximum or sum over the four lanes that hold a row of c.
__device__ __forceinline__ float QuadMax(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ __forceinline__ float QuadSum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Columns [first_column ...) of rows g and g + 8 of c, times factors[0] and [1], to rows of `to` that are `stride` apart.
template <int kTiles>
__device__ __forceinline__ void StoreRows(const float (&sums)[kTiles][4], const float (&factors)[2], int rows, int first_column, int dim, Bf16* to,
                                          int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const bool pairs = dim % 2 == 0 && reinterpret_cast<uintptr_t>(to) % 4 == 0 && stride % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + 8 * half >= rows) break;
    Bf16* const row = to + (g + 8 * half) * stride;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = first_column + 8 * n + 2 * t;
      const float low = sums[n][2 * half] * factors[half], high = sums[n][2 * half + 1] * factors[half];
      if (pairs) {
        if (column < dim) *reinterpret_cast<uint32_t*>(row + column) = PackBf16(low, high);
      } else {
        if (column < dim) row[column] = FromFloat<Bf16>(low);
        if (column + 1 < dim) row[column + 1] = FromFloat<Bf16>(high);
      }
    }
  }
}

// What a warp knows of its 16 kRowTiles queries while it walks over keys.
template <int kDim> struct OnlineSoftmax {
  using Tiles = AttentionTiles<kDim>;
  static constexpr int kRowTiles = Tiles::kRowTiles;
  float out[kRowTiles][kDim / 8][4] = {};
  float largest[kRowTiles][2];   // Score, before scaling.
  float sum[kRowTiles][2] = {};  // Of this lane's columns.

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) largest[r][0] = largest[r][1] = -INFINITY;
  }

  // `ahead`: the first query of the warp less the first key.
  __device__ __forceinline__ void Take(const Bf16* q, int row, const Bf16* k, const Bf16* v, int dim, int64_t ahead, float scale_log2) {
    constexpr int kTiles = Tiles::kOther / 8;
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float scores[kTiles][4] = {};
      MultiplyRows<typename Tiles::Layout, kDim>(q, row + 16 * r, k, dim, scores);
      if (ahead + 16 * r < Tiles::kOther) {  // On the diagonal.
        const int query = static_cast<int>(ahead) + 16 * r + g;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (8 * j + 2 * t + i % 2 > query + i / 2 * 8) scores[j][i] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = largest[r][half];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        most = QuadMax(most);  // Finite: the first key is seen by all queries.
        const float correction = Exp2((largest[r][half] - most) * scale_log2);
        largest[r][half] = most;
        sum[r][half] *= correction;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) sum[r][half] += scores[j][i] = Exp2((scores[j][i] - most) * scale_log2);
        }
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) out[r][n][2 * half] *= correction, out[r][n][2 * half + 1] *= correction;
      }
      uint32_t p[kTiles / 2][4];
      RoundToFragments(scores, p);
      MultiplyBy<typename Tiles::Layout>(p, v, 0, dim, out[r]);
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(128, 2)
    AttentionKernel(Sequences s, const Bf16* qkv, Bf16* out, float* lse, float scale, bool aligned) {
  using Tiles = AttentionTiles<kDim>;
  using Layout = typename Tiles::Layout;
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_kv = shared + Tiles::kQueries * Layout::kStride;
  const Place place = LongestFirst(s, s.heads, Tiles::kQueries);
  const int64_t width = s.qkv_width();
  const Bf16* const first = qkv + place.first_token * width;
  const Bf16* const k = first + s.key_column(s.kv_head(place.head));
  const auto load = [&](int64_t begin, Bf16* stage) {
    const int rows = static_cast<int>(s.seq - begin < Tiles::kOther ? s.seq - begin : Tiles::kOther);
    LoadTile<Layout, Tiles::kOther, kDim, 128>(stage, k + begin * width, width, rows, s.dim, aligned);
    LoadTile<Layout, Tiles::kOther, kDim, 128>(stage + Tiles::kOtherElements, k + s.kv_width() + begin * width, width, rows, s.dim, aligned);
    CommitCopies();
  };
  const int queries = static_cast<int>(s.seq - place.begin < Tiles::kQueries ? s.seq - place.begin : Tiles::kQueries);
  LoadTile<Layout, Tiles::kQueries, kDim, 128>(shared, first + place.begin * width + place.head * s.dim, width, queries, s.dim, aligned);
  load(0, shared_kv);
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 * Tiles::kRowTiles;
  OnlineSoftmax<kDim> softmax;
  int stage = 0;
  for (int64_t begin = 0; begin < place.begin + queries; begin += Tiles::kOther, stage ^= 1) {
    WaitCopies<0>();
    __syncthreads();
    if (begin + Tiles::kOther < place.begin + queries) load(begin + Tiles::kOther, shared_kv + (stage ^ 1) * 2 * Tiles::kOtherElements);
    const Bf16* const now = shared_kv + stage * 2 * Tiles::kOtherElements;
    const int64_t ahead = place.begin + row - begin;
    if (ahead + 16 * Tiles::kRowTiles > 0) softmax.Take(shared, row, now, now + Tiles::kOtherElements, s.dim, ahead, scale * kLog2E);
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < Tiles::kRowTiles; ++r) {
    const int64_t token = place.first_token + place.begin + row + 16 * r;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = QuadSum(softmax.sum[r][half]);
      inverse[half] = 1.0f / sum;
      const int own = lane / 4 + 8 * half;
      if (lane % 4 == 0 && row + 16 * r + own < queries) lse[(token + own) * s.heads + place.head] = softmax.largest[r][half] * scale + logf(sum);
    }
    StoreRows(softmax.out[r], inverse, queries - row - 16 * r, 0, s.dim, out + token * s.q_width() + place.head * s.dim, s.q_width());
  }
}

// From scores to p = exp(score - lse), rounded fragments of it, and in `scores` ds = p (dp - delta). `sees(j, i)`: whether element i of
// tile j counts; `lse` (times log2 e) and `delta` of it likewise.
template <int kTiles, typename Sees, typename Lse, typename Delta>
__device__ __forceinline__ void ScoreGradient(float (&scores)[kTiles][4], const float (&dp)[kTiles][4], float scale_log2, const Sees& sees,
                                              const Lse& lse, const Delta& delta, uint32_t (*p)[4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float exact[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exact[i] = sees(j, i) ? Exp2(scores[j][i] * scale_log2 - lse(j, i)) : 0.0f;
      scores[j][i] = exact[i] * (dp[j][i] - delta(j, i));
    }
    if (p != nullptr) {
      p[j / 2][j % 2 * 2] = PackBf16(exact[0], exact[1]);
      p[j / 2][j % 2 * 2 + 1] = PackBf16(exact[2], exact[3]);
    }
  }
}

// dK and dV of a block of keys: over the query heads that read it, in their order, and the queries from the keys on. Works on the
// transpose: scores of 16 keys per warp.
template <int kDim>
__global__ void __launch_bounds__(128 * AttentionTiles<kDim>::kParts, AttentionTiles<kDim>::kWide ? 1 : 2)
    AttentionKeysKernel(Sequences s, const Bf16* qkv, const float* lse, const float* delta, const Bf16* dout, Bf16* dqkv, float scale, bool aligned) {
  using Tiles = AttentionTiles<kDim>;
  using Layout = typename Tiles::Layout;
  constexpr int kThreads = 128 * Tiles::kParts, kColumns = kDim / Tiles::kParts, kTiles = Tiles::kOther / 8;
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_v = shared + Tiles::kOwnElements;
  Bf16* const stages = shared_v + Tiles::kOwnElements;
  float* const statistics = reinterpret_cast<float*>(stages + 4 * Tiles::kOtherElements);  // Per stage: lse log2 e, delta.
  const Place place = ShortestLast(s, s.kv_heads, Tiles::kOwn);
  const int64_t width = s.qkv_width();
  const int64_t column = s.key_column(place.head), first_row = place.first_token + place.begin;
  const int keys = static_cast<int>(s.seq - place.begin < Tiles::kOwn ? s.seq - place.begin : Tiles::kOwn);
  const int group = s.heads / s.kv_heads;
  const int64_t per_head = Blocks(s.seq - place.begin, Tiles::kOther), steps = per_head * group;
  const auto load = [&](int64_t step, int stage) {
    const int head = place.head * group + static_cast<int>(step / per_head);
    const int64_t begin = place.begin + step % per_head * Tiles::kOther, token = place.first_token + begin;
    const int rows = static_cast<int>(s.seq - begin < Tiles::kOther ? s.seq - begin : Tiles::kOther);
    Bf16* const to = stages + stage * 2 * Tiles::kOtherElements;
    LoadTile<Layout, Tiles::kOther, kDim, kThreads>(to, qkv + token * width + head * s.dim, width, rows, s.dim, aligned);
    LoadTile<Layout, Tiles::kOther, kDim, kThreads>(to + Tiles::kOtherElements, dout + token * s.q_width() + head * s.dim, s.q_width(), rows,
                                                    s.dim, aligned);
    CommitCopies();
    const int own = static_cast<int>(threadIdx.x);
    if (own < Tiles::kOther) {
      const int64_t at = (token + own) * s.heads + head;
      statistics[stage * 2 * Tiles::kOther + own] = own < rows ? lse[at] * kLog2E : 0.0f;
      statistics[(stage * 2 + 1) * Tiles::kOther + own] = own < rows ? delta[at] : 0.0f;
    }
  };
  LoadTile<Layout, Tiles::kOwn, kDim, kThreads>(shared, qkv + first_row * width + column, width, keys, s.dim, aligned);
  LoadTile<Layout, Tiles::kOwn, kDim, kThreads>(shared_v, qkv + first_row * width + column + s.kv_width(), width, keys, s.dim, aligned);
  load(0, 0);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int row = warp % 4 * 16, first_column = warp / 4 * kColumns;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const int stage = static_cast<int>(step % 2);
    WaitCopies<0>();
    __syncthreads();
    if (step + 1 < steps) load(step + 1, stage ^ 1);
    const int64_t ahead = step % per_head * Tiles::kOther - row;  // The first query less the warp's first key.
    if (ahead + Tiles::kOther <= 0) continue;
    const Bf16* const q = stages + stage * 2 * Tiles::kOtherElements;
    const Bf16* const o = q + Tiles::kOtherElements;
    const float* const query_lse = statistics + stage * 2 * Tiles::kOther;
    float scores[kTiles][4] = {}, dp[kTiles][4] = {};
    MultiplyRows<Layout, kDim>(shared, row, q, s.dim, scores);
    MultiplyRows<Layout, kDim>(shared_v, row, o, s.dim, dp);
    // Queries behind the end have rows of zeros in q and dout, so that their scores add nothing.
    const int key = g - static_cast<int>(ahead < 16 ? ahead : 16);
    uint32_t p[kTiles / 2][4], ds[kTiles / 2][4];
    ScoreGradient(
        scores, dp, scale * kLog2E, [&](int j, int i) { return key + i / 2 * 8 <= 8 * j + 2 * t + i % 2; },
        [&](int j, int i) { return query_lse[8 * j + 2 * t + i % 2]; }, [&](int j, int i) { return query_lse[Tiles::kOther + 8 * j + 2 * t + i % 2]; },
        p);
    RoundToFragments(scores, ds);
    MultiplyBy<Layout>(p, o, first_column, s.dim, dv);
    MultiplyBy<Layout>(ds, q, first_column, s.dim, dk);
  }
  Bf16* const to = dqkv + (first_row + row) * width + column;
  StoreRows(dk, {scale, scale}, keys - row, first_column, s.dim, to, width);
  StoreRows(dv, {1.0f, 1.0f}, keys - row, first_column, s.dim, to + s.kv_width(), width);
}

// dQ of a block of queries of one head, over the keys up to them.
template <int kDim>
__global__ void __launch_bounds__(128, AttentionTiles<kDim>::kWide ? 1 : 2)
    AttentionQueriesKernel(Sequences s, const Bf16* qkv, const float* lse, const float* delta, const Bf16* dout, Bf16* dqkv, float scale,
                           bool aligned) {
  using Tiles = AttentionTiles<kDim>;
  using Layout = typename Tiles::Layout;
  constexpr int kTiles = Tiles::kOther / 8;
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_dout = shared + Tiles::kOwnElements;
  Bf16* const stages = shared_dout + Tiles::kOwnElements;
  const Place place = LongestFirst(s, s.heads, Tiles::kOwn);
  const int64_t width = s.qkv_width();
  const Bf16* const k = qkv + place.first_token * width + s.key_column(s.kv_head(place.head));
  const int64_t first_row = place.first_token + place.begin;
  const int queries = static_cast<int>(s.seq - place.begin < Tiles::kOwn ? s.seq - place.begin : Tiles::kOwn);
  const auto load = [&](int64_t begin, int stage) {
    const int rows = static_cast<int>(s.seq - begin < Tiles::kOther ? s.seq - begin : Tiles::kOther);
    Bf16* const to = stages + stage * 2 * Tiles::kOtherElements;
    LoadTile<Layout, Tiles::kOther, kDim, 128>(to, k + begin * width, width, rows, s.dim, aligned);
    LoadTile<Layout, Tiles::kOther, kDim, 128>(to + Tiles::kOtherElements, k + s.kv_width() + begin * width, width, rows, s.dim, aligned);
    CommitCopies();
  };
  LoadTile<Layout, Tiles::kOwn, kDim, 128>(shared, qkv + first_row * width + place.head * s.dim, width, queries, s.dim, aligned);
  LoadTile<Layout, Tiles::kOwn, kDim, 128>(shared_dout, dout + first_row * s.q_width() + place.head * s.dim, s.q_width(), queries, s.dim, aligned);
  load(0, 0);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int row = warp * 16;
  float own_lse[2] = {}, own_delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + g + 8 * half;
    if (own < queries) {
      own_lse[half] = lse[(first_row + own) * s.heads + place.head] * kLog2E;
      own_delta[half] = delta[(first_row + own) * s.heads + place.head];
    }
  }
  float dq[kDim / 8][4] = {};
  int stage = 0;
  for (int64_t begin = 0; begin < place.begin + queries; begin += Tiles::kOther, stage ^= 1) {
    WaitCopies<0>();
    __syncthreads();
    if (begin + Tiles::kOther < place.begin + queries) load(begin + Tiles::kOther, stage ^ 1);
    const int64_t ahead = place.begin + row - begin;
    if (ahead + 16 <= 0) continue;
    const Bf16* const keys = stages + stage * 2 * Tiles::kOtherElements;
    float scores[kTiles][4] = {}, dp[kTiles][4] = {};
    MultiplyRows<Layout, kDim>(shared, row, keys, s.dim, scores);
    MultiplyRows<Layout, kDim>(shared_dout, row, keys + Tiles::kOtherElements, s.dim, dp);
    const int query = static_cast<int>(ahead < Tiles::kOther ? ahead : Tiles::kOther) + g;
    ScoreGradient(
        scores, dp, scale * kLog2E, [&](int j, int i) { return 8 * j + 2 * t + i % 2 <= query + i / 2 * 8; },
        [&](int, int i) { return own_lse[i / 2]; }, [&](int, int i) { return own_delta[i / 2]; }, nullptr);
    uint32_t ds[kTiles / 2][4];
    RoundToFragments(scores, ds);
    MultiplyBy<Layout>(ds, keys, 0, s.dim, dq);
  }
  StoreRows(dq, {scale, scale}, queries - row, 0, s.dim, dqkv + (first_row + row) * width + place.head * s.dim, width);
}

}  // namespace shoal::cuda
