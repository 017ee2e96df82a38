// Products of experts' rows with their weights (matmul.h) over segments that lie in device memory. A grid as large as the device walks
// tiles of the results: which tiles there are, its blocks find from the counts of the segments, so that the host need not know them and
// no row is multiplied in vain. A tile is the sum over steps of k, in their order whatever stands beside it: the bits of a result depend
// on its own rows and weights alone.
#include "runtime/kernels/cuda/segment_walk.h"
#include "runtime/kernels/cuda/tile_product.h"

namespace shoal::cuda {
namespace {

// The steps of a product whose k lies along rows of both operands, or across those of b.
template <typename T> struct AlongSteps {
  const T* a;
  const T* b;
  int64_t a_step, b_step;  // Elements from one step to the next.
  int64_t k;               // Left.

  __device__ bool Next(int step_k, Step<T>& step) {
    if (k <= 0) return false;
    step = {a, b, static_cast<int>(k < step_k ? k : step_k)};
    a += a_step;
    b += b_step;
    k -= step_k;
    return true;
  }
};

// The steps of a product over the rows of one expert's segments, in their order.
template <typename T> class SegmentSteps {
 public:
  SegmentSteps() = default;
  __device__ SegmentSteps(const int32_t* segments, int32_t count, int32_t expert, const T* a, int64_t a_stride, const T* b,
                          int64_t b_stride)
      : window_{segments, count}, expert_(expert), a_(a), b_(b), a_stride_(a_stride), b_stride_(b_stride) {}

  __device__ bool Next(int step_k, Step<T>& step) {
    while (left_ == 0) {
      while (mine_ == 0) {
        if (!window_.Advance()) return false;
        mine_ = __ballot_sync(0xffffffffu, window_.rows > 0 && window_.expert == expert_);
      }
      const int lane = __ffs(static_cast<int>(mine_)) - 1;
      mine_ &= mine_ - 1;
      row_ = From(window_.begin, lane);
      left_ = From(window_.rows, lane);
    }
    const int k = left_ < step_k ? left_ : step_k;
    step = {a_ + row_ * a_stride_, b_ + row_ * b_stride_, k};
    row_ += k;
    left_ -= k;
    return true;
  }

 private:
  SegmentWindow window_;
  int32_t expert_ = 0;
  const T *a_ = nullptr, *b_ = nullptr;
  int64_t a_stride_ = 0, b_stride_ = 0;
  uint32_t mine_ = 0;  // Lanes of the window whose segments are still to come.
  int64_t row_ = 0;
  int32_t left_ = 0;
};

// y[rows, n] = x[rows, k] w^T with w [n, k], or with kAcross x w with w [k, n]: every gridDim.x-th tile from blockIdx.x on.
template <typename T, bool kAcross> struct RowsWork {
  using Product = TileProduct<T, false, kAcross>;
  using Steps = AlongSteps<T>;
  static constexpr bool kGated = false;
  const T* x;
  const int64_t* weights;
  int64_t k, n;
  unsigned char* y;
  bool f32;
  TileWalk walk;
  int64_t number = blockIdx.x;

  __device__ bool Next(Steps& steps, TileShape& shape, TileResult& result) {
    TileWalk::Tile tile;
    if (!walk.Find(number, tile)) return false;
    number += gridDim.x;
    // Tiles below one another follow one another: they share the weights.
    const int64_t tiles_m = Blocks(tile.rows, Product::kRows);
    const int64_t m_begin = tile.tile % tiles_m * Product::kRows, n_begin = tile.tile / tiles_m * Product::kColumns;
    const int64_t row = tile.begin + m_begin, w_stride = kAcross ? n : k;
    const T* const a = x + row * k;
    const T* const b = reinterpret_cast<const T*>(weights[tile.expert]) + (kAcross ? n_begin : n_begin * k);
    steps = {a, b, Product::kStep, kAcross ? Product::kStep * n : Product::kStep, k};
    shape = {tile.rows - m_begin, n - n_begin, k, w_stride, AreAligned(a, k, b, w_stride)};
    result = {y + (row * n + n_begin) * (f32 ? 4 : 2), n, f32, nullptr};
    return true;
  }
};

template <typename T, bool kAcross>
__global__ void __launch_bounds__(TileProduct<T, false, kAcross>::kThreads, TileProduct<T, false, kAcross>::kBlocks)
    RowsKernel(const T* x, const int64_t* weights, const int32_t* segments, int32_t segment_count, int64_t k, int64_t n, void* y,
               bool f32) {
  using Product = TileProduct<T, false, kAcross>;
  SHOAL_DYNAMIC_SHARED(unsigned char, shared);
  RowsWork<T, kAcross> work = {x,
                               weights,
                               k,
                               n,
                               static_cast<unsigned char*>(y),
                               f32,
                               TileWalk({segments, segment_count}, Product::kRows, Blocks(n, Product::kColumns))};
  Product::Run(work, shared);
}

// gate_up[rows, 2 F] = x[rows, k] w^T with w [2 F, k], and h[rows, F] of it, likewise.
struct GatedWork {
  using Product = TileProduct<Bf16, false, false>;
  using Steps = AlongSteps<Bf16>;
  static constexpr bool kGated = true;
  static constexpr int kTileColumns = Product::kColumns / 2;
  const Bf16* x;
  const int64_t* weights;
  int64_t k, inner;
  Bf16* gate_up;
  Bf16* h;
  TileWalk walk;
  int64_t number = blockIdx.x;

  __device__ bool Next(Steps& steps, TileShape& shape, TileResult& result) {
    TileWalk::Tile tile;
    if (!walk.Find(number, tile)) return false;
    number += gridDim.x;
    const int64_t tiles_m = Blocks(tile.rows, Product::kRows);
    const int64_t m_begin = tile.tile % tiles_m * Product::kRows, n_begin = tile.tile / tiles_m * kTileColumns;
    const int64_t row = tile.begin + m_begin;
    const Bf16* const a = x + row * k;
    const Bf16* const b = reinterpret_cast<const Bf16*>(weights[tile.expert]) + n_begin * k;
    steps = {a, b, Product::kStep, Product::kStep, k};
    shape = {tile.rows - m_begin, inner - n_begin, k, k, AreAligned(a, k, b, k), inner};
    result = {gate_up + row * 2 * inner + n_begin, 2 * inner, false, nullptr, inner, h + row * inner + n_begin};
    return true;
  }
};

__global__ void __launch_bounds__(GatedWork::Product::kThreads, GatedWork::Product::kBlocks)
    GatedKernel(const Bf16* x, const int64_t* weights, const int32_t* segments, int32_t segment_count, int64_t k, int64_t inner,
                Bf16* gate_up, Bf16* h) {
  using Product = GatedWork::Product;
  SHOAL_DYNAMIC_SHARED(unsigned char, shared);
  GatedWork work = {x, weights, k, inner, gate_up, h,
                    TileWalk({segments, segment_count}, Product::kRows, Blocks(inner, GatedWork::kTileColumns))};
  Product::Run(work, shared);
}

// dw[n, k] (+)= dy[rows, n]^T x[rows, k] of each expert, likewise.
template <typename T> struct WeightWork {
  using Product = TileProduct<T, true, true>;
  using Steps = SegmentSteps<T>;
  static constexpr bool kGated = false;
  const T* dy;
  const T* x;
  const int32_t* segments;
  int32_t segment_count;
  int64_t n, k, experts;
  bool add;
  const int64_t* weight_grads;
  int64_t number = blockIdx.x;

  __device__ bool Next(Steps& steps, TileShape& shape, TileResult& result) {
    const int64_t tiles_m = Blocks(n, Product::kRows), tiles = tiles_m * Blocks(k, Product::kColumns);
    if (number >= experts * tiles) return false;
    const int64_t expert = number / tiles, tile = number % tiles;
    number += gridDim.x;
    const int64_t m_begin = tile % tiles_m * Product::kRows, n_begin = tile / tiles_m * Product::kColumns;
    const T* const a = dy + m_begin;
    const T* const b = x + n_begin;
    steps = Steps(segments, segment_count, static_cast<int32_t>(expert), a, n, b, k);
    shape = {n - m_begin, k - n_begin, n, k, AreAligned(a, n, b, k)};
    float* const sum = reinterpret_cast<float*>(weight_grads[expert]) + m_begin * k + n_begin;
    result = {sum, k, true, add ? sum : nullptr};
    return true;
  }
};

template <typename T>
__global__ void __launch_bounds__(TileProduct<T, true, true>::kThreads, TileProduct<T, true, true>::kBlocks)
    WeightKernel(const T* dy, const T* x, const int32_t* segments, int32_t segment_count, int64_t n, int64_t k, int64_t experts, bool add,
                 const int64_t* weight_grads) {
  SHOAL_DYNAMIC_SHARED(unsigned char, shared);
  WeightWork<T> work = {dy, x, segments, segment_count, n, k, experts, add, weight_grads};
  TileProduct<T, true, true>::Run(work, shared);
}

// Of a block: the most that the kernel has a use for, if the device has it.
template <typename Product> int64_t SharedBytes() {
  return SharedMemoryOfBlock() >= Product::kSharedBytesMost ? Product::kSharedBytesMost : Product::kSharedBytes;
}

template <typename T, bool kAcross> DeviceResult Rows(TensorArg x, TensorArg weights, TensorArg segments, TensorArg y, StreamArg stream) {
  using Product = TileProduct<T, false, kAcross>;
  const int64_t n = y.shape[1], segment_count = segments.shape[0];
  const int64_t tiles_most = (y.shape[0] / Product::kRows + segment_count) * Blocks(n, Product::kColumns);
  const int64_t resident = static_cast<int64_t>(MultiProcessors()) * Product::kBlocks;
  return Launch(
      {.blocks = tiles_most < resident ? tiles_most : resident, .threads = Product::kThreads, .shared_bytes = SharedBytes<Product>()},
      stream, RowsKernel<T, kAcross>, Data<T>(x), Data<int64_t>(weights), Data<int32_t>(segments), segment_count, x.shape[1], n, y.data,
      y.dtype == DType::kF32);
}

}  // namespace

DeviceResult GroupedMatMul(TensorArg x, TensorArg weights, TensorArg segments, TensorArg y, StreamArg stream) {
  return WithType(x, [&](auto type) { return Rows<decltype(type), false>(x, weights, segments, y, stream); });
}

DeviceResult GroupedMatMulSwiGlu(TensorArg x, TensorArg weights, TensorArg segments, TensorArg gate_up, TensorArg h, StreamArg stream) {
  if (x.dtype != DType::kBF16) {
    const DeviceResult product = GroupedMatMul(x, weights, segments, gate_up, stream);
    return product.code == DeviceResult::Code::kOk ? SwiGlu(gate_up, h, stream) : product;
  }
  using Product = GatedWork::Product;
  const int64_t inner = h.shape[1], segment_count = segments.shape[0];
  const int64_t tiles_most = (h.shape[0] / Product::kRows + segment_count) * Blocks(inner, GatedWork::kTileColumns);
  const int64_t resident = static_cast<int64_t>(MultiProcessors()) * Product::kBlocks;
  return Launch(
      {.blocks = tiles_most < resident ? tiles_most : resident, .threads = Product::kThreads, .shared_bytes = SharedBytes<Product>()},
      stream, GatedKernel, Data<Bf16>(x), Data<int64_t>(weights), Data<int32_t>(segments), segment_count, x.shape[1], inner,
      Data<Bf16>(gate_up), Data<Bf16>(h));
}

DeviceResult GroupedMatMulGradInput(TensorArg dy, TensorArg weights, TensorArg segments, TensorArg dx, StreamArg stream) {
  return WithType(dy, [&](auto type) { return Rows<decltype(type), true>(dy, weights, segments, dx, stream); });
}

DeviceResult GroupedMatMulGradWeight(TensorArg dy, TensorArg x, TensorArg segments, bool add, TensorArg weight_grads, StreamArg stream) {
  return WithType(dy, [&](auto type) {
    using T = decltype(type);
    using Product = TileProduct<T, true, true>;
    const int64_t n = dy.shape[1], k = x.shape[1], experts = weight_grads.elements;
    const int64_t tiles = experts * Blocks(n, Product::kRows) * Blocks(k, Product::kColumns);
    const int64_t resident = static_cast<int64_t>(MultiProcessors()) * Product::kBlocks;
    return Launch({.blocks = tiles < resident ? tiles : resident, .threads = Product::kThreads, .shared_bytes = SharedBytes<Product>()},
                  stream, WeightKernel<T>, Data<T>(dy), Data<T>(x), Data<int32_t>(segments), segments.shape[0], n, k, experts, add,
                  Data<int64_t>(weight_grads));
  });
}

}  // namespace shoal::cuda
