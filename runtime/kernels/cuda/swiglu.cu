#include "runtime/kernels/cuda/gate.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 2;

template <typename T, int N> __global__ void SwiGluRows(const T* gate_up, T* h, int64_t rows, int64_t width) {
  for (PackWalk walk(width / N); walk.row < rows;) {
    Floats<N> gate[kAtOnce], up[kAtOnce];
    int64_t at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u, walk.Next()) {
      at[u] = walk.row < rows ? walk.row * width + walk.column * N : -1;
      const T* from = gate_up + walk.row * 2 * width + walk.column * N;
      if (at[u] >= 0) gate[u] = Load<N>(from), up[u] = Load<N>(from + width);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (at[u] < 0) break;
#pragma unroll
      for (int i = 0; i < N; ++i) gate[u].at[i] = Gated<T>(gate[u].at[i], up[u].at[i]);
      Store(h + at[u], gate[u]);
    }
  }
}

// A thread reads all its inputs before it writes: outputs may be the inputs.
template <typename T, int N>
__global__ void SwiGluRowsBackward(const T* dh, const T* gate_up, T* dgate_up, T* h, int64_t rows, int64_t width) {
  for (PackWalk walk(width / N); walk.row < rows; walk.Next()) {
    const int64_t at = walk.row * width + walk.column * N, gate_at = at + walk.row * width;
    Floats<N> d = Load<N>(dh + at), gate = Load<N>(gate_up + gate_at), up = Load<N>(gate_up + gate_at + width);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float sigmoid = Sigmoid<T>(gate.at[i]), silu = gate.at[i] * sigmoid, u = up.at[i];
      gate.at[i] = d.at[i] * u * (sigmoid + silu * (1.0f - sigmoid));
      up.at[i] = d.at[i] * silu;
      d.at[i] = silu * u;
    }
    Store(dgate_up + gate_at, gate), Store(dgate_up + gate_at + width, up), Store(h + at, d);
  }
}

}  // namespace

DeviceResult SwiGlu(TensorArg gate_up, TensorArg h, StreamArg stream) {
  if (h.elements == 0) return {};
  return WithType(h, [&](auto type) {
    using T = decltype(type);
    const int64_t rows = h.shape[0], columns = h.shape[1];
    return WithWidth<kWidth<T>>(CanPack(kWidth<T>, columns, gate_up, h), [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(h.elements, width() * kAtOnce), kThreads), .threads = kThreads}, stream,
                    SwiGluRows<T, width()>, Data<T>(gate_up), Data<T>(h), rows, columns);
    });
  });
}

DeviceResult SwiGluBackward(TensorArg dh, TensorArg gate_up, TensorArg dgate_up, TensorArg h, StreamArg stream) {
  if (dh.elements == 0) return {};
  return WithType(dh, [&](auto type) {
    using T = decltype(type);
    const int64_t rows = dh.shape[0], columns = dh.shape[1];
    return WithWidth<kWidth<T>>(CanPack(kWidth<T>, columns, dh, gate_up, dgate_up, h), [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(dh.elements, width()), kThreads), .threads = kThreads}, stream,
                    SwiGluRowsBackward<T, width()>, Data<T>(dh), Data<T>(gate_up), Data<T>(dgate_up), Data<T>(h), rows, columns);
    });
  });
}

}  // namespace shoal::cuda
