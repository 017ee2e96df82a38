#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 1024, kAtOnce = 4;

// The maximum of some logits and the sum of e^(logit - max), as they come (Milakov and Gimelshein, 2018, "Online normalizer
// calculation for softmax").
struct Online {
  float max = -INFINITY;
  float sum = 0;

  template <int N> __device__ __forceinline__ void Add(const Floats<N>& logits) {
    float largest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, logits.at[i]);
    const float base = largest == -INFINITY ? 0.0f : largest;  // -inf less -inf would be NaN.
    if (largest != max) sum *= expf(max - base);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += expf(logits.at[i] - base);
    max = largest;
  }
};

template <typename Act> struct Rows {
  const float* logits;
  const int32_t* targets;
  float scale;
  float* loss;
  Act* dlogits;  // Null: none wanted.
  int64_t rows, vocab;
};

// dlogits of a row whose logits, less max, are exponents of probabilities times `sum`.
template <typename Act, int N>
__device__ __forceinline__ void WriteRow(const Rows<Act>& a, int64_t row, float max, double sum, int target, double target_below_max) {
  const float factor = static_cast<float>(static_cast<double>(a.scale) / sum);
  const float at_target = static_cast<float>(static_cast<double>(a.scale) * (exp(target_below_max) / sum - 1.0));
  const float* logits = a.logits + row * a.vocab;
  Act* dlogits = a.dlogits + row * a.vocab;
  const int packs = static_cast<int>(a.vocab) / N;
  for (int first = static_cast<int>(threadIdx.x); first < packs; first += kThreads * kAtOnce) {
    Floats<N> values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int pack = first + u * kThreads;
      if (pack < packs) values[u] = Load<N>(logits + pack * N);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int pack = first + u * kThreads;
      if (pack >= packs) break;
#pragma unroll
      for (int i = 0; i < N; ++i) values[u].at[i] = pack * N + i == target ? at_target : expf(values[u].at[i] - max) * factor;
      Store(dlogits + pack * N, values[u]);
    }
  }
}

// A block per row, one block on a multiprocessor at a time: the rows in work then stay in L2 between their two reads, up to some 64
// thousand logits.
template <typename Act, int N> __global__ void __launch_bounds__(kThreads) CrossEntropyRows(Rows<Act> a) {
  SHOAL_SHARED(float, floats, [33]);
  SHOAL_SHARED(double, doubles, [33]);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const float* logits = a.logits + row * a.vocab;
    const int packs = static_cast<int>(a.vocab) / N;
    Online online;
    for (int first = static_cast<int>(threadIdx.x); first < packs; first += kThreads * kAtOnce) {
      Floats<N> values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int pack = first + u * kThreads;
        if (pack < packs) values[u] = Load<N>(logits + pack * N);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u * kThreads < packs) online.Add(values[u]);
      }
    }
    const float max = BlockMax(online.max, floats);
    const float base = max == -INFINITY ? 0.0f : max;
    const double own = static_cast<double>(online.sum) * static_cast<double>(expf(online.max - base));
    const double sum = BlockSum(own, doubles);
    // Before dlogits, which may be logits, is written: BlockSum ended with a barrier, and another one follows.
    const int target = a.targets[row];
    const double below_max = static_cast<double>(logits[target]) - static_cast<double>(max);
    __syncthreads();
    if (threadIdx.x == 0) a.loss[row] = static_cast<float>(log(sum) - below_max);
    if (a.dlogits != nullptr) WriteRow<Act, N>(a, row, max, sum, target, below_max);
  }
}

}  // namespace

DeviceResult CrossEntropy(TensorArg logits, TensorArg targets, float scale, TensorArg loss, TensorArg dlogits, StreamArg stream) {
  if (logits.elements == 0) return {};
  return WithType(dlogits, [&](auto type) {
    using Act = decltype(type);
    const Rows<Act> a = {.logits = Data<float>(logits), .targets = Data<int32_t>(targets), .scale = scale, .loss = Data<float>(loss),
                         .dlogits = Data<Act>(dlogits), .rows = logits.shape[0], .vocab = logits.shape[1]};
    return WithWidth<kWidth<float>>(CanPack(kWidth<float>, a.vocab, logits, dlogits), [&](auto width) {
      return Launch({.blocks = std::min<int64_t>(a.rows, MultiProcessors()), .threads = kThreads}, stream,
                    CrossEntropyRows<Act, width()>, a);
    });
  });
}

}  // namespace shoal::cuda
