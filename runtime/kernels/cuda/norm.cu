#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kPacksMax = 4;  // That a thread holds of a row: with 1024 threads, rows of 16384 elements.

// Of a block whose threads hold so many packs; 0: they read a row twice.
template <int kPacks> constexpr int kThreadsMax = kPacks == 0 ? 256 : kPacks == kPacksMax ? 1024 : 128 * kPacks;

// Threads for a row of `packs`, which hold `*packs_each` each; 0: none can.
int ThreadsOfRow(int64_t packs, int* packs_each) {
  for (const int each : {1, 2, kPacksMax}) {
    *packs_each = each;
    // Few threads with several loads in flight beat many with one, but a block should have some warps.
    const int64_t threads = Blocks(Blocks(packs, each), 32) * 32;
    if (threads <= (each == kPacksMax ? 1024 : 128 * each)) return static_cast<int>(threads);
  }
  *packs_each = 0;
  return 0;
}

template <typename Act> struct Norm {
  const float* x;
  const Act* delta;  // Null: none.
  const float* weight;
  float epsilon;
  float* sum;
  Act* y;
  float* rstd;
  int64_t rows, width;
};

template <int N, typename Act> __device__ __forceinline__ Floats<N> LoadSum(const Norm<Act>& a, int64_t at) {
  Floats<N> values = Load<N>(a.x + at);
  if (a.delta != nullptr) {
    const Floats<N> delta = Load<N>(a.delta + at);
#pragma unroll
    for (int i = 0; i < N; ++i) values.at[i] += delta.at[i];
    Store(a.sum + at, values);
  }
  return values;
}

// Where pack p of a thread begins.
template <int N> __device__ __forceinline__ int ColumnOf(int p) {
  return (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
}

// Makes the sums of what the threads hold of a row, and stores them: all loads come before the first store.
template <typename Act, int N, int kPacks>
__device__ __forceinline__ void AddDelta(const Norm<Act>& a, int64_t row, Floats<N> (&held)[kPacks]) {
  const int width = static_cast<int>(a.width);
  const Act* from = a.delta + row * a.width;
  float* sum = a.sum + row * a.width;
  Floats<N> delta[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = ColumnOf<N>(p);
    if (column < width) delta[p] = Load<N>(from + column);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = ColumnOf<N>(p);
    if (column >= width) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) held[p].at[i] += delta[p].at[i];
    Store(sum + column, held[p]);
  }
}

// A block per row, which its threads hold: read once.
template <typename Act, int N, int kPacks> __global__ void __launch_bounds__(kThreadsMax<kPacks>) NormHeld(Norm<Act> a) {
  SHOAL_SHARED(float, scratch, [33]);
  const int width = static_cast<int>(a.width);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Floats<N> held[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = ColumnOf<N>(p);
      if (column < width) held[p] = Load<N>(a.x + row * a.width + column);
    }
    if (a.delta != nullptr) AddDelta<Act, N, kPacks>(a, row, held);
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = ColumnOf<N>(p);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += column < width ? held[p].at[i] * held[p].at[i] : 0.0f;
    }
    const float rstd = 1.0f / sqrtf(BlockSum(squares, scratch) / static_cast<float>(a.width) + a.epsilon);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = ColumnOf<N>(p);
      if (column >= width) continue;
      const Floats<N> weight = Load<N>(a.weight + column);
#pragma unroll
      for (int i = 0; i < N; ++i) held[p].at[i] = held[p].at[i] * rstd * weight.at[i];
      Store(a.y + row * a.width + column, held[p]);
    }
  }
}

// Rows of any width: read twice.
template <typename Act, int N> __global__ void __launch_bounds__(kThreadsMax<0>) NormRead(Norm<Act> a) {
  SHOAL_SHARED(float, scratch, [33]);
  const float* normed = a.delta == nullptr ? a.x : a.sum;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    float squares = 0;
    for (int64_t column = threadIdx.x * N; column < a.width; column += step) {
      const Floats<N> values = LoadSum<N>(a, row * a.width + column);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += values.at[i] * values.at[i];
    }
    const float rstd = 1.0f / sqrtf(BlockSum(squares, scratch) / static_cast<float>(a.width) + a.epsilon);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
    for (int64_t column = threadIdx.x * N; column < a.width; column += step) {
      Floats<N> values = Load<N>(normed + row * a.width + column);
      const Floats<N> weight = Load<N>(a.weight + column);
#pragma unroll
      for (int i = 0; i < N; ++i) values.at[i] = values.at[i] * rstd * weight.at[i];
      Store(a.y + row * a.width + column, values);
    }
  }
}

template <typename Act> DeviceResult NormRows(const Norm<Act>& a, bool packed, StreamArg stream) {
  constexpr int N = kWidth<float>;
  int each = 0;
  const int threads = ThreadsOfRow(Blocks(a.width, N), &each);
  if (!packed || threads == 0) {
    const LaunchShape shape = {.blocks = std::min<int64_t>(a.rows, MultiProcessors() * 8), .threads = 256};
    return WithWidth<N>(packed, [&](auto width) { return Launch(shape, stream, NormRead<Act, width()>, a); });
  }
  const int64_t at_once = int64_t{MultiProcessors()} * std::min(2048 / threads, 32);
  const LaunchShape shape = {.blocks = std::min(a.rows, at_once), .threads = threads};
  if (each == 1) return Launch(shape, stream, NormHeld<Act, N, 1>, a);
  if (each == 2) return Launch(shape, stream, NormHeld<Act, N, 2>, a);
  return Launch(shape, stream, NormHeld<Act, N, kPacksMax>, a);
}

template <typename Act> struct NormGradient {
  const Act* dy;
  const float* x;
  const float* weight;
  const float* rstd;
  float* dx;
  float* partial;  // [gridDim.x, width]: of the weight's gradient, of the rows of a block.
  int64_t rows, width;
};

// y = w x r with r = (mean(x^2) + eps)^(-1/2): dx = r (w dy) - x r^3 / D * dot(w dy, x). Each block takes neighbouring rows and adds
// up its share of the weight's gradient in shared memory, each thread at columns of its own. kPacks = 0: rows are read twice.
template <typename Act, int N, int kPacks> __global__ void __launch_bounds__(kThreadsMax<kPacks>) NormBackward(NormGradient<Act> a) {
  SHOAL_SHARED(float, scratch, [33]);
  SHOAL_DYNAMIC_SHARED(float, dweight);
  constexpr int kHeld = kPacks == 0 ? 1 : kPacks;
  constexpr bool kAhead = kPacks == 1 || kPacks == 2;  // dx is read with the rest, where there are registers for it.
  const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t column = first; column < a.width; column += step) Store(dweight + column, Floats<N>{});
  const int64_t begin = a.rows * blockIdx.x / gridDim.x, end = a.rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = begin; row < end; ++row) {
    const Act* dy = a.dy + row * a.width;
    const float* x = a.x + row * a.width;
    float* dx = a.dx + row * a.width;
    const float rstd = a.rstd[row];
    Floats<N> by_y[kHeld], by_x[kHeld];     // dy, then w dy; x.
    Floats<N> before[kAhead ? kPacks : 1];  // dx
    float dot = 0;
    const auto add = [&](int64_t column, Floats<N>& g, const Floats<N>& v) {
      const Floats<N> weight = Load<N>(a.weight + column);
      Floats<N> sums = Load<N>(dweight + column);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gv = g.at[i] * v.at[i];
        sums.at[i] += gv * rstd;
        dot += gv * weight.at[i];
        g.at[i] *= weight.at[i];
      }
      Store(dweight + column, sums);
    };
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t column = first + p * step;
        if (column < a.width) by_y[p] = Load<N>(dy + column), by_x[p] = Load<N>(x + column);
        if (kAhead && column < a.width) before[kAhead ? p : 0] = Load<N>(dx + column);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t column = first + p * step;
        if (column < a.width) add(column, by_y[p], by_x[p]);
      }
    } else {
      for (int64_t column = first; column < a.width; column += step) {
        by_y[0] = Load<N>(dy + column), by_x[0] = Load<N>(x + column);
        add(column, by_y[0], by_x[0]);
      }
    }
    const float along_x = -BlockSum(dot, scratch) * rstd * rstd * rstd / static_cast<float>(a.width);
    const auto add_dx = [&](int64_t column, const Floats<N>& g, const Floats<N>& v, Floats<N> sum) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum.at[i] += g.at[i] * rstd + v.at[i] * along_x;
      Store(dx + column, sum);
    };
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t column = first + p * step;
        if (column < a.width) add_dx(column, by_y[p], by_x[p], kAhead ? before[kAhead ? p : 0] : Load<N>(dx + column));
      }
    } else {
      for (int64_t column = first; column < a.width; column += step) {
        Floats<N> g = Load<N>(dy + column);
        const Floats<N> weight = Load<N>(a.weight + column);
#pragma unroll
        for (int i = 0; i < N; ++i) g.at[i] *= weight.at[i];
        add_dx(column, g, Load<N>(x + column), Load<N>(dx + column));
      }
    }
  }
  float* partial = a.partial + blockIdx.x * a.width;
  for (int64_t column = first; column < a.width; column += step) Store(partial + column, Load<N>(dweight + column));
}

constexpr int kColumns = 32, kSlices = 8;

// sum[width] += the rows of partial: a warp's lanes take columns, the warps of a block slices of the rows.
__global__ void AddPartials(const float* partial, int64_t partials, float* sum, int64_t width) {
  SHOAL_SHARED(float, slices, [kSlices][kColumns]);
  const int lane = static_cast<int>(threadIdx.x) % kColumns, slice = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  float own = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = partials * slice / kSlices; row < partials * (slice + 1) / kSlices; ++row) own += partial[row * width + column];
  }
  slices[slice][lane] = own;
  __syncthreads();
  if (slice != 0 || column >= width) return;
  for (int other = 1; other < kSlices; ++other) own += slices[other][lane];
  sum[column] += own;
}

// As many as are faster than fewer, and no more than give each some rows: a function of the tensor alone, so that sums are the same on
// every card.
int64_t PartialsOf(int64_t rows) { return std::min<int64_t>(512, Blocks(rows, 4)); }

template <typename Act> DeviceResult NormRowsBackward(const NormGradient<Act>& a, bool packed, StreamArg stream) {
  constexpr int N = kWidth<float>;
  int each = 0;
  const int threads = ThreadsOfRow(Blocks(a.width, N), &each);
  LaunchShape shape = {.blocks = PartialsOf(a.rows), .threads = 256, .shared_bytes = a.width * 4};
  if (!packed || threads == 0) {
    return WithWidth<N>(packed, [&](auto width) { return Launch(shape, stream, NormBackward<Act, width(), 0>, a); });
  }
  shape.threads = threads;
  if (each == 1) return Launch(shape, stream, NormBackward<Act, N, 1>, a);
  if (each == 2) return Launch(shape, stream, NormBackward<Act, N, 2>, a);
  return Launch(shape, stream, NormBackward<Act, N, kPacksMax>, a);
}

}  // namespace

DeviceResult RmsNorm(TensorArg x, TensorArg delta, TensorArg weight, float epsilon, TensorArg sum, TensorArg y, TensorArg rstd,
                     StreamArg stream) {
  if (x.elements == 0) return {};
  return WithType(y, [&](auto type) {
    using Act = decltype(type);
    const Norm<Act> a = {.x = Data<float>(x), .delta = Data<Act>(delta), .weight = Data<float>(weight), .epsilon = epsilon,
                         .sum = Data<float>(sum), .y = Data<Act>(y), .rstd = Data<float>(rstd),
                         .rows = x.shape[0], .width = x.shape[1]};
    return NormRows(a, CanPack(kWidth<float>, a.width, x, delta, weight, sum, y), stream);
  });
}

DeviceResult RmsNormBackward(TensorArg dy, TensorArg x, TensorArg weight, TensorArg rstd, TensorArg dx, TensorArg dweight,
                             StreamArg stream) {
  if (x.elements == 0) return {};
  const int64_t rows = x.shape[0], width = x.shape[1];
  if (width * 4 > 200 * 1024) return {DeviceResult::Code::kFailed, "RmsNormBackward of rows wider than 51200"};
  void* partial = nullptr;
  if (const DeviceResult got = Scratch(stream, PartialsOf(rows) * width * 4, &partial); got.code != DeviceResult::Code::kOk) return got;
  const DeviceResult launched = WithType(dy, [&](auto type) {
    using Act = decltype(type);
    const NormGradient<Act> a = {.dy = Data<Act>(dy), .x = Data<float>(x), .weight = Data<float>(weight), .rstd = Data<float>(rstd),
                                 .dx = Data<float>(dx), .partial = static_cast<float*>(partial), .rows = rows, .width = width};
    return NormRowsBackward(a, CanPack(kWidth<float>, width, dy, x, weight, dx), stream);
  });
  if (launched.code != DeviceResult::Code::kOk) return launched;
  return Launch({.blocks = Blocks(width, kColumns), .threads = kColumns * kSlices}, stream, AddPartials,
                static_cast<const float*>(partial), PartialsOf(rows), Data<float>(dweight), width);
}

}  // namespace shoal::cuda
