// Causal attention by plain multiply-adds, in f32: for operands of f32, which the tensor cores would round, and heads of any width. As
// attention_mma.h, with tiles of `tile` tokens (at most 32) that lie in shared memory.
#pragma once

#include "runtime/kernels/cuda/attention_shape.h"

namespace shoal::cuda {

constexpr int kPlainThreads = 256;
constexpr int64_t kPlainSharedMax = 160 * 1024;

// Rows of a head's vectors, and of a score per pair of tokens, are padded by one element against conflicts of banks.
inline int64_t PlainShared(int32_t dim, int tile, int vectors, int scores) {
  return 4 * (static_cast<int64_t>(vectors) * tile * (dim + 1) + static_cast<int64_t>(scores) * tile * (tile + 1) + 3 * tile);
}
// The largest tile that fits; 0: none does.
inline int PlainTile(int32_t dim, int vectors, int scores) {
  int tile = 32;
  while (tile > 0 && PlainShared(dim, tile, vectors, scores) > kPlainSharedMax) tile /= 2;
  return tile;
}

template <typename T> __device__ __forceinline__ void LoadPlain(float* to, const T* from, int64_t stride, int tile, int rows, int dim) {
  for (int i = static_cast<int>(threadIdx.x); i < tile * dim; i += kPlainThreads) {
    const int row = i / dim, column = i % dim;
    to[row * (dim + 1) + column] = row < rows ? ToFloat(from[row * stride + column]) : 0.0f;
  }
}
template <typename T>
__device__ __forceinline__ void StorePlain(const float* from, T* to, int64_t stride, int rows, int dim, float factor) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * dim; i += kPlainThreads) {
    const int row = i / dim, column = i % dim;
    to[row * stride + column] = FromFloat<T>(from[row * (dim + 1) + column] * factor);
  }
}
__device__ __forceinline__ void ZeroPlain(float* to, int elements) {
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += kPlainThreads) to[i] = 0;
}

__device__ __forceinline__ float DotPlain(const float* a, const float* b, int dim) {
  float sum = 0;
  for (int i = 0; i < dim; ++i) sum = __fmaf_rn(a[i], b[i], sum);
  return sum;
}

// to[i][d] += sum over j < count of weights[i * i_step + j * j_step] from[j][d].
__device__ __forceinline__ void AddPlain(float* to, const float* weights, int i_step, int j_step, const float* from, int tile, int count,
                                         int dim) {
  for (int item = static_cast<int>(threadIdx.x); item < tile * dim; item += kPlainThreads) {
    const int i = item / dim, d = item % dim;
    float sum = to[i * (dim + 1) + d];
    for (int j = 0; j < count; ++j) sum = __fmaf_rn(weights[i * i_step + j * j_step], from[j * (dim + 1) + d], sum);
    to[i * (dim + 1) + d] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    PlainAttentionKernel(Sequences s, int tile, const T* qkv, T* out, float* lse, float scale) {
  SHOAL_DYNAMIC_SHARED(float, q);
  const int vectors = tile * (s.dim + 1), pitch = tile + 1;
  float *const k = q + vectors, *const v = k + vectors, *const sums = v + vectors, *const scores = sums + vectors;
  float *const largest = scores + tile * pitch, *const denominator = largest + tile, *const correction = denominator + tile;
  const Place place = LongestFirst(s, s.heads, tile);
  const int64_t width = s.qkv_width(), first_row = place.first_token + place.begin;
  const T* const keys = qkv + place.first_token * width + s.key_column(s.kv_head(place.head));
  const int queries = static_cast<int>(s.seq - place.begin < tile ? s.seq - place.begin : tile);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  LoadPlain(q, qkv + first_row * width + place.head * s.dim, width, tile, queries, s.dim);
  ZeroPlain(sums, vectors);
  for (int i = static_cast<int>(threadIdx.x); i < tile; i += kPlainThreads) largest[i] = -INFINITY, denominator[i] = 0;
  for (int64_t begin = s.first_key(place.first_token, place.begin) / tile * tile; begin <= place.begin; begin += tile) {
    __syncthreads();
    const int rows = static_cast<int>(s.seq - begin < tile ? s.seq - begin : tile);
    LoadPlain(k, keys + begin * width, width, tile, rows, s.dim);
    LoadPlain(v, keys + s.kv_width() + begin * width, width, tile, rows, s.dim);
    __syncthreads();
    for (int item = static_cast<int>(threadIdx.x); item < tile * tile; item += kPlainThreads) {
      const int i = item / tile, j = item % tile;
      const int64_t key = begin + j, query = place.begin + i;
      const bool seen = key <= query && key >= s.first_key(place.first_token, query);
      scores[i * pitch + j] = seen ? DotPlain(q + i * (s.dim + 1), k + j * (s.dim + 1), s.dim) * scale : -INFINITY;
    }
    __syncthreads();
    for (int i = warp; i < tile; i += kPlainThreads / 32) {
      const float score = lane < tile ? scores[i * pitch + lane] : -INFINITY;
      const float before = largest[i], most = fmaxf(before, WarpMax(score));
      const float from = fmaxf(most, kLowestScore), p = expf(score - from), sum = WarpSum(p);
      if (lane < tile) scores[i * pitch + lane] = p;
      if (lane == 0) {
        correction[i] = expf(before - from);
        denominator[i] = denominator[i] * correction[i] + sum;
        largest[i] = most;
      }
    }
    __syncthreads();
    for (int item = static_cast<int>(threadIdx.x); item < tile * s.dim; item += kPlainThreads) {
      sums[item / s.dim * (s.dim + 1) + item % s.dim] *= correction[item / s.dim];
    }
    AddPlain(sums, scores, pitch, 1, v, tile, tile, s.dim);  // The same thread's elements.
  }
  __syncthreads();
  for (int item = static_cast<int>(threadIdx.x); item < tile * s.dim; item += kPlainThreads) {
    sums[item / s.dim * (s.dim + 1) + item % s.dim] /= denominator[item / s.dim];
  }
  for (int i = static_cast<int>(threadIdx.x); i < queries; i += kPlainThreads) {
    lse[(first_row + i) * s.heads + place.head] = largest[i] + logf(denominator[i]);
  }
  StorePlain(sums, out + first_row * s.q_width() + place.head * s.dim, s.q_width(), queries, s.dim, 1.0f);
}

// p and ds of a tile of queries by a tile of keys: [query][key]. `begin` of both in the sequence that begins at first_token; statistics of
// the first query's row.
struct PlainTileOfScores {
  int64_t first_token;
  const float *q, *dout, *k, *v;
  float *p, *ds;
};
__device__ __forceinline__ void PlainScores(const Sequences& s, const PlainTileOfScores& at, int tile, int64_t query_begin,
                                            int64_t key_begin, int queries, const float* lse, const float* delta, float scale) {
  for (int item = static_cast<int>(threadIdx.x); item < tile * tile; item += kPlainThreads) {
    const int i = item / tile, j = item % tile;
    float p = 0, ds = 0;
    const int64_t key = key_begin + j, query = query_begin + i;
    if (i < queries && key <= query && key >= s.first_key(at.first_token, query)) {
      const int64_t row = static_cast<int64_t>(i) * s.heads;
      p = expf(DotPlain(at.q + i * (s.dim + 1), at.k + j * (s.dim + 1), s.dim) * scale - lse[row]);
      ds = p * (DotPlain(at.dout + i * (s.dim + 1), at.v + j * (s.dim + 1), s.dim) - delta[row]);
    }
    at.p[i * (tile + 1) + j] = p;
    at.ds[i * (tile + 1) + j] = ds;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads) PlainAttentionKeysKernel(Sequences s, int tile, const T* qkv, const float* lse,
                                                                          const float* delta, const T* dout, T* dqkv, float scale) {
  SHOAL_DYNAMIC_SHARED(float, k);
  const int vectors = tile * (s.dim + 1), pitch = tile + 1;
  float *const v = k + vectors, *const dk = v + vectors, *const dv = dk + vectors, *const q = dv + vectors, *const o = q + vectors;
  float *const p = o + vectors, *const ds = p + tile * pitch;
  const Place place = ShortestLast(s, s.kv_heads, tile);
  const int64_t width = s.qkv_width(), first_row = place.first_token + place.begin, column = s.key_column(place.head);
  const int keys = static_cast<int>(s.seq - place.begin < tile ? s.seq - place.begin : tile);
  const int group = s.heads / s.kv_heads;
  LoadPlain(k, qkv + first_row * width + column, width, tile, keys, s.dim);
  LoadPlain(v, qkv + first_row * width + column + s.kv_width(), width, tile, keys, s.dim);
  ZeroPlain(dk, 2 * vectors);
  for (int head = place.head * group; head < (place.head + 1) * group; ++head) {
    for (int64_t begin = place.begin; begin < s.seq && s.first_key(place.first_token, begin) < place.begin + keys; begin += tile) {
      const int64_t token = place.first_token + begin;
      const int rows = static_cast<int>(s.seq - begin < tile ? s.seq - begin : tile);
      __syncthreads();
      LoadPlain(q, qkv + token * width + head * s.dim, width, tile, rows, s.dim);
      LoadPlain(o, dout + token * s.q_width() + head * s.dim, s.q_width(), tile, rows, s.dim);
      __syncthreads();
      PlainScores(s, {place.first_token, q, o, k, v, p, ds}, tile, begin, place.begin, rows, lse + token * s.heads + head, delta + token * s.heads + head,
                  scale);
      __syncthreads();
      AddPlain(dv, p, 1, pitch, o, tile, tile, s.dim);
      AddPlain(dk, ds, 1, pitch, q, tile, tile, s.dim);
    }
  }
  __syncthreads();
  StorePlain(dk, dqkv + first_row * width + column, width, keys, s.dim, scale);
  StorePlain(dv, dqkv + first_row * width + column + s.kv_width(), width, keys, s.dim, 1.0f);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads) PlainAttentionQueriesKernel(Sequences s, int tile, const T* qkv, const float* lse,
                                                                             const float* delta, const T* dout, T* dqkv, float scale) {
  SHOAL_DYNAMIC_SHARED(float, q);
  const int vectors = tile * (s.dim + 1), pitch = tile + 1;
  float *const o = q + vectors, *const dq = o + vectors, *const k = dq + vectors, *const v = k + vectors;
  float *const p = v + vectors, *const ds = p + tile * pitch;
  const Place place = LongestFirst(s, s.heads, tile);
  const int64_t width = s.qkv_width(), first_row = place.first_token + place.begin;
  const T* const keys = qkv + place.first_token * width + s.key_column(s.kv_head(place.head));
  const int queries = static_cast<int>(s.seq - place.begin < tile ? s.seq - place.begin : tile);
  LoadPlain(q, qkv + first_row * width + place.head * s.dim, width, tile, queries, s.dim);
  LoadPlain(o, dout + first_row * s.q_width() + place.head * s.dim, s.q_width(), tile, queries, s.dim);
  ZeroPlain(dq, vectors);
  for (int64_t begin = s.first_key(place.first_token, place.begin) / tile * tile; begin <= place.begin; begin += tile) {
    const int rows = static_cast<int>(s.seq - begin < tile ? s.seq - begin : tile);
    __syncthreads();
    LoadPlain(k, keys + begin * width, width, tile, rows, s.dim);
    LoadPlain(v, keys + s.kv_width() + begin * width, width, tile, rows, s.dim);
    __syncthreads();
    PlainScores(s, {place.first_token, q, o, k, v, p, ds}, tile, place.begin, begin, queries, lse + first_row * s.heads + place.head,
                delta + first_row * s.heads + place.head, scale);
    __syncthreads();
    AddPlain(dq, ds, pitch, 1, k, tile, tile, s.dim);
  }
  __syncthreads();
  StorePlain(dq, dqkv + first_row * width + place.head * s.dim, width, queries, s.dim, scale);
}

}  // namespace shoal::cuda
