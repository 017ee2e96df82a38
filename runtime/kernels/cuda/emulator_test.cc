#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {
namespace {

__global__ void Reverse(const int* from, int* to, int n) {
  SHOAL_DYNAMIC_SHARED(int, tile);
  const int begin = static_cast<int>(blockIdx.x * blockDim.x), own = static_cast<int>(threadIdx.x);
  if (begin + own < n) tile[own] = from[begin + own];
  __syncthreads();
  const int count = std::min(static_cast<int>(blockDim.x), n - begin);
  if (own < count) to[begin + own] = tile[count - 1 - own];
}

TEST(Emulator, ThreadsOfABlockShareMemoryAcrossABarrier) {
  std::vector<int> from(1000), to(1000, -1);
  for (int i = 0; i < 1000; ++i) from[static_cast<size_t>(i)] = i;
  EXPECT_EQ(Launch({.blocks = 8, .threads = 128, .shared_bytes = 512}, nullptr, Reverse, from.data(), to.data(), 1000).code,
            DeviceResult::Code::kOk);
  for (int i = 0; i < 1000; ++i) {
    const int begin = i / 128 * 128, count = std::min(128, 1000 - begin);
    EXPECT_EQ(to[static_cast<size_t>(i)], begin + count - 1 - (i - begin)) << i;
  }
}

// What is wrong: a thread reads what its neighbour writes, without a barrier.
__global__ void ReadNeighbour(int* seen, int neighbour) {
  SHOAL_DYNAMIC_SHARED(int, tile);
  const int own = static_cast<int>(threadIdx.x), other = own + neighbour;
  tile[own] = own;
  if (other >= 0 && other < static_cast<int>(blockDim.x)) seen[blockIdx.x * blockDim.x + threadIdx.x] = tile[other] == other ? 1 : 0;
}

TEST(Emulator, AMissingBarrierShowsInOneOfTwoBlocksWhateverTheNeighbour) {
  for (const int neighbour : {-1, 1}) {
    std::vector<int> seen(2 * 64, 0);
    (void)Launch({.blocks = 2, .threads = 64, .shared_bytes = 256}, nullptr, ReadNeighbour, seen.data(), neighbour);
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 63) << neighbour;
  }
}

__global__ void Sums(const float* x, float* sums, uint32_t* ballots, int* others) {
  SHOAL_SHARED(float, scratch, [33]);
  const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  const float sum = BlockSum(value, scratch);
  const float largest = BlockMax(value, scratch);
  const uint32_t ballot = __ballot_sync(0xffffffffu, value > 0.5f);
  // Half of the lanes exchange among themselves more often than the others.
  int other = -1;
  if (threadIdx.x % 32 < 16) {
    for (int i = 1; i <= 3; ++i) other = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), i);
  } else {
    other = __shfl_xor_sync(0xffff0000u, static_cast<int>(threadIdx.x), 8);
  }
  others[threadIdx.x] = other;
  if (threadIdx.x == 0) sums[2 * blockIdx.x] = sum, sums[2 * blockIdx.x + 1] = largest;
  if (threadIdx.x % 32 == 0) ballots[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = ballot;
}

TEST(Emulator, WarpsAndBlocksReduce) {
  constexpr int kBlocks = 3, kThreads = 96;
  std::vector<float> x(kBlocks * kThreads), sums(2 * kBlocks);
  std::vector<uint32_t> ballots(kBlocks * kThreads / 32);
  std::vector<int> others(kThreads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) / 7.0f;
  (void)Launch({.blocks = kBlocks, .threads = kThreads}, nullptr, Sums, x.data(), sums.data(), ballots.data(), others.data());
  for (int block = 0; block < kBlocks; ++block) {
    float sum = 0, largest = 0;
    for (int i = 0; i < kThreads; ++i) {
      const size_t at = static_cast<size_t>(block * kThreads + i);
      sum += x[at], largest = std::max(largest, x[at]);
      EXPECT_EQ((ballots[at / 32] >> (at % 32)) & 1u, x[at] > 0.5f ? 1u : 0u) << at;
    }
    EXPECT_NEAR(sums[static_cast<size_t>(2 * block)], sum, 1e-4);
    EXPECT_EQ(sums[static_cast<size_t>(2 * block + 1)], largest);
  }
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(others[static_cast<size_t>(i)], i % 32 < 16 ? i ^ 3 : i ^ 8);
}

__global__ void SomeWait(bool all) {
  if (all || threadIdx.x > 0) __syncwarp();
  if (threadIdx.x == 0) __shfl_sync(0xffffffffu, 1, 0);
}

TEST(EmulatorDeath, ExchangesThatNotAllLanesReachAreFound) {
  EXPECT_DEATH((void)Launch({.threads = 32}, nullptr, SomeWait, true), "wait for ever");
}

}  // namespace
}  // namespace shoal::cuda
