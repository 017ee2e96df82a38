// Which kernel serves which attention: bf16 heads of up to 256 by the tensor cores, everything else by plain multiply-adds.
#include <cmath>

#include "runtime/kernels/cuda/attention_mma.h"
#include "runtime/kernels/cuda/attention_plain.h"

namespace shoal::cuda {
namespace {

// delta[token, head] = sum of dout * out over the head: what all scores' gradients of a query share. One warp each, which reads kPack
// elements at a time.
template <typename T, int kPack>
__global__ void DeltaKernel(const T* out, const T* dout, int64_t vectors, int32_t dim, float* delta) {
  const int64_t vector = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (vector >= vectors) return;  // Whole warps.
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32 * kPack; i < dim; i += 32 * kPack) {
    const auto a = *reinterpret_cast<const Pack<T, kPack>*>(out + vector * dim + i);
    const auto b = *reinterpret_cast<const Pack<T, kPack>*>(dout + vector * dim + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum += ToFloat(a.at[j]) * ToFloat(b.at[j]);
  }
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) delta[vector] = sum;
}

float Scale(const Sequences& s) { return static_cast<float>(1 / std::sqrt(static_cast<double>(s.dim))); }

bool HasTensorCores(const Sequences& s, DType dtype) { return dtype == DType::kBF16 && s.dim <= 256; }

// Calls body with the smallest instance that holds a head.
template <typename Body> DeviceResult WithDim(int32_t dim, const Body& body) {
  if (dim <= 64) return body(std::integral_constant<int, 64>{});
  if (dim <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

bool Aligned(const void* data, const Sequences& s) { return IsAligned16(data) && s.dim % 8 == 0; }

constexpr DeviceResult kTooWide = {DeviceResult::Code::kFailed, "attention: a head is wider than shared memory holds"};

template <typename T> DeviceResult PlainForward(const Sequences& s, TensorArg qkv, TensorArg out, TensorArg lse, StreamArg stream) {
  const int tile = PlainTile(s.dim, 4, 1);
  if (tile == 0) return kTooWide;
  return Launch({.blocks = s.blocks(s.heads, tile), .threads = kPlainThreads, .shared_bytes = PlainShared(s.dim, tile, 4, 1)}, stream,
                PlainAttentionKernel<T>, s, tile, Data<T>(qkv), Data<T>(out), Data<float>(lse), Scale(s));
}

template <typename T>
DeviceResult PlainBackward(const Sequences& s, TensorArg qkv, TensorArg lse, const float* delta, TensorArg dout, TensorArg dqkv,
                           StreamArg stream) {
  const int tile = PlainTile(s.dim, 6, 2);
  if (tile == 0) return kTooWide;
  const DeviceResult keys =
      Launch({.blocks = s.blocks(s.kv_heads, tile), .threads = kPlainThreads, .shared_bytes = PlainShared(s.dim, tile, 6, 2)}, stream,
             PlainAttentionKeysKernel<T>, s, tile, Data<T>(qkv), Data<float>(lse), delta, Data<T>(dout), Data<T>(dqkv), Scale(s));
  if (keys.code != DeviceResult::Code::kOk) return keys;
  return Launch({.blocks = s.blocks(s.heads, tile), .threads = kPlainThreads, .shared_bytes = PlainShared(s.dim, tile, 5, 2)}, stream,
                PlainAttentionQueriesKernel<T>, s, tile, Data<T>(qkv), Data<float>(lse), delta, Data<T>(dout), Data<T>(dqkv), Scale(s));
}

DeviceResult MmaBackward(const Sequences& s, TensorArg qkv, TensorArg lse, const float* delta, TensorArg dout, TensorArg dqkv,
                         StreamArg stream) {
  const BackwardArguments in = {s,
                                Data<Bf16>(qkv),
                                Data<float>(lse),
                                delta,
                                Data<Bf16>(dout),
                                Data<Bf16>(dqkv),
                                Scale(s),
                                Aligned(qkv.data, s) && Aligned(dout.data, s)};
  return WithDim(s.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Tiles = AttentionTiles<kDim>;
    const DeviceResult keys =
        Launch({.blocks = s.blocks(s.kv_heads, Tiles::kOwn), .threads = 128 * Tiles::kParts, .shared_bytes = Tiles::kBackwardShared},
               stream, AttentionKeysKernel<kDim>, in);
    if (keys.code != DeviceResult::Code::kOk) return keys;
    return Launch({.blocks = s.blocks(s.heads, Tiles::kOwn), .threads = 128, .shared_bytes = Tiles::kBackwardShared}, stream,
                  AttentionQueriesKernel<kDim>, in);
  });
}

}  // namespace

DeviceResult Attention(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, TensorArg qkv, TensorArg first,
                       TensorArg out, TensorArg lse, StreamArg stream) {
  const Sequences s = {rows, seq, heads, kv_heads, dim, Data<int32_t>(first)};
  if (!HasTensorCores(s, qkv.dtype)) {
    return WithType(qkv, [&](auto type) { return PlainForward<decltype(type)>(s, qkv, out, lse, stream); });
  }
  return WithDim(dim, [&](auto kernel_dim) {
    constexpr int kDim = decltype(kernel_dim)::value;
    using Tiles = AttentionTiles<kDim>;
    return Launch({.blocks = s.blocks(heads, Tiles::kQueries), .threads = 128, .shared_bytes = Tiles::kForwardShared}, stream,
                  AttentionKernel<kDim>,
                  ForwardArguments{s, Data<Bf16>(qkv), Data<Bf16>(out), Data<float>(lse), Scale(s), Aligned(qkv.data, s)});
  });
}

DeviceResult AttentionBackward(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, TensorArg qkv, TensorArg first,
                               TensorArg out, TensorArg lse, TensorArg dout, TensorArg dqkv, StreamArg stream) {
  const Sequences s = {rows, seq, heads, kv_heads, dim, Data<int32_t>(first)};
  const int64_t vectors = rows * seq * heads;
  void* memory = nullptr;
  const DeviceResult scratch = Scratch(stream, vectors * 4, &memory);
  if (scratch.code != DeviceResult::Code::kOk) return scratch;
  auto* const delta = static_cast<float*>(memory);
  return WithType(qkv, [&](auto type) {
    using T = decltype(type);
    const bool packs = dim % 4 == 0 && IsAligned16(out.data) && IsAligned16(dout.data);
    const DeviceResult result = Launch({.blocks = Blocks(vectors, 8)}, stream, packs ? DeltaKernel<T, 4> : DeltaKernel<T, 1>, Data<T>(out),
                                       Data<T>(dout), vectors, dim, delta);
    if (result.code != DeviceResult::Code::kOk) return result;
    if (HasTensorCores(s, qkv.dtype)) return MmaBackward(s, qkv, lse, delta, dout, dqkv, stream);
    return PlainBackward<T>(s, qkv, lse, delta, dout, dqkv, stream);
  });
}

}  // namespace shoal::cuda
