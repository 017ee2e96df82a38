// A stable counting sort on the device: where items go is a function of their keys alone, and the host learns nothing.
#pragma once

#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

// Of n items, 0 <= n < 2^31, by bucket (keys[item] >> shift) & mask, which is below `buckets`; items of a bucket stay in their order.
struct CountingSort {
  const int32_t* keys = nullptr;
  const int32_t* order = nullptr;  // The items in the order that they have now; null: 0, 1, ... n - 1.
  int64_t n = 0;
  int shift = 0;
  int32_t mask = 0x7fffffff;
  int buckets = 0;
  int32_t* sorted = nullptr;  // [n], receives the item at each place.
};

// Those whose counts a block has room for.
constexpr int kBucketsMax = 50 * 1024;
int64_t CountingSortBytes(int64_t n, int buckets);  // Of `scratch`, a multiple of 256.
DeviceResult Sort(const CountingSort& sort, void* scratch, DeviceStream* stream);

}  // namespace shoal::cuda
