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
  int items_per_name = 1;  // Items of a name stand together: `sorted` receives names, item / items_per_name.

  // Results; null: not wanted.
  int32_t* sorted = nullptr;  // [n], of the item at each place.
  int32_t* place = nullptr;   // [n], of each item.
  int32_t* segments = nullptr;  // [buckets, 3]: the bucket, the place of its first item, its items.
  int32_t* first = nullptr;     // [names + 1]: the first item of each name, and their number.
};

constexpr int kBucketsMax = 50 * 1024;
int64_t CountingSortBytes(int64_t n, int buckets);  // Of `scratch`, a multiple of 256.
DeviceResult Sort(const CountingSort& sort, void* scratch, DeviceStream* stream);

}  // namespace shoal::cuda
