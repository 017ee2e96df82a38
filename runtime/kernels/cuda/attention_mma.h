// Causal attention of bf16 by the tensor cores, forward and backward (Dao, 2023, "FlashAttention-2", arXiv 2307.08691): scores and their
// gradients stay in registers, where the sums of one product are the left operand of the next; attention_products.h multiplies. No
// atomic additions: the backward pass has one kernel for the gradients of keys and values and one for those of queries, each of which
// recomputes the scores, so that every sum has one order.
#pragma once

#include "runtime/kernels/cuda/attention_products.h"
#include "runtime/kernels/cuda/attention_shape.h"

namespace shoal::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// For heads of up to kDim (64, 128 or 256), a multiple of 16 or not: shared memory has zeros beside.
template <int kDim> struct AttentionTiles {
  static constexpr bool kWide = kDim > 128;
  static constexpr int kOther = kWide ? 32 : 64;               // Rows of the operands that a kernel walks over.
  static constexpr int kRowTiles = kWide ? 1 : 2;              // Forward: 16 queries each, per warp.
  static constexpr int kQueries = 64 * kRowTiles;              // Forward, of a block of 4 warps.
  static constexpr int kOwn = 64;                              // Backward: rows of a block's own, 16 of a warp.
  static constexpr int kParts = kWide ? 2 : 1;                 // Of the columns of dK and dV: registers of one warp hold 128 of both.
  static constexpr int kRowBytes = Padded<kDim>::kStride * 2;  // At most.
  static constexpr int kForwardShared = (kQueries + 4 * kOther) * kRowBytes;
  static constexpr int kBackwardShared = (2 * kOwn + 4 * kOther) * kRowBytes + 6 * kOther * 4;
};

// Calls body with the products that the chip is best at.
template <int kDim, typename Body> __device__ __forceinline__ void WithProducts(const Body& body) {
#if SHOAL_HAS_WARP_GROUPS
  if constexpr (kDim <= 128) {
#ifndef __CUDACC__
    if (blockIdx.x % 2 != 0) return body(WarpProducts<kDim>());  // The emulator has both, with the same bits.
#endif
    return body(GroupProducts<kDim>());
  }
#endif
  body(WarpProducts<kDim>());
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
__device__ __forceinline__ void StoreRows(const float (&sums)[kTiles][4], const float (&factors)[2], int rows, int first_column, int dim,
                                          Bf16* to, int64_t stride) {
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

// Scores of the queries `query` + g and + 8 + g by the keys from `begin` on that are before their first ones.
template <int kTiles>
__device__ __forceinline__ void HideKeysBefore(const Sequences& s, const Place& place, int64_t query, int64_t begin,
                                               float (&scores)[kTiles][4]) {
  if (s.first == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t first = s.first_key(place.first_token, query + g + 8 * half) - static_cast<int32_t>(begin);
    if (!__any_sync(0xffffffffu, first > 0)) continue;  // Whole warps: lanes that part here may not have met before the next product.
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + 2 * t + i < first) scores[j][2 * half + i] = -INFINITY;
      }
    }
  }
}
// The same with keys in rows and queries in columns. `first`: of the queries, less the block's first key, in shared memory; `row`: the
// warp's first key, counted from there.
template <int kTiles> __device__ __forceinline__ void HideQueriesBehind(const int32_t* first, int row, float (&scores)[kTiles][4]) {
  if (first[8 * kTiles - 1] <= row) return;  // The largest.
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + g + i / 2 * 8 < first[8 * j + 2 * t + i % 2]) scores[j][i] = -INFINITY;
    }
  }
}

// What a warp knows of 16 queries while it walks over keys.
template <int kDim> struct OnlineSoftmax {
  static constexpr int kTiles = AttentionTiles<kDim>::kOther / 8;
  float out[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // Score, before scaling.
  float sum[2] = {};                          // Of this lane's columns.

  // From scores to the fragments of their exponentials. `ahead`: the warp's first query less the first key.
  __device__ __forceinline__ void Take(float (&scores)[kTiles][4], int64_t ahead, float scale_log2, uint32_t (&p)[kTiles / 2][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    if (ahead < 8 * kTiles) {  // On the diagonal.
      const int query = static_cast<int>(ahead) + g;
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
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      most = QuadMax(most);
      const float from = fmaxf(most, kLowestScore);
      const float correction = Exp2((largest[half] - from) * scale_log2);
      largest[half] = most;
      sum[half] *= correction;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum[half] += scores[j][i] = Exp2((scores[j][i] - from) * scale_log2);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) out[n][2 * half] *= correction, out[n][2 * half + 1] *= correction;
    }
    RoundToFragments(scores, p);
  }
};

// Arguments of the kernels. `aligned`: rows of all heads may be copied by 16 bytes; scale: 1 / sqrt(dim).
struct ForwardArguments {
  Sequences s;
  const Bf16* qkv;
  Bf16* out;
  float* lse;
  float scale;
  bool aligned;
};
struct BackwardArguments {
  Sequences s;
  const Bf16* qkv;
  const float* lse;
  const float* delta;  // [token, head]: sum of dout * out.
  const Bf16* dout;
  Bf16* dqkv;
  float scale;
  bool aligned;
};

// Of a tile of kRows rows that begins with so many left.
template <int kRows> __device__ __forceinline__ int RowsOf(int64_t left) { return static_cast<int>(left < kRows ? left : kRows); }

template <typename Products, int kDim> __device__ __forceinline__ void AttentionForward(const ForwardArguments& in, Bf16* shared) {
  const Sequences& s = in.s;
  using Tiles = AttentionTiles<kDim>;
  constexpr int kRowTiles = Tiles::kRowTiles, kOther = Tiles::kOther, kOtherElements = kOther * Products::kRowElements;
  using OtherLayout = typename Products::template Layout<kOther>;
  Bf16* const stages = shared + Tiles::kQueries * Products::kRowElements;
  const Place place = LongestFirst(s, s.heads, Tiles::kQueries);
  const int64_t width = s.qkv_width();
  const Bf16* const first = in.qkv + place.first_token * width;
  const Bf16* const k = first + s.key_column(s.kv_head(place.head));
  const auto load = [&](int64_t begin, int stage) {
    const int rows = RowsOf<kOther>(s.seq - begin);
    Bf16* const to = stages + stage * 2 * kOtherElements;
    LoadTile<OtherLayout, kOther, kDim, 128>(to, k + begin * width, width, rows, s.dim, in.aligned);
    LoadTile<OtherLayout, kOther, kDim, 128>(to + kOtherElements, k + s.kv_width() + begin * width, width, rows, s.dim, in.aligned);
    CommitCopies();
  };
  const int queries = RowsOf<Tiles::kQueries>(s.seq - place.begin);
  const int64_t first_key = s.first_key(place.first_token, place.begin) / kOther * kOther;
  LoadTile<typename Products::template Layout<Tiles::kQueries>, Tiles::kQueries, kDim, 128>(
      shared, first + place.begin * width + place.head * s.dim, width, queries, s.dim, in.aligned);
  load(first_key, 0);
  const int row = static_cast<int>(threadIdx.x) / 32 * 16, lane = static_cast<int>(threadIdx.x) % 32;
  OnlineSoftmax<kDim> softmax[kRowTiles];
  int stage = 0;
  for (int64_t begin = first_key; begin < place.begin + queries; begin += kOther, stage ^= 1) {
    WaitCopies<0>();
    Products::Publish();
    __syncthreads();
    if (begin + kOther < place.begin + queries) load(begin + kOther, stage ^ 1);
    const Bf16* const now = stages + stage * 2 * kOtherElements;
    // The scores of one tile of queries are multiplied while the exponentials of the other are taken.
    float scores[kRowTiles][kOther / 8][4];
    uint32_t p[kRowTiles][kOther / 16][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) Products::template MultiplyRows<Tiles::kQueries>(shared, 64 * r, now, s.dim, scores[r]);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      Products::template Wait<kRowTiles - 1>(scores[r]);
      HideKeysBefore(s, place, place.begin + 64 * r + row, begin, scores[r]);
      softmax[r].Take(scores[r], place.begin + 64 * r + row - begin, in.scale * kLog2E, p[r]);
      Products::MultiplyBy(p[r], now + kOtherElements, 0, s.dim, softmax[r].out);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) Products::template Wait<0>(softmax[r].out);
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int first_row = 64 * r + row;
    const int64_t token = place.first_token + place.begin + first_row;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = QuadSum(softmax[r].sum[half]);
      inverse[half] = 1.0f / sum;
      const int own = lane / 4 + 8 * half;
      if (lane % 4 == 0 && first_row + own < queries)
        in.lse[(token + own) * s.heads + place.head] = softmax[r].largest[half] * in.scale + logf(sum);
    }
    StoreRows(softmax[r].out, inverse, queries - first_row, 0, s.dim, in.out + token * s.q_width() + place.head * s.dim, s.q_width());
  }
}

template <int kDim> __global__ void __launch_bounds__(128, 2) AttentionKernel(ForwardArguments in) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  WithProducts<kDim>([&](auto products) { AttentionForward<decltype(products), kDim>(in, shared); });
}

// From scores to p = exp(score - lse), rounded fragments of it, and in `scores` ds = p (dp - delta). `sees(j, i)`: whether element i of
// tile j counts; `lse` (times log2 e) and `delta` of it likewise.
template <int kTiles, typename Sees, typename Lse, typename Delta>
__device__ __forceinline__ void ScoreGradient(float (&scores)[kTiles][4], const float (&dp)[kTiles][4], float scale_log2,
                                              const Sees& sees, const Lse& lse, const Delta& delta, uint32_t (*p)[4]) {
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

// dK and dV of a block of keys: over the query heads that read it, in their order, and the queries from the keys on up to the first
// document behind them. Works on the transpose: scores of 16 keys per warp.
template <typename Products, int kDim> __device__ __forceinline__ void AttentionKeys(const BackwardArguments& in, Bf16* shared) {
  const Sequences& s = in.s;
  using Tiles = AttentionTiles<kDim>;
  constexpr int kThreads = 128 * Tiles::kParts, kColumns = kDim / Tiles::kParts, kOther = Tiles::kOther, kTiles = kOther / 8;
  constexpr int kOtherElements = kOther * Products::kRowElements;
  using OwnLayout = typename Products::template Layout<Tiles::kOwn>;
  using OtherLayout = typename Products::template Layout<kOther>;
  Bf16* const shared_v = shared + Tiles::kOwn * Products::kRowElements;
  Bf16* const stages = shared_v + Tiles::kOwn * Products::kRowElements;
  float* const statistics = reinterpret_cast<float*>(stages + 4 * kOtherElements);  // Per stage: lse log2 e, delta.
  int32_t* const firsts = reinterpret_cast<int32_t*>(statistics + 4 * kOther);      // Per stage: first keys, from place.begin on.
  const Place place = ShortestLast(s, s.kv_heads, Tiles::kOwn);
  const int64_t width = s.qkv_width();
  const int64_t column = s.key_column(place.head), first_row = place.first_token + place.begin;
  const int keys = RowsOf<Tiles::kOwn>(s.seq - place.begin);
  const int group = s.heads / s.kv_heads;
  const int64_t per_head = TilesSeeing(s, place, place.begin + keys, kOther), steps = per_head * group;
  const auto load = [&](int64_t step, int stage) {
    const int head = place.head * group + static_cast<int>(step / per_head);
    const int64_t begin = place.begin + step % per_head * kOther, token = place.first_token + begin;
    const int rows = RowsOf<kOther>(s.seq - begin);
    Bf16* const to = stages + stage * 2 * kOtherElements;
    LoadTile<OtherLayout, kOther, kDim, kThreads>(to, in.qkv + token * width + head * s.dim, width, rows, s.dim, in.aligned);
    LoadTile<OtherLayout, kOther, kDim, kThreads>(to + kOtherElements, in.dout + token * s.q_width() + head * s.dim, s.q_width(), rows,
                                                  s.dim, in.aligned);
    CommitCopies();
    const int own = static_cast<int>(threadIdx.x);
    if (own < kOther) {
      const int64_t at = (token + own) * s.heads + head;
      statistics[stage * 2 * kOther + own] = own < rows ? in.lse[at] * kLog2E : 0.0f;
      statistics[(stage * 2 + 1) * kOther + own] = own < rows ? in.delta[at] : 0.0f;
      if (s.first != nullptr) {
        const int64_t first = own < rows ? s.first_key(place.first_token, begin + own) : s.seq;
        firsts[stage * kOther + own] = static_cast<int32_t>(first - place.begin);
      }
    }
  };
  LoadTile<OwnLayout, Tiles::kOwn, kDim, kThreads>(shared, in.qkv + first_row * width + column, width, keys, s.dim, in.aligned);
  LoadTile<OwnLayout, Tiles::kOwn, kDim, kThreads>(shared_v, in.qkv + first_row * width + column + s.kv_width(), width, keys, s.dim,
                                                   in.aligned);
  load(0, 0);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int row = warp % 4 * 16, first_column = warp / 4 * kColumns;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const int stage = static_cast<int>(step % 2);
    WaitCopies<0>();
    Products::Publish();
    __syncthreads();
    if (step + 1 < steps) load(step + 1, stage ^ 1);
    const int64_t ahead = step % per_head * kOther - row;  // The first query less the warp's first key.
    const Bf16* const q = stages + stage * 2 * kOtherElements;
    const Bf16* const o = q + kOtherElements;
    const float* const query_lse = statistics + stage * 2 * kOther;
    float scores[kTiles][4], dp[kTiles][4];
    Products::template MultiplyRows<Tiles::kOwn>(shared, 0, q, s.dim, scores);
    Products::template MultiplyRows<Tiles::kOwn>(shared_v, 0, o, s.dim, dp);
    Products::template Wait<0>(scores, dp);
    if (s.first != nullptr) HideQueriesBehind(firsts + stage * kOther, row, scores);
    // Queries behind the end have rows of zeros in q and dout, so that their scores add nothing.
    const int key = g - static_cast<int>(ahead < 16 ? ahead : 16);
    uint32_t p[kTiles / 2][4], ds[kTiles / 2][4];
    ScoreGradient(
        scores, dp, in.scale * kLog2E, [&](int j, int i) { return key + i / 2 * 8 <= 8 * j + 2 * t + i % 2; },
        [&](int j, int i) { return query_lse[8 * j + 2 * t + i % 2]; },
        [&](int j, int i) { return query_lse[kOther + 8 * j + 2 * t + i % 2]; }, p);
    RoundToFragments(scores, ds);
    Products::MultiplyBy(p, o, first_column, s.dim, dv);
    Products::MultiplyBy(ds, q, first_column, s.dim, dk);
    Products::template Wait<0>(dv, dk);
  }
  Bf16* const to = in.dqkv + (first_row + row) * width + column;
  StoreRows(dk, {in.scale, in.scale}, keys - row, first_column, s.dim, to, width);
  StoreRows(dv, {1.0f, 1.0f}, keys - row, first_column, s.dim, to + s.kv_width(), width);
}

template <int kDim>
__global__ void __launch_bounds__(128 * AttentionTiles<kDim>::kParts, AttentionTiles<kDim>::kWide ? 1 : 2)
    AttentionKeysKernel(BackwardArguments in) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  WithProducts<kDim>([&](auto products) { AttentionKeys<decltype(products), kDim>(in, shared); });
}

// dQ of a block of queries of one head, over the keys from the first that any of them sees up to them.
template <typename Products, int kDim> __device__ __forceinline__ void AttentionQueries(const BackwardArguments& in, Bf16* shared) {
  const Sequences& s = in.s;
  using Tiles = AttentionTiles<kDim>;
  constexpr int kOther = Tiles::kOther, kTiles = kOther / 8, kOtherElements = kOther * Products::kRowElements;
  using OwnLayout = typename Products::template Layout<Tiles::kOwn>;
  using OtherLayout = typename Products::template Layout<kOther>;
  Bf16* const shared_dout = shared + Tiles::kOwn * Products::kRowElements;
  Bf16* const stages = shared_dout + Tiles::kOwn * Products::kRowElements;
  const Place place = LongestFirst(s, s.heads, Tiles::kOwn);
  const int64_t width = s.qkv_width();
  const Bf16* const k = in.qkv + place.first_token * width + s.key_column(s.kv_head(place.head));
  const int64_t first_row = place.first_token + place.begin;
  const int queries = RowsOf<Tiles::kOwn>(s.seq - place.begin);
  const auto load = [&](int64_t begin, int stage) {
    const int rows = RowsOf<kOther>(s.seq - begin);
    Bf16* const to = stages + stage * 2 * kOtherElements;
    LoadTile<OtherLayout, kOther, kDim, 128>(to, k + begin * width, width, rows, s.dim, in.aligned);
    LoadTile<OtherLayout, kOther, kDim, 128>(to + kOtherElements, k + s.kv_width() + begin * width, width, rows, s.dim, in.aligned);
    CommitCopies();
  };
  LoadTile<OwnLayout, Tiles::kOwn, kDim, 128>(shared, in.qkv + first_row * width + place.head * s.dim, width, queries, s.dim, in.aligned);
  LoadTile<OwnLayout, Tiles::kOwn, kDim, 128>(shared_dout, in.dout + first_row * s.q_width() + place.head * s.dim, s.q_width(), queries,
                                              s.dim, in.aligned);
  const int64_t first_key = s.first_key(place.first_token, place.begin) / kOther * kOther;
  load(first_key, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4, row = static_cast<int>(threadIdx.x) / 32 * 16;
  float own_lse[2] = {}, own_delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + g + 8 * half;
    if (own < queries) {
      own_lse[half] = in.lse[(first_row + own) * s.heads + place.head] * kLog2E;
      own_delta[half] = in.delta[(first_row + own) * s.heads + place.head];
    }
  }
  float dq[kDim / 8][4] = {};
  int stage = 0;
  for (int64_t begin = first_key; begin < place.begin + queries; begin += kOther, stage ^= 1) {
    WaitCopies<0>();
    Products::Publish();
    __syncthreads();
    if (begin + kOther < place.begin + queries) load(begin + kOther, stage ^ 1);
    const int64_t ahead = place.begin + row - begin;
    const Bf16* const keys = stages + stage * 2 * kOtherElements;
    float scores[kTiles][4], dp[kTiles][4];
    Products::template MultiplyRows<Tiles::kOwn>(shared, 0, keys, s.dim, scores);
    Products::template MultiplyRows<Tiles::kOwn>(shared_dout, 0, keys + kOtherElements, s.dim, dp);
    Products::template Wait<0>(scores, dp);
    HideKeysBefore(s, place, place.begin + row, begin, scores);
    const int query = static_cast<int>(ahead < kOther ? ahead : kOther) + g;
    ScoreGradient(
        scores, dp, in.scale * kLog2E, [&](int j, int i) { return 8 * j + 2 * t + i % 2 <= query + i / 2 * 8; },
        [&](int, int i) { return own_lse[i / 2]; }, [&](int, int i) { return own_delta[i / 2]; }, nullptr);
    uint32_t ds[kTiles / 2][4];
    RoundToFragments(scores, ds);
    Products::MultiplyBy(ds, keys, 0, s.dim, dq);
    Products::template Wait<0>(dq);
  }
  StoreRows(dq, {in.scale, in.scale}, queries - row, 0, s.dim, in.dqkv + (first_row + row) * width + place.head * s.dim, width);
}

template <int kDim>
__global__ void __launch_bounds__(128, AttentionTiles<kDim>::kWide ? 1 : 2) AttentionQueriesKernel(BackwardArguments in) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  WithProducts<kDim>([&](auto products) { AttentionQueries<decltype(products), kDim>(in, shared); });
}

}  // namespace shoal::cuda
