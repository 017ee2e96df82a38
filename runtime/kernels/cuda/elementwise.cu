#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/pack.h"

namespace shoal::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;

template <typename From, typename To, int N> __global__ void ConvertAll(const From* from, To* to, int64_t n) {
  ForEachPack<N, kAtOnce>(
      n, [=](int64_t i, auto width) { return Load<width()>(from + i); },
      [=](int64_t i, auto, const auto& values) { Store(to + i, values); });
}

template <typename Word, int N> __global__ void CopyAll(const Word* from, Word* to, int64_t n) {
  ForEachPack<N, kAtOnce>(
      n, [=](int64_t i, auto width) { return *reinterpret_cast<const Pack<Word, width()>*>(from + i); },
      [=](int64_t i, auto, const auto& values) { *reinterpret_cast<std::decay_t<decltype(values)>*>(to + i) = values; });
}

template <typename X, int N> __global__ void AddAll(const X* x, float* sum, int64_t n) {
  struct Both {
    Floats<N> x, sum;
  };
  ForEachPack<N, kAtOnce / 2>(
      n,
      [=](int64_t i, auto width) {
        Both both;
        const auto a = Load<width()>(x + i), b = Load<width()>(sum + i);
#pragma unroll
        for (int j = 0; j < width(); ++j) both.x.at[j] = a.at[j], both.sum.at[j] = b.at[j];
        return both;
      },
      [=](int64_t i, auto width, const Both& both) {
        Floats<width()> added;
#pragma unroll
        for (int j = 0; j < width(); ++j) added.at[j] = both.sum.at[j] + both.x.at[j];
        Store(sum + i, added);
      });
}

LaunchShape FlatShape(int64_t n, int width) { return {.blocks = WalkingBlocks(Blocks(n, width * kAtOnce), kThreads), .threads = kThreads}; }

template <typename From, typename To> DeviceResult ConvertTo(TensorArg from, TensorArg to, StreamArg stream) {
  constexpr int kPack = kWidth<From, To>;
  return WithWidth<kPack>(CanPack(kPack, kPack, from, to), [&](auto width) {
    return Launch(FlatShape(from.elements, width()), stream, ConvertAll<From, To, width()>, Data<From>(from), Data<To>(to), from.elements);
  });
}

// `to` has the type of `from`, whatever it is.
template <typename Word> DeviceResult CopyWords(TensorArg from, TensorArg to, StreamArg stream) {
  const int64_t words = from.elements * SizeOf(from.dtype) / static_cast<int64_t>(sizeof(Word));
  const auto addresses = reinterpret_cast<uintptr_t>(from.data) | reinterpret_cast<uintptr_t>(to.data);
  return WithWidth<kWidth<Word>>(addresses % 16 == 0, [&](auto width) {
    return Launch(FlatShape(words, width()), stream, CopyAll<Word, width()>, Data<Word>(from), Data<Word>(to), words);
  });
}

DeviceResult Copy(TensorArg from, TensorArg to, StreamArg stream) {
  if (SizeOf(from.dtype) >= 4) return CopyWords<uint32_t>(from, to, stream);
  return SizeOf(from.dtype) == 2 ? CopyWords<uint16_t>(from, to, stream) : CopyWords<uint8_t>(from, to, stream);
}

// As cpu/philox.h.
struct RandomWords {
  uint32_t at[4];
};
__device__ RandomWords Philox(uint64_t counter, uint64_t key_stream, uint64_t seed) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  RandomWords c = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), static_cast<uint32_t>(key_stream),
              static_cast<uint32_t>(key_stream >> 32)}};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    c = {{__umulhi(kMultiplier1, c.at[2]) ^ c.at[1] ^ key0, kMultiplier1 * c.at[2], __umulhi(kMultiplier0, c.at[0]) ^ c.at[3] ^ key1,
          kMultiplier0 * c.at[0]}};
    key0 += kWeyl0, key1 += kWeyl1;
  }
  return c;
}

// In the middle of one of 2^52 intervals of (0, 1), by the upper bits of two words.
__device__ double Uniform(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

// Numbers come in pairs: 2p and 2p + 1 of the key's stream are pair p.
__global__ void Normal(uint64_t seed, uint64_t key_stream, uint64_t first_index, double mean, double stddev, float* x, int64_t n) {
  const uint64_t first_pair = first_index / 2, end = first_index + static_cast<uint64_t>(n);
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t pair = first_pair + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; 2 * pair < end; pair += step) {
    const RandomWords word = Philox(pair, key_stream, seed);
    const double radius = sqrt(-2 * log(Uniform(word.at[0], word.at[1])));
    const double angle = 2 * 3.14159265358979323846 * Uniform(word.at[2], word.at[3]);
    if (2 * pair >= first_index) x[2 * pair - first_index] = static_cast<float>(mean + stddev * (radius * cos(angle)));
    if (2 * pair + 1 < end) x[2 * pair + 1 - first_index] = static_cast<float>(mean + stddev * (radius * sin(angle)));
  }
}

}  // namespace

DeviceResult Convert(TensorArg from, TensorArg to, StreamArg stream) {
  if (from.elements == 0) return {};
  if (from.dtype == to.dtype) return Copy(from, to, stream);
  if (from.dtype == DType::kF32 && to.dtype == DType::kBF16) return ConvertTo<float, Bf16>(from, to, stream);
  if (from.dtype == DType::kBF16 && to.dtype == DType::kF32) return ConvertTo<Bf16, float>(from, to, stream);
  return {DeviceResult::Code::kFailed, "no conversion between these types"};
}

DeviceResult AddTo(TensorArg x, TensorArg sum, StreamArg stream) {
  if (x.elements == 0) return {};
  return WithType(x, [&](auto type) {
    using X = decltype(type);
    return WithWidth<kWidth<float>>(CanPack(kWidth<float>, kWidth<float>, x, sum), [&](auto width) {
      return Launch(FlatShape(x.elements, width()), stream, AddAll<X, width()>, Data<X>(x), Data<float>(sum), x.elements);
    });
  });
}

DeviceResult FillNormal(uint64_t seed, uint64_t key_stream, uint64_t first_index, double mean, double stddev, TensorArg x,
                        StreamArg stream) {
  if (x.elements == 0) return {};
  return Launch({.blocks = WalkingBlocks(x.elements / 2 + 1, kThreads), .threads = kThreads}, stream, Normal, seed, key_stream,
                first_index, mean, stddev, Data<float>(x), x.elements);
}

}  // namespace shoal::cuda
