#include "runtime/kernels/cuda/counting_sort.h"

#include <algorithm>

#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/router_tally.h"

namespace shoal::cuda {
namespace {

constexpr int kRounds = 8, kTileOfWarp = 32 * kRounds;

// As many as have counts of their own in 48 KiB.
int WarpsOf(int buckets) { return std::clamp(48 * 1024 / 4 / std::max(buckets, 1), 1, 8); }

// A warp's items of a block's tile: round r has those of its lanes, in order. Bucket -1: beyond the last item.
struct Tile {
  int32_t item[kRounds], bucket[kRounds];
};

__device__ __forceinline__ Tile LoadTile(const CountingSort& s) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x * kRounds + threadIdx.x / 32 * kTileOfWarp + threadIdx.x % 32;
  Tile tile;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = begin + round * 32;
    tile.item[round] = at >= s.n ? -1 : s.order == nullptr ? static_cast<int32_t>(at) : s.order[at];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    tile.bucket[round] = tile.item[round] < 0 ? -1 : (s.keys[tile.item[round]] >> s.shift) & s.mask;
  }
  return tile;
}

// Of the items [first, end) of keys that are buckets.
__device__ __forceinline__ Tile LoadTile(const int32_t* keys, int64_t first, int64_t end) {
  const int64_t begin = first + threadIdx.x / 32 * kTileOfWarp + threadIdx.x % 32;
  Tile tile;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = begin + round * 32;
    tile.item[round] = at < end ? static_cast<int32_t>(at) : -1;
    tile.bucket[round] = at < end ? keys[at] : -1;
  }
  return tile;
}

// Adds a round to its warp's counts; the number of the lane's item among those of its bucket that the warp has counted.
__device__ __forceinline__ int32_t CountRound(int32_t* counts, int32_t bucket) {
  const uint32_t same = __match_any_sync(0xffffffffu, static_cast<uint32_t>(bucket)), before = (1u << threadIdx.x % 32) - 1;
  const int32_t counted = bucket < 0 ? 0 : counts[bucket];
  __syncwarp();
  if (bucket >= 0 && (same & before) == 0) counts[bucket] = counted + __popc(same);
  __syncwarp();
  return counted + __popc(same & before);
}

// Of [warps, buckets].
__device__ __forceinline__ int CellOf(unsigned warp, int buckets, int bucket) { return static_cast<int>(warp) * buckets + bucket; }

// counts [warps, buckets] of the block's warps; rank: of each item among those of its bucket that its warp has.
__device__ __forceinline__ void CountTile(const Tile& tile, int32_t* counts, int buckets, int32_t (&rank)[kRounds]) {
  const int cells = static_cast<int>(blockDim.x) / 32 * buckets;
  for (int i = static_cast<int>(threadIdx.x); i < cells; i += static_cast<int>(blockDim.x)) counts[i] = 0;
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    rank[round] = CountRound(counts + CellOf(threadIdx.x / 32, buckets, 0), tile.bucket[round]);
  }
  __syncthreads();
}

// Counts of warps become places of their first items, those of a bucket one warp after the other from `place`. Returns the next place.
__device__ __forceinline__ int32_t PlaceWarps(int32_t* counts, int buckets, int bucket, int32_t place) {
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    int32_t& cell = counts[CellOf(warp, buckets, bucket)];
    const int32_t count = cell;
    cell = place;
    place += count;
  }
  return place;
}

// table [buckets, blocks]: items of each block's tile.
__global__ void CountBlocks(CountingSort s, int32_t* table) {
  SHOAL_DYNAMIC_SHARED(int32_t, counts);
  int32_t rank[kRounds];
  CountTile(LoadTile(s), counts, s.buckets, rank);
  for (int bucket = static_cast<int>(threadIdx.x); bucket < s.buckets; bucket += static_cast<int>(blockDim.x)) {
    int32_t count = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) count += counts[CellOf(warp, s.buckets, bucket)];
    table[static_cast<int64_t>(bucket) * gridDim.x + blockIdx.x] = count;
  }
}

__device__ __forceinline__ int32_t WarpInclusiveSum(int32_t value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  return value;
}

// A warp per bucket: the counts of its blocks become exclusive sums of them; total [buckets].
__global__ void SumBlocks(int32_t* table, int64_t blocks, int32_t* total, int buckets) {
  const int bucket = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x) % 32;
  if (bucket >= buckets) return;
  int32_t* row = table + bucket * blocks;
  int32_t sum = 0;
  for (int64_t base = 0; base < blocks; base += 32) {
    const int32_t own = base + lane < blocks ? row[base + lane] : 0, inclusive = WarpInclusiveSum(own);
    if (base + lane < blocks) row[base + lane] = sum + inclusive - own;
    sum += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  if (lane == 0) total[bucket] = sum;
}

// The sum of the values of the threads before the caller's, in a block; *all receives that of all.
__device__ __forceinline__ int32_t BlockExclusiveSum(int32_t value, int32_t* warp_sums, int32_t* all) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int32_t inclusive = WarpInclusiveSum(value);
  __syncthreads();  // The sums of a call before are read.
  if (threadIdx.x % 32 == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before = 0, sum = 0;
  for (int i = 0; i < warps; ++i) {
    if (i < warp) before += warp_sums[i];
    sum += warp_sums[i];
  }
  *all = sum;
  return before + inclusive - value;
}

__global__ void Place(CountingSort s, const int32_t* table, const int32_t* total) {
  SHOAL_DYNAMIC_SHARED(int32_t, places);
  SHOAL_SHARED(int32_t, warp_sums, [32]);
  const Tile tile = LoadTile(s);
  int32_t rank[kRounds];
  CountTile(tile, places, s.buckets, rank);
  int32_t base = 0;
  for (int start = 0; start < s.buckets; start += static_cast<int>(blockDim.x)) {
    const int bucket = start + static_cast<int>(threadIdx.x);
    int32_t sum = 0;
    const int32_t first = base + BlockExclusiveSum(bucket < s.buckets ? total[bucket] : 0, warp_sums, &sum);
    base += sum;
    if (bucket < s.buckets) PlaceWarps(places, s.buckets, bucket, first + table[static_cast<int64_t>(bucket) * gridDim.x + blockIdx.x]);
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (tile.item[round] < 0) continue;
    s.sorted[places[CellOf(threadIdx.x / 32, s.buckets, tile.bucket[round])] + rank[round]] = tile.item[round];
  }
}

// What gives slots to pairs and adds up a tally.
struct Ordering {
  const int32_t* chosen;
  int64_t tokens;
  int k, experts;
  int blocks, pieces;  // Of the tally.
  const int32_t* counts;
  const double* sums;  // Null: none.
  const int32_t* shares;  // Of OrderByShares.
  int32_t *offset, *segments, *slot, *token;

  // Totals, and whether they are added to what is there. Null: not wanted.
  double *count_totals, *prob_totals, *z_total;
  bool add;
};

constexpr int kBlocksAtOnce = 2;  // Of the tally, whose pairs one block orders.

__host__ __device__ inline int OrderingBlocksOfPiece(int blocks, int pieces) {
  return static_cast<int>(Blocks(blocks / pieces, kBlocksAtOnce));
}

// before [experts] += counts of the lines [first, own), all [experts] those of [first, end).
__device__ __forceinline__ void AddLines(const Ordering& a, int first, int own, int end, int32_t* before, int32_t* all) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int expert = lane; expert < a.experts; expert += 32) {
    int32_t sum_before = 0, sum = 0;
#pragma unroll 8
    for (int line = first + static_cast<int>(threadIdx.x) / 32; line < end; line += warps) {
      const int32_t count = a.counts[static_cast<int64_t>(line) * a.experts + expert];
      sum += count;
      if (line < own) sum_before += count;
    }
    atomicAdd(&before[expert], sum_before);
    atomicAdd(&all[expert], sum);
  }
}

// next [experts], numbers of pairs among those of their expert, become slots by expert. all [experts]: how many there are.
__device__ __forceinline__ void StartAtSegments(const Ordering& a, int32_t* next, const int32_t* all) {
  SHOAL_SHARED(int32_t, warp_sums, [32]);
  int32_t base = 0;
  for (int start = 0; start < a.experts; start += static_cast<int>(blockDim.x)) {
    const int expert = start + static_cast<int>(threadIdx.x);
    const int32_t count = expert < a.experts ? all[expert] : 0;
    int32_t sum = 0;
    const int32_t first = base + BlockExclusiveSum(count, warp_sums, &sum);
    base += sum;
    if (expert >= a.experts) continue;
    next[expert] += first;
    if (blockIdx.x == 0) a.segments[3 * expert] = expert, a.segments[3 * expert + 1] = first, a.segments[3 * expert + 2] = count;
  }
}

// The row of a number among the pairs of a piece and an expert.
__device__ __forceinline__ int32_t RowOf(const Ordering& a, int bucket, int32_t number) {
  const int32_t* share = a.shares + static_cast<int64_t>(a.pieces) * a.experts + 1 + 2 * a.shares[bucket];
  while (number >= share[0]) share += 2;
  return number + share[1];
}

// Gives slots to the pairs of kBlocksAtOnce blocks of the tally, by expert or by shares. next [experts], cells [warps, experts].
template <bool kByShares> __device__ __forceinline__ void OrderPairs(const Ordering& a, int32_t* next, int32_t* cells) {
  const int each = a.blocks / a.pieces, of_piece = OrderingBlocksOfPiece(a.blocks, a.pieces);
  const int piece = static_cast<int>(blockIdx.x) / of_piece, first = piece * each, end = first + each;
  const int own = first + static_cast<int>(blockIdx.x) % of_piece * kBlocksAtOnce;
  const int own_end = own + kBlocksAtOnce < end ? own + kBlocksAtOnce : end;
  for (int expert = static_cast<int>(threadIdx.x); expert < a.experts; expert += static_cast<int>(blockDim.x)) {
    next[expert] = cells[expert] = 0;
  }
  __syncthreads();
  AddLines(a, first, own, kByShares ? own : end, next, cells);
  __syncthreads();
  if constexpr (!kByShares) StartAtSegments(a, next, cells);
  const int64_t token_begin = TokensOfBlock(a.tokens, a.pieces, a.blocks, own).begin;
  const int64_t token_end = TokensOfBlock(a.tokens, a.pieces, a.blocks, own_end - 1).end;
  for (int64_t token = token_begin + threadIdx.x; token < token_end + (own_end == a.blocks ? 1 : 0); token += blockDim.x) {
    a.offset[token] = static_cast<int32_t>(token * a.k);
  }
  for (int64_t pair = token_begin * a.k; pair < token_end * a.k; pair += static_cast<int64_t>(blockDim.x) * kRounds) {
    const Tile tile = LoadTile(a.chosen, pair, token_end * a.k);
    int32_t rank[kRounds];
    __syncthreads();  // The cells of what was before are read.
    CountTile(tile, cells, a.experts, rank);
    for (int expert = static_cast<int>(threadIdx.x); expert < a.experts; expert += static_cast<int>(blockDim.x)) {
      next[expert] = PlaceWarps(cells, a.experts, expert, next[expert]);
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (tile.item[round] < 0) continue;
      int32_t place = cells[CellOf(threadIdx.x / 32, a.experts, tile.bucket[round])] + rank[round];
      if constexpr (kByShares) place = RowOf(a, piece * a.experts + tile.bucket[round], place);
      a.slot[tile.item[round]] = place;
      a.token[place] = tile.item[round] / a.k;
    }
  }
}

// The total of a column of the tally's lines, in an order that its shape alone decides: column tile `tile` of the counts of a piece, or
// behind all pieces, of the sums.
__device__ __forceinline__ void AddUp(const Ordering& a, int tile) {
  SHOAL_SHARED(double, of_warp, [8][32]);
  const int tiles = (a.experts + 32) / 32, of = tile / tiles, lane = static_cast<int>(threadIdx.x) % 32;
  const bool counts = of < a.pieces;
  const int column = tile % tiles * 32 + lane, width = counts ? a.experts : a.experts + 1, each = a.blocks / a.pieces;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int first = counts ? of * each : 0, end = counts ? first + each : a.blocks;
  double sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int line = first + warp; line < end; line += warps) {
      const int64_t at = static_cast<int64_t>(line) * width + column;
      sum += counts ? static_cast<double>(a.counts[at]) : a.sums[at];
    }
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
  for (int other = 1; other < warps; ++other) sum += of_warp[other][lane];
  double* to = counts ? a.count_totals + of * a.experts + column : column < a.experts ? a.prob_totals + column : a.z_total;
  *to = a.add ? *to + sum : sum;
}

int TotalsTiles(const Ordering& a) {
  return a.count_totals == nullptr ? 0 : (a.pieces + (a.sums == nullptr ? 0 : 1)) * ((a.experts + 32) / 32);
}

// The last blocks of the grid add up the tally.
__global__ void OrderAndAddUp(Ordering a, int ordering_blocks) {
  SHOAL_DYNAMIC_SHARED(int32_t, counts);
  const int block = static_cast<int>(blockIdx.x);
  if (block < ordering_blocks) {
    OrderPairs<false>(a, counts, counts + a.experts);
  } else {
    AddUp(a, block - ordering_blocks);
  }
}

__global__ void OrderAlone(Ordering a) {
  SHOAL_DYNAMIC_SHARED(int32_t, counts);
  OrderPairs<true>(a, counts, counts + a.experts);
}

__global__ void AddUpTally(Ordering a) { AddUp(a, static_cast<int>(blockIdx.x)); }

Ordering OrderingOf(TensorArg chosen, int pieces, TensorArg counts, TensorArg offset, TensorArg slot, TensorArg token) {
  Ordering a = {};
  a.chosen = Data<int32_t>(chosen), a.tokens = chosen.shape[0], a.k = static_cast<int>(chosen.shape[1]);
  a.blocks = static_cast<int>(counts.shape[0]), a.experts = static_cast<int>(counts.shape[1]), a.pieces = pieces;
  a.counts = Data<int32_t>(counts);
  a.offset = Data<int32_t>(offset), a.slot = Data<int32_t>(slot), a.token = Data<int32_t>(token);
  return a;
}

// Of the blocks that order.
LaunchShape OrderingShape(const Ordering& a) {
  const int warps = WarpsOf(a.experts);
  return {.blocks = a.pieces * OrderingBlocksOfPiece(a.blocks, a.pieces), .threads = warps * 32,
          .shared_bytes = int64_t{4} * (warps + 1) * a.experts};
}

// At least one, which writes the sums of no items.
int64_t BlocksOf(int64_t n, int buckets) { return std::max<int64_t>(1, Blocks(n, WarpsOf(buckets) * kTileOfWarp)); }

}  // namespace

int64_t CountingSortBytes(int64_t n, int buckets) { return Blocks((BlocksOf(n, buckets) + 1) * buckets * 4, 256) * 256; }

DeviceResult Sort(const CountingSort& sort, void* scratch, DeviceStream* stream) {
  if (sort.buckets < 1 || sort.buckets > kBucketsMax) {
    return {DeviceResult::Code::kFailed, "a counting sort with no or with more than 51200 buckets"};
  }
  const int64_t blocks = BlocksOf(sort.n, sort.buckets);
  const int warps = WarpsOf(sort.buckets);
  auto* table = static_cast<int32_t*>(scratch);
  int32_t* total = table + blocks * sort.buckets;
  const LaunchShape tiles = {.blocks = blocks, .threads = warps * 32, .shared_bytes = int64_t{4} * warps * sort.buckets};
  DeviceResult launched = Launch(tiles, stream, CountBlocks, sort, table);
  if (launched.code != DeviceResult::Code::kOk) return launched;
  launched = Launch({.blocks = Blocks(sort.buckets, 4), .threads = 128}, stream, SumBlocks, table, blocks, total, sort.buckets);
  if (launched.code != DeviceResult::Code::kOk) return launched;
  return Launch(tiles, stream, Place, sort, static_cast<const int32_t*>(table), static_cast<const int32_t*>(total));
}

DeviceResult OrderByExpert(TensorArg chosen, TensorArg counts, TensorArg sums, TensorArg offset, TensorArg segments, TensorArg slot,
                           TensorArg token, TensorArg all_counts, TensorArg all_probs, TensorArg all_z, StreamArg stream) {
  Ordering a = OrderingOf(chosen, /*pieces=*/1, counts, offset, slot, token);
  a.sums = Data<double>(sums), a.segments = Data<int32_t>(segments);
  a.count_totals = Data<double>(all_counts), a.prob_totals = Data<double>(all_probs), a.z_total = Data<double>(all_z), a.add = true;
  LaunchShape shape = OrderingShape(a);
  const int ordering = static_cast<int>(shape.blocks);
  shape.blocks += TotalsTiles(a);
  return Launch(shape, stream, OrderAndAddUp, a, ordering);
}

DeviceResult OrderByShares(TensorArg chosen, int32_t pieces, TensorArg counts, TensorArg shares, TensorArg offset, TensorArg slot,
                           TensorArg token, StreamArg stream) {
  Ordering a = OrderingOf(chosen, pieces, counts, offset, slot, token);
  a.shares = Data<int32_t>(shares);
  return Launch(OrderingShape(a), stream, OrderAlone, a);
}

DeviceResult SumTally(int32_t pieces, TensorArg counts, TensorArg sums, TensorArg totals, StreamArg stream) {
  Ordering a = {};
  a.experts = static_cast<int>(counts.shape[1]), a.blocks = static_cast<int>(counts.shape[0]), a.pieces = pieces;
  a.counts = Data<int32_t>(counts), a.sums = Data<double>(sums);
  a.count_totals = Data<double>(totals);
  a.prob_totals = a.count_totals + int64_t{pieces} * a.experts, a.z_total = a.prob_totals + a.experts;
  return Launch({.blocks = TotalsTiles(a), .threads = 256}, stream, AddUpTally, a);
}

}  // namespace shoal::cuda
