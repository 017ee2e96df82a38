// Quantising to e4m3 by blocks, and products of what is quantised (runtime/kernels/fp8.h).
#include "runtime/kernels/cuda/segment_walk.h"
#include "runtime/kernels/cuda/tile_product_fp8.h"

#ifndef __CUDACC__
#include "runtime/tensor/e4m3.h"
#endif

namespace shoal::cuda {
namespace {

constexpr int kBlock = 128;  // Elements of a row with one scale.
constexpr uint32_t kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

#ifdef __CUDACC__
DeviceResult MultipliesCodes() {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return Failed(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device); error != cudaSuccess) return Failed(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device); error != cudaSuccess) return Failed(error);
  if (10 * major + minor >= 89) return {};
  return {DeviceResult::Code::kUnavailable, "train.matmul: fp8 needs a GPU of compute capability 8.9 or later"};
}
#else
DeviceResult MultipliesCodes() { return {}; }
#endif

// A block's scale, of its largest magnitude as bits: a power of two that brings it to at most 448, which is 1.75 times 2^8. With the
// inverse, by which codes are found: 0 for blocks that are not finite, so that theirs are 0 and only the scale tells.
struct Scale {
  float scale, inverse;

  __device__ explicit Scale(uint32_t largest) {
    if (largest >= kInfinity) {
      scale = __uint_as_float(kNaN), inverse = 0.0f;
      return;
    }
    uint32_t exponent = (largest + 0x1fffffu) >> 23;  // Biased.
    exponent = (exponent > 35u ? exponent : 35u) - 8u;
    scale = __uint_as_float(exponent << 23), inverse = __uint_as_float((254u - exponent) << 23);
  }
};

// Four numbers of a block as codes, the first in the lowest byte.
__device__ __forceinline__ uint32_t Codes(const float (&values)[4], const Scale& scale) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1] * scale.inverse), "f"(values[0] * scale.inverse));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3] * scale.inverse), "f"(values[2] * scale.inverse));
  const uint32_t codes = low | static_cast<uint32_t>(high) << 16;
#elif defined(__CUDACC__)
  const uint32_t codes = 0;  // GPUs without products of codes: MultipliesCodes.
#else
  uint32_t codes = 0;
  for (int i = 0; i < 4; ++i) codes |= static_cast<uint32_t>(ToE4m3(values[i] * scale.inverse)) << 8 * i;
#endif
  return scale.inverse == 0.0f ? 0u : codes;
}

// Four elements from column `column` on, zeros behind `width`. `packed`: they may be read by one access.
__device__ __forceinline__ void Load4(float (&values)[4], const Bf16* row, int64_t column, int64_t width, bool packed) {
  if (packed && column < width) {
    const auto pack = *reinterpret_cast<const Pack<Bf16, 4>*>(row + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = ToFloat(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = column + i < width ? ToFloat(row[column + i]) : 0.0f;
  }
}
__device__ __forceinline__ uint32_t LargestOf(const float (&values)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (const float value : values) {
    const uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}
__device__ __forceinline__ uint32_t LargestOfWarp(uint32_t largest) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// A block by a warp, four elements by a lane.
__global__ void RowsKernel(const Bf16* x, int64_t rows, int64_t width, bool packed, uint8_t* codes, float* scales) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t blocks = Blocks(width, kBlock), warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; item < rows * blocks; item += warps) {
    const int64_t row = item / blocks, block = item % blocks;
    float values[4];
    Load4(values, x + row * width, block * kBlock + 4 * lane, width, packed);
    const Scale scale(LargestOfWarp(LargestOf(values)));
    reinterpret_cast<uint32_t*>(codes)[item * (kBlock / 4) + lane] = Codes(values, scale);
    if (lane == 0) scales[item] = scale.scale;
  }
}

// Matrices of one shape, by value, so that a recorded graph has them.
constexpr int kMatricesMost = 64;
struct Matrices {
  const Bf16* at[kMatricesMost];
};

// blockIdx.x: a block of 128 x 128, by rows; blockIdx.y: the matrix.
__global__ void WeightsKernel(Matrices matrices, int64_t rows, int64_t columns, bool packed, uint8_t* codes, uint8_t* transposed,
                              float* scales) {
  constexpr int kThreads = 256, kEach = kBlock * kBlock / 4 / kThreads, kStride = kBlock + 4;
  SHOAL_SHARED(uint32_t, largest_of_warp, [kThreads / 32]);
  SHOAL_SHARED(uint32_t, tile, [kBlock * kStride / 4]);  // Of bytes, written four at once.
  const int64_t down = Blocks(rows, kBlock), across = Blocks(columns, kBlock);
  const int64_t first_row = blockIdx.x / across * kBlock, first_column = blockIdx.x % across * kBlock, matrix = blockIdx.y;
  const Bf16* const from = matrices.at[matrix];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float values[kEach][4];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t row = first_row + i * (kThreads / 32) + warp;
    Load4(values[i], from + row * columns, first_column + 4 * lane, row < rows ? columns : 0, packed);
    const uint32_t own = LargestOf(values[i]);
    largest = own > largest ? own : largest;
  }
  largest = LargestOfWarp(largest);
  if (lane == 0) largest_of_warp[warp] = largest;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) largest = largest_of_warp[i] > largest ? largest_of_warp[i] : largest;
  const Scale scale(largest);
  if (thread == 0) scales[matrix * down * across + blockIdx.x] = scale.scale;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = i * (kThreads / 32) + warp;
    const uint32_t four = Codes(values[i], scale);
    tile[row * (kStride / 4) + lane] = four;
    if (first_row + row < rows) {
      *reinterpret_cast<uint32_t*>(codes + ((matrix * rows + first_row + row) * across * kBlock + first_column + 4 * lane)) = four;
    }
  }
  __syncthreads();
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(tile);
  for (int i = 0; i < kEach; ++i) {
    const int column = i * (kThreads / 32) + warp;
    uint32_t four = 0;
    for (int j = 0; j < 4; ++j) four |= static_cast<uint32_t>(bytes[(4 * lane + j) * kStride + column]) << 8 * j;
    if (first_column + column < columns) {
      *reinterpret_cast<uint32_t*>(transposed + ((matrix * columns + first_column + column) * down * kBlock + first_row + 4 * lane)) = four;
    }
  }
}

struct Fp8Operands {
  const uint8_t* x;
  const float* x_scales;
  const uint8_t* weights;
  const float* weight_scales;
  bool transposed;  // Scales are those of [k, n].
  int blocks;       // Of k.
  int64_t n;        // Columns of y.
  unsigned char* y;
  bool f32;
  const float* addend;
  unsigned char* h;  // Gated alone.
};

// Every gridDim.x-th tile of y[rows, n] from blockIdx.x on, of codes x[rows, k] and those of weights [E, n, k]. kIsGated: with
// h[rows, n / 2]; n / 2 is a multiple of 128 then, so that a tile's gates have one scale, and so have their ups.
template <bool kIsGated> struct Fp8Work {
  static constexpr bool kGated = kIsGated;
  static constexpr int kTileColumns = Fp8TileProduct::kColumns / (kGated ? 2 : 1);
  const Fp8Operands of;
  TileWalk walk;
  int64_t number = blockIdx.x;

  __device__ int64_t columns() const { return kGated ? of.n / 2 : of.n; }
  __device__ bool Next(Fp8Tile& to) {
    TileWalk::Tile tile;
    if (!walk.Find(number, tile)) return false;
    number += gridDim.x;
    // Tiles below one another follow one another: they share the weights.
    const int64_t tiles_m = Blocks(tile.rows, Fp8TileProduct::kRows), of_n = Blocks(of.n, kBlock), line = int64_t{of.blocks} * kBlock;
    const int64_t m_begin = tile.tile % tiles_m * Fp8TileProduct::kRows, n_begin = tile.tile / tiles_m * kTileColumns;
    const int64_t row = tile.begin + m_begin;
    const float* const scales = of.weight_scales + tile.expert * of_n * of.blocks;
    const auto scales_at = [&](int64_t column) { return scales + (of.transposed ? column / kBlock : column / kBlock * of.blocks); };
    to = {tile.rows - m_begin,
          columns() - n_begin,
          of.blocks,
          of.x + row * line,
          of.weights + (tile.expert * of.n + n_begin) * line,
          of.x_scales + row * of.blocks,
          scales_at(n_begin),
          of.transposed ? of_n : 1,
          {of.y + (row * of.n + n_begin) * (of.f32 ? 4 : 2), of.n, of.f32, of.addend == nullptr ? nullptr : of.addend + row * of.n + n_begin}};
    if constexpr (kGated) {
      to.up_scales = scales_at(columns() + n_begin);
      to.result.inner = columns();
      to.result.h = of.h + (row * columns() + n_begin) * 2;
    }
    return true;
  }
};

template <bool kGated>
__global__ void __launch_bounds__(Fp8TileProduct::kThreads, Fp8TileProduct::kBlocks)
    Fp8Kernel(Fp8Operands operands, int64_t rows, const int32_t* segments, int32_t segment_count) {
  using Work = Fp8Work<kGated>;
  SHOAL_DYNAMIC_SHARED(unsigned char, shared);
  const SegmentWindow window = {segments, segment_count, static_cast<int32_t>(rows)};
  Work work = {operands, TileWalk(window, Fp8TileProduct::kRows, Blocks(kGated ? operands.n / 2 : operands.n, Work::kTileColumns))};
  Fp8TileProduct::Run(work, shared);
}

}  // namespace

DeviceResult QuantiseRows(TensorArg x, TensorArg codes, TensorArg scales, StreamArg stream) {
  if (const DeviceResult able = MultipliesCodes(); able.code != DeviceResult::Code::kOk) return able;
  constexpr int kThreads = 256;
  const int64_t width = x.shape[1], resident = static_cast<int64_t>(MultiProcessors()) * (2048 / kThreads);
  const int64_t blocks = Blocks(scales.elements, kThreads / 32);
  const bool packed = width % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % 8 == 0;
  return Launch({.blocks = blocks < resident ? blocks : resident, .threads = kThreads}, stream, RowsKernel, Data<Bf16>(x), x.shape[0],
                width, packed, Data<uint8_t>(codes), Data<float>(scales));
}

DeviceResult QuantiseWeights(const DeviceTensor* weights, int32_t count, TensorArg codes, TensorArg transposed, TensorArg scales,
                             StreamArg stream) {
  if (const DeviceResult able = MultipliesCodes(); able.code != DeviceResult::Code::kOk) return able;
  const int64_t rows = codes.shape[1], columns = transposed.shape[1], blocks = scales.shape[1] * scales.shape[2];
  for (int32_t first = 0; first < count; first += kMatricesMost) {
    const int32_t some = count - first < kMatricesMost ? count - first : kMatricesMost;
    Matrices matrices = {};
    bool packed = columns % 4 == 0;
    for (int32_t i = 0; i < some; ++i) {
      matrices.at[i] = Data<Bf16>(weights[first + i]);
      packed = packed && reinterpret_cast<uintptr_t>(matrices.at[i]) % 8 == 0;
    }
    const DeviceResult result =
        Launch({.blocks = blocks, .blocks_y = some, .threads = 256}, stream, WeightsKernel, matrices, rows, columns, packed,
               Data<uint8_t>(codes) + first * (codes.elements / count), Data<uint8_t>(transposed) + first * (transposed.elements / count),
               Data<float>(scales) + first * blocks);
    if (result.code != DeviceResult::Code::kOk) return result;
  }
  return {};
}

DeviceResult Fp8MatMul(TensorArg x, TensorArg x_scales, TensorArg weights, TensorArg weight_scales, bool transposed, TensorArg segments,
                       TensorArg addend, TensorArg y, TensorArg h, StreamArg stream) {
  const bool all = segments.data == nullptr && segments.rank < 2;
  const int64_t n = y.shape[1], segment_count = all ? 1 : segments.shape[0];
  if (segment_count == 0) return {};
  const bool gated = h.elements > 0 && n % (2 * kBlock) == 0;
  const int64_t tiles_most = (y.shape[0] / Fp8TileProduct::kRows + segment_count) * Blocks(n, Fp8TileProduct::kColumns);
  const int64_t resident = static_cast<int64_t>(MultiProcessors()) * Fp8TileProduct::kBlocks;
  const LaunchShape shape = {.blocks = tiles_most < resident ? tiles_most : resident,
                             .threads = Fp8TileProduct::kThreads,
                             .shared_bytes = Fp8TileProduct::kSharedBytes};
  const Fp8Operands operands = {Data<uint8_t>(x),
                                Data<float>(x_scales),
                                Data<uint8_t>(weights),
                                Data<float>(weight_scales),
                                transposed,
                                static_cast<int>(x_scales.shape[1]),
                                n,
                                Data<unsigned char>(y),
                                y.dtype == DType::kF32,
                                Data<float>(addend),
                                Data<unsigned char>(h)};
  if (gated) return Launch(shape, stream, Fp8Kernel<true>, operands, y.shape[0], Data<int32_t>(segments), segment_count);
  const DeviceResult product = Launch(shape, stream, Fp8Kernel<false>, operands, y.shape[0], Data<int32_t>(segments), segment_count);
  return h.elements == 0 || product.code != DeviceResult::Code::kOk ? product : SwiGlu(y, h, stream);
}

}  // namespace shoal::cuda
