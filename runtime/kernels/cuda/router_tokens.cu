// Of router.h: what looks at all tokens, and rows of any width.
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kColumns = 32, kSlices = 8, kThreads = kColumns * kSlices;

// The sum of the values of a column that the slices of a block have, in slice 0; a warp is a slice, its lanes are columns.
__device__ __forceinline__ double SumSlices(double own, double (*slices)[kColumns]) {
  const int lane = static_cast<int>(threadIdx.x) % kColumns, slice = static_cast<int>(threadIdx.x) / kColumns;
  slices[slice][lane] = own;
  __syncthreads();
  if (slice == 0) {
    for (int other = 1; other < kSlices; ++other) own += slices[other][lane];
  }
  return own;
}

// partial [gridDim.x, width]: sums of the columns of values, whose rows are `partials` shares of each of a number of sequences;
// blockIdx.y has the columns. row_sum: null, or what to divide each row by.
__global__ void ColumnPartials(const float* values, const double* row_sum, double* partial, int64_t partials, int64_t seq,
                               int64_t width) {
  SHOAL_SHARED(double, slices, [kSlices][kColumns]);
  const int slice = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  const int64_t sequence = blockIdx.x / partials, share = blockIdx.x % partials;
  const int64_t end = sequence * seq + seq * (share + 1) / partials;
  double own = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = sequence * seq + seq * share / partials + slice; row < end; row += kSlices) {
      const double value = static_cast<double>(values[row * width + column]);
      own += row_sum == nullptr ? value : value / row_sum[row];
    }
  }
  own = SumSlices(own, slices);
  if (slice == 0 && column < width) partial[blockIdx.x * width + column] = own;
}

// sums [gridDim.x, width]: of `partials` rows for each.
__global__ void AddPartials(const double* partial, int64_t partials, double* sums, int64_t width) {
  SHOAL_SHARED(double, slices, [kSlices][kColumns]);
  const int slice = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  double own = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = slice; row < partials; row += kSlices) own += partial[(blockIdx.x * partials + row) * width + column];
  }
  own = SumSlices(own, slices);
  if (slice == 0 && column < width) sums[blockIdx.x * width + column] = own;
}

// A warp per row.
__global__ void RowSums(const float* values, double* sums, int64_t rows, int64_t width) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; row < rows; row += gridDim.x * (kThreads / 32)) {
    double sum = 0;
    for (int64_t column = lane; column < width; column += 32) sum += static_cast<double>(values[row * width + column]);
    sum = WarpSum(sum);
    if (lane == 0) sums[row] = sum;
  }
}

// sums [sequences, width] of values, or with kShares of their shares of their rows. The parts that are summed apart are a function of
// the tensor alone, so that sums are the same on every card.
DeviceResult SumColumns(TensorArg values, int64_t sequences, bool shares, double* sums, StreamArg stream) {
  const int64_t rows = values.shape[0], width = values.shape[1];
  if (sequences == 0 || width == 0) return {};
  const int64_t seq = rows / sequences, partials = std::clamp<int64_t>(seq / 64, 1, 256), blocks = sequences * partials;
  const int64_t partial_bytes = blocks * width * 8;
  void* scratch = nullptr;
  const DeviceResult got = Scratch(stream, partial_bytes + (shares ? rows * 8 : 0), &scratch);
  if (got.code != DeviceResult::Code::kOk) return got;
  auto* partial = static_cast<double*>(scratch);
  double* row_sums = shares ? partial + blocks * width : nullptr;
  if (shares) {
    const DeviceResult launched = Launch({.blocks = WalkingBlocks(rows * 32, kThreads), .threads = kThreads}, stream, RowSums,
                                         Data<float>(values), row_sums, rows, width);
    if (launched.code != DeviceResult::Code::kOk) return launched;
  }
  const int tiles = static_cast<int>(Blocks(width, kColumns));
  const DeviceResult launched = Launch({.blocks = blocks, .blocks_y = tiles, .threads = kThreads}, stream, ColumnPartials,
                                       Data<float>(values), row_sums, partial, partials, seq, width);
  if (launched.code != DeviceResult::Code::kOk) return launched;
  return Launch({.blocks = sequences, .blocks_y = tiles, .threads = kThreads}, stream, AddPartials, partial, partials, sums, width);
}

constexpr int kSelectThreads = 1024, kDigits = 256;

// Greater is better: the score, then the earlier token. As OrderOf in router.cu.
__device__ __forceinline__ uint64_t KeyOf(float score, int64_t token) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t order = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}

// A block per expert selects the key of rank `capacity`, digit by digit from the highest: of the keys that begin with the digits found
// so far it counts those with each next digit.
__global__ void __launch_bounds__(kSelectThreads) Select(const float* scores, int64_t tokens, int64_t experts, int64_t capacity,
                                                         float* score, int64_t* token) {
  SHOAL_SHARED(uint32_t, counts, [kDigits]);
  SHOAL_SHARED(uint64_t, found, [1]);
  const float* column = scores + blockIdx.x;
  uint32_t rank = static_cast<uint32_t>(capacity);  // Of thread 0: among the keys that begin with *found.
  if (threadIdx.x == 0) *found = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    if (threadIdx.x < kDigits) counts[threadIdx.x] = 0;
    const uint64_t prefix = *found;
    __syncthreads();
    // Digits that all token numbers share need no count.
    if (shift < 32 && static_cast<uint64_t>(tokens - 1) >> shift == 0) {
      if (threadIdx.x == 0) *found = prefix | uint64_t{0xff} << shift;
      continue;
    }
    for (int64_t t = threadIdx.x; t < tokens; t += kSelectThreads) {
      const uint64_t key = KeyOf(column[t * experts], t);
      if (shift == 56 || (key ^ prefix) >> (shift + 8) == 0) atomicAdd(&counts[key >> shift & 0xff], 1u);
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    uint64_t digit = kDigits - 1;
    for (; digit > 0 && counts[digit] < rank; --digit) rank -= counts[digit];
    *found = prefix | digit << shift;
  }
  if (threadIdx.x != 0) return;
  const int64_t worst = 0xffffffffu - static_cast<uint32_t>(*found);
  score[blockIdx.x] = column[worst * experts];
  token[blockIdx.x] = worst;
}

__global__ void FillNone(int64_t experts, float* score, int64_t* token) {
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (expert < experts) score[expert] = INFINITY, token[expert] = -1;
}

constexpr int kSumThreads = 512;  // Of a block that adds up everything alone.

// `counts` of a layer are the first `experts` of its `width` sums.
__global__ void ScaleCounts(const double* counts, int64_t width, int layers, int experts, bool all_layers, double scale, float* dprob) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), expert = at % experts;
  if (at >= layers * experts) return;
  double count = 0;
  for (int layer = 0; layer < layers; ++layer) {
    if (all_layers || layer == at / experts) count += counts[layer * width + expert];
  }
  dprob[at] = static_cast<float>(scale * count);
}

// A block per sequence.
__global__ void CountSequences(const int32_t* chosen, int64_t pairs, int experts, float fair, float scale, float* load) {
  SHOAL_DYNAMIC_SHARED(uint32_t, counts);
  for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += kThreads) counts[expert] = 0;
  __syncthreads();
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) atomicAdd(&counts[chosen[blockIdx.x * pairs + pair]], 1u);
  __syncthreads();
  for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += kThreads) {
    load[static_cast<int64_t>(blockIdx.x) * experts + expert] = scale * (static_cast<float>(counts[expert]) / fair);
  }
}

// One block: *sum += scale * dot(a, b).
__global__ void __launch_bounds__(kSumThreads) AddDot(const float* a, const double* b, int64_t n, double scale, double* sum) {
  SHOAL_SHARED(double, scratch, [33]);
  double dot = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) dot += static_cast<double>(a[i]) * b[i];
  dot = BlockSum(dot, scratch);
  if (threadIdx.x == 0) *sum += scale * dot;
}

__global__ void Divide(const float* x, const float* by, float* y, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) y[i] = x[i] / *by;
}

// One block: the divisor's growth takes y / by off each quotient.
__global__ void __launch_bounds__(kSumThreads) DivisorGradient(const float* dy, const float* y, const float* by, int64_t n, float* dby) {
  SHOAL_SHARED(double, scratch, [33]);
  double dot = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) dot += static_cast<double>(dy[i]) * static_cast<double>(y[i]);
  dot = BlockSum(dot, scratch);
  if (threadIdx.x == 0) *dby -= static_cast<float>(dot / static_cast<double>(*by));
}

constexpr float kNormMin = 1e-12f;  // As router.h.

// A block per row.
template <int N> __global__ void Normalize(const float* x, float* y, float* norm, int64_t rows, int64_t width) {
  SHOAL_SHARED(float, scratch, [33]);
  const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float squares = 0;
    for (int64_t column = first; column < width; column += step) {
      const Floats<N> values = Load<N>(x + row * width + column);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += values.at[i] * values.at[i];
    }
    const float root = sqrtf(BlockSum(squares, scratch)), length = root < kNormMin ? kNormMin : root;
    if (threadIdx.x == 0) norm[row] = length;
    for (int64_t column = first; column < width; column += step) {
      Floats<N> values = Load<N>(x + row * width + column);
#pragma unroll
      for (int i = 0; i < N; ++i) values.at[i] /= length;
      Store(y + row * width + column, values);
    }
  }
}

template <int N>
__global__ void NormalizeBackward(const float* dy, const float* y, const float* norm, float* dx, int64_t rows, int64_t width) {
  SHOAL_SHARED(float, scratch, [33]);
  const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float length = norm[row];
    float dot = 0;
    for (int64_t column = first; column < width; column += step) {
      const Floats<N> d = Load<N>(dy + row * width + column), values = Load<N>(y + row * width + column);
#pragma unroll
      for (int i = 0; i < N; ++i) dot += d.at[i] * values.at[i];
    }
    dot = BlockSum(dot, scratch);
    const float along = length > kNormMin ? dot : 0.0f;  // Below the bound the length is a constant.
    for (int64_t column = first; column < width; column += step) {
      Floats<N> d = Load<N>(dy + row * width + column);
      const Floats<N> values = Load<N>(y + row * width + column);
#pragma unroll
      for (int i = 0; i < N; ++i) d.at[i] = (d.at[i] - values.at[i] * along) / length;
      Store(dx + row * width + column, d);
    }
  }
}

LaunchShape RowsShape(int64_t rows, int64_t packs) {
  const int threads = static_cast<int>(std::clamp<int64_t>(Blocks(packs, 32) * 32, 32, 256));
  return {.blocks = std::min<int64_t>(rows, int64_t{MultiProcessors()} * std::min(32, 2048 / threads)), .threads = threads};
}

}  // namespace

DeviceResult SumShares(TensorArg scores, TensorArg sums, StreamArg stream) {
  return SumColumns(scores, sums.shape[0], /*shares=*/true, Data<double>(sums), stream);
}

DeviceResult SumOverTokens(TensorArg values, TensorArg sums, StreamArg stream) {
  return SumColumns(values, 1, /*shares=*/false, Data<double>(sums), stream);
}

DeviceResult TopTokens(TensorArg scores, int64_t capacity, TensorArg score, TensorArg token, StreamArg stream) {
  const int64_t tokens = scores.shape[0], experts = scores.shape[1];
  if (capacity == 0) {
    return Launch({.blocks = Blocks(experts, kThreads), .threads = kThreads}, stream, FillNone, experts, Data<float>(score),
                  Data<int64_t>(token));
  }
  return Launch({.blocks = experts, .threads = kSelectThreads}, stream, Select, Data<float>(scores), tokens, experts, capacity,
                Data<float>(score), Data<int64_t>(token));
}

DeviceResult GradientOfCounts(TensorArg sums, int64_t first, bool all_layers, double scale, TensorArg dprob, StreamArg stream) {
  return Launch({.blocks = Blocks(dprob.elements, kThreads), .threads = kThreads}, stream, ScaleCounts, Data<double>(sums) + first,
                sums.shape[1], static_cast<int>(dprob.shape[0]), static_cast<int>(dprob.shape[1]), all_layers, scale,
                Data<float>(dprob));
}

DeviceResult SequenceLoads(TensorArg chosen, float scale, TensorArg load, StreamArg stream) {
  const int64_t sequences = load.shape[0], experts = load.shape[1];
  if (sequences == 0) return {};
  const int64_t pairs = chosen.elements / sequences;
  const float fair = static_cast<float>(pairs) / static_cast<float>(experts);
  return Launch({.blocks = sequences, .threads = kThreads, .shared_bytes = 4 * experts}, stream, CountSequences, Data<int32_t>(chosen),
                pairs, static_cast<int>(experts), fair, scale, Data<float>(load));
}

DeviceResult AddSequenceLoss(TensorArg load, TensorArg shares, double scale, TensorArg loss, StreamArg stream) {
  return Launch({.threads = kSumThreads}, stream, AddDot, Data<float>(load), Data<double>(shares), load.elements, scale,
                Data<double>(loss));
}

DeviceResult DivideBy(TensorArg x, TensorArg by, TensorArg y, StreamArg stream) {
  return Launch({.blocks = WalkingBlocks(y.elements, kThreads), .threads = kThreads}, stream, Divide, Data<float>(x), Data<float>(by),
                Data<float>(y), y.elements);
}

DeviceResult DivideByBackward(TensorArg dy, TensorArg y, TensorArg by, TensorArg dby, StreamArg stream) {
  return Launch({.threads = kSumThreads}, stream, DivisorGradient, Data<float>(dy), Data<float>(y), Data<float>(by), y.elements,
                Data<float>(dby));
}

DeviceResult NormalizeRows(TensorArg x, TensorArg y, TensorArg norm, StreamArg stream) {
  const int64_t rows = x.shape[0], columns = x.shape[1];
  return WithWidth<kWidth<float>>(CanPack(kWidth<float>, columns, x, y), [&](auto width) {
    return Launch(RowsShape(rows, columns / width()), stream, Normalize<width()>, Data<float>(x), Data<float>(y), Data<float>(norm),
                  rows, columns);
  });
}

DeviceResult NormalizeRowsBackward(TensorArg dy, TensorArg y, TensorArg norm, TensorArg dx, StreamArg stream) {
  const int64_t rows = y.shape[0], columns = y.shape[1];
  return WithWidth<kWidth<float>>(CanPack(kWidth<float>, columns, dy, y, dx), [&](auto width) {
    return Launch(RowsShape(rows, columns / width()), stream, NormalizeBackward<width()>, Data<float>(dy), Data<float>(y),
                  Data<float>(norm), Data<float>(dx), rows, columns);
  });
}

}  // namespace shoal::cuda
