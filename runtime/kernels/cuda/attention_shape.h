// Where a block of an attention kernel works, and what all of them share.
#pragma once

#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

// The least of running maxima that exponentials are taken from: a query has seen no key yet whose document begins behind them.
constexpr float kLowestScore = -3.402823466e+38f;

// kernels::AttentionShape and `first`, as a kernel's argument.
struct Sequences {
  int64_t rows, seq;
  int32_t heads, kv_heads, dim;
  const int32_t* first;  // Null: 0 everywhere.

  __host__ __device__ int64_t q_width() const { return static_cast<int64_t>(heads) * dim; }
  __host__ __device__ int64_t kv_width() const { return static_cast<int64_t>(kv_heads) * dim; }
  __host__ __device__ int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  __host__ __device__ int32_t kv_head(int32_t head) const { return head / (heads / kv_heads); }
  // The first key that a token of the sequence sees which begins at `first_token`. Between 0 and `token` whatever the memory holds, so
  // that every token sees itself; 0 behind the end.
  __device__ int32_t first_key(int64_t first_token, int64_t token) const {
    if (first == nullptr || token >= seq) return 0;
    const int32_t key = first[first_token + token], last = static_cast<int32_t>(token);
    return key < 0 ? 0 : key < last ? key : last;
  }
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

// How many of the tiles of queries that begin with the block's keys [place.begin, key_end) see any of them: those up to the first
// document behind. Whole warps.
__device__ __forceinline__ int64_t TilesSeeing(const Sequences& s, const Place& place, int64_t key_end, int tile) {
  const int64_t all = Blocks(s.seq - place.begin, tile);
  if (s.first == nullptr) return all;
  int64_t seeing = 0;
  for (int more = 32; more == 32; seeing += more) {
    const int64_t other = seeing + threadIdx.x % 32;
    const bool sees = other < all && s.first_key(place.first_token, place.begin + other * tile) < key_end;
    more = __popc(__ballot_sync(0xffffffffu, sees));
  }
  return seeing;
}

}  // namespace shoal::cuda
