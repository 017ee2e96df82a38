#include "runtime/kernels/cuda/counting_sort.h"

#include <algorithm>

#include "runtime/kernels/cuda/kernels.h"

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

// counts [warps, buckets] of the block's warps.
__device__ __forceinline__ void CountTile(const Tile& tile, int32_t* counts, int buckets) {
  const int cells = static_cast<int>(blockDim.x) / 32 * buckets;
  for (int i = static_cast<int>(threadIdx.x); i < cells; i += static_cast<int>(blockDim.x)) counts[i] = 0;
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) CountRound(counts + CellOf(threadIdx.x / 32, buckets, 0), tile.bucket[round]);
  __syncthreads();
}

// table [buckets, blocks]: items of each block's tile.
__global__ void CountBlocks(CountingSort s, int32_t* table) {
  SHOAL_DYNAMIC_SHARED(int32_t, counts);
  CountTile(LoadTile(s), counts, s.buckets);
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
  CountTile(tile, places, s.buckets);
  // Counts of warps become places of their first items.
  int32_t base = 0;
  for (int start = 0; start < s.buckets; start += static_cast<int>(blockDim.x)) {
    const int bucket = start + static_cast<int>(threadIdx.x);
    int32_t sum = 0;
    const int32_t first = base + BlockExclusiveSum(bucket < s.buckets ? total[bucket] : 0, warp_sums, &sum);
    base += sum;
    if (bucket >= s.buckets) continue;
    if (blockIdx.x == 0 && s.segments != nullptr) {
      s.segments[3 * bucket] = bucket;
      s.segments[3 * bucket + 1] = first;
      s.segments[3 * bucket + 2] = total[bucket];
    }
    int32_t place = first + table[static_cast<int64_t>(bucket) * gridDim.x + blockIdx.x];
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
      int32_t& cell = places[CellOf(warp, s.buckets, bucket)];
      const int32_t count = cell;
      cell = place;
      place += count;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && s.first != nullptr) s.first[s.n / s.items_per_name] = static_cast<int32_t>(s.n);
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int32_t place = CountRound(places + CellOf(threadIdx.x / 32, s.buckets, 0), tile.bucket[round]);
    if (tile.item[round] < 0) continue;
    const int32_t name = tile.item[round] / s.items_per_name;
    if (s.sorted != nullptr) s.sorted[place] = name;
    if (s.first != nullptr && name * s.items_per_name == tile.item[round]) s.first[name] = tile.item[round];
    if (s.place != nullptr) s.place[tile.item[round]] = place;
  }
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

// A pair's place in `chosen` is its number, so items are in order of tokens.
DeviceResult OrderByExpert(TensorArg chosen, TensorArg offset, TensorArg segments, TensorArg slot, TensorArg token, StreamArg stream) {
  CountingSort sort;
  sort.keys = Data<int32_t>(chosen);
  sort.n = chosen.elements;
  sort.buckets = static_cast<int>(segments.shape[0]);
  sort.items_per_name = std::max(1, static_cast<int>(chosen.shape[1]));
  sort.sorted = Data<int32_t>(token);
  sort.place = Data<int32_t>(slot);
  sort.segments = Data<int32_t>(segments);
  sort.first = Data<int32_t>(offset);
  void* scratch = nullptr;
  const DeviceResult got = Scratch(stream, CountingSortBytes(sort.n, sort.buckets), &scratch);
  return got.code != DeviceResult::Code::kOk ? got : Sort(sort, scratch, stream);
}

}  // namespace shoal::cuda
