#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4, kTensorsMax = 256;

struct Addresses {
  const void* at[kTensorsMax];
};

template <typename T, int N> __global__ void SumAll(const __grid_constant__ Addresses from, int count, T* to, int64_t n) {
  ForEachPack<N, 1>(
      n,
      [&](int64_t i, auto width) {
        Floats<width()> sum = Load<width()>(static_cast<const T*>(from.at[0]) + i);
        for (int first = 1; first < count; first += kAtOnce) {
          Floats<width()> values[kAtOnce];
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            if (first + u < count) values[u] = Load<width()>(static_cast<const T*>(from.at[first + u]) + i);
          }
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            if (first + u >= count) break;
#pragma unroll
            for (int j = 0; j < width(); ++j) sum.at[j] += values[u].at[j];
          }
        }
        return sum;
      },
      [=](int64_t i, auto, const auto& sum) { Store(to + i, sum); });
}

}  // namespace

// In f32, rounded once; `to` may be one of them.
DeviceResult SumTensors(const DeviceTensor* from, int32_t count, TensorArg to, StreamArg stream) {
  if (count < 1 || count > kTensorsMax) return {DeviceResult::Code::kFailed, "SumTensors of none or of more than 256 tensors"};
  if (to.elements == 0) return {};
  return WithType(to, [&](auto type) {
    using T = decltype(type);
    Addresses addresses = {};
    bool packed = CanPack(kWidth<T>, kWidth<T>, to);
    for (int32_t i = 0; i < count; ++i) {
      addresses.at[i] = from[i].data;
      packed = packed && CanPack(kWidth<T>, kWidth<T>, from[i]);
    }
    return WithWidth<kWidth<T>>(packed, [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(to.elements, width()), kThreads), .threads = kThreads}, stream, SumAll<T, width()>,
                    addresses, count, Data<T>(to), to.elements);
    });
  });
}

}  // namespace shoal::cuda
