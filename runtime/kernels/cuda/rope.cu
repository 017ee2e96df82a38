#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 2;  // That a thread rotates by the same angles.

template <typename T> struct Rotation {
  T* x;
  const float* cos;
  const float* sin;
  float sin_sign;
  int64_t rows, width, seq;
  int heads, half;
};

// A thread takes a pack of the lower halves of some heads, and its partners. Its item in a row is (group of heads, pack of a half).
template <typename T, int N> __global__ void Rotate(Rotation<T> a) {
  const int packs = a.half / N, groups = (a.heads + kHeads - 1) / kHeads;
  for (PackWalk walk(static_cast<int64_t>(packs) * groups); walk.row < a.rows; walk.Next()) {
    const int i = walk.column % packs * N, first = walk.column / packs * kHeads;
    const int64_t angle = walk.row % a.seq * a.half + i;
    const Floats<N> cos = Load<N>(a.cos + angle), sin = Load<N>(a.sin + angle);
    T* row = a.x + walk.row * a.width + i;
    Floats<N> low[kHeads], high[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      T* head = row + static_cast<int64_t>(first + h) * 2 * a.half;
      if (first + h < a.heads) low[h] = Load<N>(head), high[h] = Load<N>(head + a.half);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (first + h >= a.heads) break;
      T* head = row + static_cast<int64_t>(first + h) * 2 * a.half;
      Floats<N> rotated_low, rotated_high;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float c = cos.at[j], s = sin.at[j] * a.sin_sign, x = low[h].at[j], y = high[h].at[j];
        rotated_low.at[j] = x * c - y * s;
        rotated_high.at[j] = y * c + x * s;
      }
      Store(head, rotated_low), Store(head + a.half, rotated_high);
    }
  }
}

}  // namespace

DeviceResult Rope(TensorArg x, int32_t heads, int32_t dim, TensorArg cos, TensorArg sin, bool backward, StreamArg stream) {
  if (x.elements == 0 || heads == 0) return {};
  return WithType(x, [&](auto type) {
    using T = decltype(type);
    const Rotation<T> a = {.x = Data<T>(x), .cos = Data<float>(cos), .sin = Data<float>(sin), .sin_sign = backward ? -1.0f : 1.0f,
                           .rows = x.shape[0], .width = x.shape[1], .seq = cos.shape[0], .heads = heads, .half = dim / 2};
    const bool packed = CanPack(kWidth<T>, a.width, x, cos, sin) && a.half % kWidth<T> == 0;
    return WithWidth<kWidth<T>>(packed, [&](auto width) {
      const int64_t items = a.rows * (a.half / width()) * Blocks(heads, kHeads);
      return Launch({.blocks = WalkingBlocks(items, kThreads), .threads = kThreads}, stream, Rotate<T, width()>, a);
    });
  });
}

}  // namespace shoal::cuda
