#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;

template <typename T, int N> __global__ void Gather(const T* x, const int32_t* token, T* rows, int64_t count, int64_t width) {
  for (PackWalk walk(width / N); walk.row < count;) {
    Pack<T, N> packs[kAtOnce];
    int64_t at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u, walk.Next()) {
      at[u] = walk.row < count ? walk.row * width + walk.column * N : -1;
      if (at[u] >= 0) packs[u] = *reinterpret_cast<const Pack<T, N>*>(x + token[walk.row] * width + walk.column * N);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (at[u] >= 0) *reinterpret_cast<Pack<T, N>*>(rows + at[u]) = packs[u];
    }
  }
}

template <typename Y, typename Out> struct Combination {
  const float* residual;  // Null: 0.
  const Y* y;
  const int32_t* offset;
  const int32_t* slot;
  const float* weight;  // Null: 1.
  Out* out;
  int64_t tokens, width;
};

// A thread adds up a pack of a token's row, its pairs in their order.
template <typename Y, typename Out, int N> __global__ void Combine(Combination<Y, Out> a) {
  for (PackWalk walk(a.width / N); walk.row < a.tokens; walk.Next()) {
    const int64_t column = walk.column * N, at = walk.row * a.width + column;
    const int32_t end = a.offset[walk.row + 1];
    Floats<N> sum = {};
    if (a.residual != nullptr) sum = Load<N>(a.residual + at);
    for (int32_t first = a.offset[walk.row]; first < end; first += kAtOnce) {
      Floats<N> y[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u >= end) break;
        y[u] = Load<N>(a.y + a.slot[first + u] * a.width + column);
        weight[u] = a.weight == nullptr ? 1.0f : a.weight[first + u];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u >= end) break;
#pragma unroll
        for (int i = 0; i < N; ++i) sum.at[i] += y[u].at[i] * weight[u];
      }
    }
    Store(a.out + at, sum);
  }
}

template <typename Y, typename Out> DeviceResult CombineRows(const Combination<Y, Out>& a, bool packed, StreamArg stream) {
  return WithWidth<kWidth<Y>>(packed, [&](auto width) {
    return Launch({.blocks = WalkingBlocks(a.tokens * (a.width / width()), kThreads), .threads = kThreads}, stream,
                  Combine<Y, Out, width()>, a);
  });
}

template <typename Act> struct CombinationGradient {
  const float* dout;
  const Act* y;
  const int32_t* offset;
  const int32_t* slot;
  const float* weight;
  Act* dy;
  float* dweight;
  int64_t tokens, width;
};

// A block per token, whose row of dout waits in shared memory (kStaged) for its pairs, of which each warp takes some. y is read before
// dy, which may be y, is written.
template <typename Act, int N, bool kStaged> __global__ void CombineBackward(CombinationGradient<Act> a) {
  SHOAL_DYNAMIC_SHARED(float, staged);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    const int32_t begin = a.offset[token], end = a.offset[token + 1];
    if (begin == end) continue;
    const float* dout = a.dout + token * a.width;
    if constexpr (kStaged) {
      __syncthreads();  // The token before is done.
      for (int64_t column = threadIdx.x * N; column < a.width; column += blockDim.x * N) Store(staged + column, Load<N>(dout + column));
      __syncthreads();
      dout = staged;
    }
    for (int32_t pair = begin + warp; pair < end; pair += warps) {
      const int64_t row = a.slot[pair] * a.width;
      const float weight = a.weight[pair];
      float dot = 0;
      for (int64_t first = lane * N; first < a.width; first += 32 * N * kAtOnce) {
        Floats<N> y[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const int64_t column = first + u * 32 * N;
          if (column < a.width) y[u] = Load<N>(a.y + row + column);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const int64_t column = first + u * 32 * N;
          if (column >= a.width) break;
          Floats<N> d = Load<N>(dout + column);
#pragma unroll
          for (int i = 0; i < N; ++i) dot += d.at[i] * y[u].at[i], d.at[i] *= weight;
          Store(a.dy + row + column, d);
        }
      }
      dot = WarpSum(dot);
      if (lane == 0) a.dweight[pair] = dot;
    }
  }
}

template <typename Act> DeviceResult CombineRowsBackward(const CombinationGradient<Act>& a, int64_t pairs, bool packed, StreamArg stream) {
  // A warp for each pair of an average token.
  const int threads = 32 * static_cast<int>(std::clamp<int64_t>(Blocks(pairs, std::max<int64_t>(a.tokens, 1)), 2, 8));
  LaunchShape shape = {.blocks = std::min<int64_t>(a.tokens, int64_t{MultiProcessors()} * 2048 / threads), .threads = threads};
  return WithWidth<kWidth<Act>>(packed, [&](auto width) {
    if (a.width * 4 > 100 * 1024) return Launch(shape, stream, CombineBackward<Act, width(), false>, a);
    shape.shared_bytes = a.width * 4;
    return Launch(shape, stream, CombineBackward<Act, width(), true>, a);
  });
}

}  // namespace

DeviceResult GatherRows(TensorArg x, TensorArg token, TensorArg rows, StreamArg stream) {
  if (rows.elements == 0) return {};
  return WithType(x, [&](auto type) {
    using T = decltype(type);
    const int64_t columns = x.shape[1];
    return WithWidth<kWidth<T>>(CanPack(kWidth<T>, columns, x, rows), [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(rows.elements, width() * kAtOnce), kThreads), .threads = kThreads}, stream,
                    Gather<T, width()>, Data<T>(x), Data<int32_t>(token), Data<T>(rows), rows.shape[0], columns);
    });
  });
}

DeviceResult SumSlots(TensorArg drows, TensorArg offset, TensorArg slot, TensorArg dx, StreamArg stream) {
  if (dx.elements == 0) return {};
  return WithType(drows, [&](auto from_type) {
    return WithType(dx, [&](auto to_type) {
      using Y = decltype(from_type);
      using Out = decltype(to_type);
      const Combination<Y, Out> a = {.residual = nullptr, .y = Data<Y>(drows), .offset = Data<int32_t>(offset),
                                     .slot = Data<int32_t>(slot), .weight = nullptr, .out = Data<Out>(dx),
                                     .tokens = dx.shape[0], .width = dx.shape[1]};
      return CombineRows(a, CanPack(kWidth<Y>, a.width, drows, dx), stream);
    });
  });
}

DeviceResult CombineSlots(TensorArg residual, TensorArg y, TensorArg offset, TensorArg slot, TensorArg weight, TensorArg out,
                          StreamArg stream) {
  if (out.elements == 0) return {};
  return WithType(y, [&](auto type) {
    using Y = decltype(type);
    const Combination<Y, float> a = {.residual = Data<float>(residual), .y = Data<Y>(y), .offset = Data<int32_t>(offset),
                                     .slot = Data<int32_t>(slot), .weight = Data<float>(weight), .out = Data<float>(out),
                                     .tokens = out.shape[0], .width = out.shape[1]};
    return CombineRows(a, CanPack(kWidth<Y>, a.width, residual, y, out), stream);
  });
}

DeviceResult CombineSlotsBackward(TensorArg dout, TensorArg y, TensorArg offset, TensorArg slot, TensorArg weight, TensorArg dy,
                                  TensorArg dweight, StreamArg stream) {
  if (dout.elements == 0) return {};
  return WithType(y, [&](auto type) {
    using Act = decltype(type);
    const CombinationGradient<Act> a = {.dout = Data<float>(dout), .y = Data<Act>(y), .offset = Data<int32_t>(offset),
                                        .slot = Data<int32_t>(slot), .weight = Data<float>(weight), .dy = Data<Act>(dy),
                                        .dweight = Data<float>(dweight), .tokens = dout.shape[0], .width = dout.shape[1]};
    return CombineRowsBackward(a, slot.elements, CanPack(kWidth<Act>, a.width, dout, y, dy), stream);
  });
}

}  // namespace shoal::cuda
