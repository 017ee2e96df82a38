#include "runtime/kernels/adamw_numbers.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256;

using kernels::AdamWNumber;

// As AdamWCoefficients of cpu/inner.h. The last three are made of the step's numbers.
struct Coefficients {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon;
  double weight_decay;
  float decay, step_size, root_scale;
};

// An element: its gradient, scaled; master, m and v before and after.
__device__ __forceinline__ void Update(const Coefficients& c, float g, float& master, float& m, float& v) {
  m = m * c.beta1 + g * c.one_minus_beta1;
  v = v * c.beta2 + g * g * c.one_minus_beta2;
  // One rounding of the sum of both changes: 1 - decay would keep few of decay's digits.
  master -= master * c.decay + c.step_size * m / (sqrtf(v) * c.root_scale + c.epsilon);
}

template <typename C, int N>
__global__ void __launch_bounds__(kThreads) AdamWAll(Coefficients c, const double* numbers, const float* grad, float* master, float* m,
                                                     float* v, C* copy, int64_t n) {
  if (numbers[AdamWNumber::kApply] == 0) return;
  const float scale = static_cast<float>(numbers[AdamWNumber::kGradScale]);
  c.decay = static_cast<float>(numbers[AdamWNumber::kLearningRate] * c.weight_decay);
  c.step_size = static_cast<float>(numbers[AdamWNumber::kStepSize]);
  c.root_scale = static_cast<float>(numbers[AdamWNumber::kRootScale]);
  ForEachPack<N, 1>(
      n, [=](int64_t i, auto width) { return Load<width()>(grad + i); },
      [=](int64_t i, auto width, const auto& g) {
        auto masters = Load<width()>(master + i), ms = Load<width()>(m + i), vs = Load<width()>(v + i);
#pragma unroll
        for (int j = 0; j < width(); ++j) Update(c, g.at[j] * scale, masters.at[j], ms.at[j], vs.at[j]);
        Store(m + i, ms), Store(v + i, vs), Store(master + i, masters);
        if (copy != nullptr) Store(copy + i, masters);
      });
}

constexpr int64_t kPartialsMax = 2048, kPartialElements = 4096;
constexpr int kSumThreads = 256, kAtOnce = 4;

// Elements of a partial sum: a function of n alone, so that the sum is the same on every card.
__host__ __device__ int64_t PartialElements(int64_t n) {
  const int64_t least = (n + kPartialsMax - 1) / kPartialsMax;
  return (least + kPartialElements - 1) / kPartialElements * kPartialElements;
}

template <int N> __global__ void SquarePartials(const float* x, int64_t n, double* partial) {
  SHOAL_SHARED(double, scratch, [33]);
  const int64_t share = PartialElements(n), begin = blockIdx.x * share, end = begin + share < n ? begin + share : n;
  double sums[kAtOnce] = {};
  const int64_t step = static_cast<int64_t>(kSumThreads) * N;
  for (int64_t first = begin + threadIdx.x * N; first < end; first += step * kAtOnce) {
    Floats<N> values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t at = first + u * step;
      values[u] = {};
      if (at + N <= end) {
        values[u] = Load<N>(x + at);
      } else {
        for (int i = 0; i < N; ++i) {
          if (at + i < end) values[u].at[i] = x[at + i];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[u] += static_cast<double>(values[u].at[i]) * static_cast<double>(values[u].at[i]);
    }
  }
  const double sum = BlockSum((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void AddPartials(const double* partial, int64_t partials, double* sum) {
  SHOAL_SHARED(double, scratch, [33]);
  double own = 0;
  for (int64_t i = threadIdx.x; i < partials; i += kSumThreads) own += partial[i];
  own = BlockSum(own, scratch);
  if (threadIdx.x == 0) *sum = own;
}

__device__ bool Finite(double value) { return value - value == 0; }

// By one block: the sum is in the order of the host's, so that both have the same bits.
__global__ void Clip(const double* squares, int64_t n, const double* losses, int64_t losses_n, double clip, double* numbers) {
  constexpr int kTile = 1024;
  SHOAL_SHARED(double, tile, [kTile]);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int count = static_cast<int>(n - begin < kTile ? n - begin : kTile);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) tile[i] = squares[begin + i];
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < count; ++i) total += tile[i];
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double norm = sqrt(total);
  bool finite = Finite(norm);
  for (int64_t i = 0; i < losses_n; ++i) finite = finite && Finite(losses[i]);
  numbers[AdamWNumber::kGradScale] = clip > 0 && norm > clip ? static_cast<double>(static_cast<float>(clip / (norm + 1e-6))) : 1.0;
  numbers[AdamWNumber::kApply] = finite ? 1.0 : 0.0;
  numbers[AdamWNumber::kGradNorm] = norm;
}

}  // namespace

DeviceResult AdamW(double beta1, double beta2, double epsilon, double weight_decay, TensorArg numbers, TensorArg grad,
                   TensorArg master, TensorArg m, TensorArg v, TensorArg copy, StreamArg stream) {
  const int64_t n = master.elements;
  if (n == 0) return {};
  const Coefficients c = {.beta1 = static_cast<float>(beta1),
                          .one_minus_beta1 = static_cast<float>(1 - beta1),
                          .beta2 = static_cast<float>(beta2),
                          .one_minus_beta2 = static_cast<float>(1 - beta2),
                          .epsilon = static_cast<float>(epsilon),
                          .weight_decay = weight_decay};
  return WithType(copy, [&](auto type) {
    using C = decltype(type);
    constexpr int N = kWidth<float>;
    return WithWidth<N>(CanPack(N, N, grad, master, m, v, copy), [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(n, width()), kThreads), .threads = kThreads}, stream, AdamWAll<C, width()>, c,
                    Data<double>(numbers), Data<float>(grad), Data<float>(master), Data<float>(m), Data<float>(v), Data<C>(copy), n);
    });
  });
}

DeviceResult ClipGradients(TensorArg squares, TensorArg losses, double clip, TensorArg numbers, StreamArg stream) {
  return Launch({.threads = kThreads}, stream, Clip, Data<double>(squares), squares.elements, Data<double>(losses), losses.elements,
                clip, Data<double>(numbers));
}

DeviceResult SumOfSquares(TensorArg x, TensorArg sum, StreamArg stream) {
  const int64_t n = x.elements, partials = n == 0 ? 0 : Blocks(n, PartialElements(n));
  void* partial = nullptr;
  if (const DeviceResult got = Scratch(stream, kPartialsMax * 8, &partial); got.code != DeviceResult::Code::kOk) return got;
  const DeviceResult launched = WithWidth<kWidth<float>>(CanPack(kWidth<float>, kWidth<float>, x), [&](auto width) {
    return Launch({.blocks = partials, .threads = kSumThreads}, stream, SquarePartials<width()>, Data<float>(x), n,
                  static_cast<double*>(partial));
  });
  if (launched.code != DeviceResult::Code::kOk) return launched;
  return Launch({.threads = kSumThreads}, stream, AddPartials, static_cast<const double*>(partial), partials, Data<double>(sum));
}

}  // namespace shoal::cuda
