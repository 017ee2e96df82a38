// Where a block of an attention kernel works, and what all of them share.
#pragma once

#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

// kernels::AttentionShape, as a kernel's argument.
struct Sequences {
  int64_t rows, seq;
  int32_t heads, kv_heads, dim;

  __host__ __device__ int64_t q_width() const { return static_cast<int64_t>(heads) * dim; }
  __host__ __device__ int64_t kv_width() const { return static_cast<int64_t>(kv_heads) * dim; }
  __host__ __device__ int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  __host__ __device__ int32_t kv_head(int32_t head) const { return head / (heads / kv_heads); }
  __host__ __device__ int64_t key_column(int32_t kv_head) const { return q_width() + static_cast<int64_t>(kv_head) * dim; }
  // Of a grid: tiles of `tile` tokens for each of `tile_heads` heads.
  __host__ int64_t blocks(int32_t tile_heads, int tile) const { return Blocks(seq, tile) * rows * tile_heads; }
};

struct Place {
  int64_t first_token;  // Of the sequence.
  int64_t begin;        // Of the block's tokens, in the sequence.
  int32_t head;
};

// Blocks of queries with most keys start first, so that short ones fill the end. Neighbours read the same keys.
__device__ __forceinline__ Place LongestFirst(const Sequences& s, int32_t tile_heads, int tile) {
  const int64_t others = s.rows * tile_heads, other = blockIdx.x % others;
  return {other / tile_heads * s.seq, (Blocks(s.seq, tile) - 1 - blockIdx.x / others) * tile, static_cast<int32_t>(other % tile_heads)};
}
// The same for blocks of keys: the first ones have most queries.
__device__ __forceinline__ Place ShortestLast(const Sequences& s, int32_t tile_heads, int tile) {
  const int64_t others = s.rows * tile_heads, other = blockIdx.x % others;
  return {other / tile_heads * s.seq, blockIdx.x / others * tile, static_cast<int32_t>(other % tile_heads)};
}

}  // namespace shoal::cuda
