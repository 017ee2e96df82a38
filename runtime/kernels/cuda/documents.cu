#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A block per sequence, which it walks through by kThreads tokens: the latest beginning up to a token is a running maximum.
__global__ void __launch_bounds__(kThreads)
    DocumentStartsKernel(const int32_t* tokens, int32_t end_of_document, int64_t seq, int32_t* first) {
  SHOAL_SHARED(int32_t, of_warp, [kWarps]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * seq;
  int32_t before = 0;  // Of the tokens walked past.
  for (int64_t base = 0; base < seq; base += kThreads) {
    const int64_t t = base + threadIdx.x;
    int32_t latest = t > 0 && t < seq && tokens[row + t - 1] == end_of_document ? static_cast<int32_t>(t) : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, latest, static_cast<unsigned>(distance));
      if (lane >= distance && other > latest) latest = other;
    }
    if (lane == 31) of_warp[warp] = latest;
    __syncthreads();
    if (before > latest) latest = before;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp && of_warp[other] > latest) latest = of_warp[other];
      if (of_warp[other] > before) before = of_warp[other];
    }
    if (t < seq) first[row + t] = latest;
    __syncthreads();
  }
}

}  // namespace

DeviceResult DocumentStarts(TensorArg tokens, int32_t end_of_document, TensorArg first, StreamArg stream) {
  if (tokens.elements == 0) return {};
  return Launch({.blocks = tokens.shape[0], .threads = kThreads}, stream, DocumentStartsKernel, Data<int32_t>(tokens), end_of_document,
                tokens.shape[1], Data<int32_t>(first));
}

}  // namespace shoal::cuda
