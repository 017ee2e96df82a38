#include "runtime/kernels/cuda/counting_sort.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;

template <typename T, int N> __global__ void LookUp(const T* table, const int32_t* ids, float* out, int64_t tokens, int64_t width) {
  for (PackWalk walk(width / N); walk.row < tokens;) {
    Floats<N> values[kAtOnce];
    int64_t at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u, walk.Next()) {
      at[u] = walk.row < tokens ? walk.row * width + walk.column * N : -1;
      if (at[u] >= 0) values[u] = Load<N>(table + ids[walk.row] * width + walk.column * N);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (at[u] >= 0) Store(out + at[u], values[u]);
    }
  }
}

constexpr int kTokensAtOnce = 8;

// order: tokens by id, those of an id ascending. The warp at an id's first place adds its tokens' rows, one after the other, at 32 packs
// of columns (blockIdx.y).
template <int N>
__global__ void __launch_bounds__(kThreads) AddRows(const float* dout, const int32_t* ids, const int32_t* order, float* dtable,
                                                    int64_t tokens, int64_t width) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * N;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; place < tokens; place += step) {
    const int32_t id = ids[order[place]];
    if (place > 0 && ids[order[place - 1]] == id) continue;
    float* to = dtable + id * width + column;
    Floats<N> sum = {};
    if (column < width) sum = Load<N>(to);
    int count = 32;
    for (int64_t base = place; count == 32; base += 32) {
      const int32_t token = base + lane < tokens ? order[base + lane] : -1;
      count = __popc(__ballot_sync(0xffffffffu, token >= 0 && ids[token < 0 ? 0 : token] == id));
      for (int first = 0; first < count; first += kTokensAtOnce) {
        Floats<N> rows[kTokensAtOnce];
#pragma unroll
        for (int u = 0; u < kTokensAtOnce; ++u) {
          const int32_t from = __shfl_sync(0xffffffffu, token, first + u);
          if (first + u < count && column < width) rows[u] = Load<N>(dout + from * width + column);
        }
#pragma unroll
        for (int u = 0; u < kTokensAtOnce; ++u) {
          if (first + u >= count) break;
#pragma unroll
          for (int i = 0; i < N; ++i) sum.at[i] += rows[u].at[i];
        }
      }
    }
    if (column < width) Store(to, sum);
  }
}

constexpr int kBitsMax = 10;  // Of a digit.

// The tokens by id, ascending for each: a radix sort. *order receives where they are, in the stream's scratch.
DeviceResult OrderByRow(TensorArg ids, int64_t vocab, const int32_t** order, StreamArg stream) {
  int bits = 1;
  while (int64_t{1} << bits < vocab) ++bits;
  const int passes = static_cast<int>(Blocks(bits, kBitsMax)), digit = static_cast<int>(Blocks(bits, passes));
  const int64_t n = ids.elements, list_bytes = Blocks(n * 4, 256) * 256;
  void* scratch = nullptr;
  const DeviceResult got = Scratch(stream, 2 * list_bytes + CountingSortBytes(n, 1 << digit), &scratch);
  if (got.code != DeviceResult::Code::kOk) return got;
  auto* bytes = static_cast<char*>(scratch);
  CountingSort sort;
  sort.keys = Data<int32_t>(ids);
  sort.n = n;
  sort.mask = (1 << digit) - 1;
  sort.buckets = 1 << digit;
  for (int pass = 0; pass < passes; ++pass) {
    sort.shift = pass * digit;
    sort.sorted = reinterpret_cast<int32_t*>(bytes + pass % 2 * list_bytes);
    const DeviceResult sorted = Sort(sort, bytes + 2 * list_bytes, stream);
    if (sorted.code != DeviceResult::Code::kOk) return sorted;
    sort.order = sort.sorted;
  }
  *order = sort.order;
  return {};
}

}  // namespace

DeviceResult Embedding(TensorArg table, TensorArg ids, TensorArg out, StreamArg stream) {
  if (out.elements == 0) return {};
  return WithType(table, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kWidth<T, float>;
    const int64_t columns = table.shape[1];
    return WithWidth<N>(CanPack(N, columns, table, out), [&](auto width) {
      return Launch({.blocks = WalkingBlocks(Blocks(out.elements, width() * kAtOnce), kThreads), .threads = kThreads}, stream,
                    LookUp<T, width()>, Data<T>(table), Data<int32_t>(ids), Data<float>(out), ids.elements, columns);
    });
  });
}

DeviceResult EmbeddingBackward(TensorArg dout, TensorArg ids, TensorArg dtable, StreamArg stream) {
  if (dout.elements == 0) return {};
  const int64_t tokens = ids.elements, columns = dtable.shape[1];
  const int32_t* order = nullptr;
  const DeviceResult ordered = OrderByRow(ids, dtable.shape[0], &order, stream);
  if (ordered.code != DeviceResult::Code::kOk) return ordered;
  constexpr int N = kWidth<float>;
  return WithWidth<N>(CanPack(N, columns, dout, dtable), [&](auto width) {
    const LaunchShape shape = {.blocks = std::min<int64_t>(Blocks(tokens, kThreads / 32), 65536),
                               .blocks_y = static_cast<int>(Blocks(columns, 32 * width())), .threads = kThreads};
    return Launch(shape, stream, AddRows<width()>, Data<float>(dout), Data<int32_t>(ids), order, Data<float>(dtable), tokens, columns);
  });
}

}  // namespace shoal::cuda
