// Access to device memory in packs of up to 16 bytes a thread, computed with as floats, and walks over tensors in such packs. Kernels
// take the number of elements of a pack as a template argument: what the widest operand holds in 16 bytes, or 1 for widths and addresses
// that do not divide.
#pragma once

#include <algorithm>

#include "runtime/kernels/cuda/launch.h"
#ifndef __CUDACC__
#include "runtime/base/check.h"
#endif

namespace shoal::cuda {

// A number that lambdas get as an argument.
template <int N> struct Width {
  __host__ __device__ constexpr int operator()() const { return N; }
};

// Elements of 16 bytes of the wider type.
template <typename A, typename B = A> constexpr int kWidth = 16 / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// Words that are moved at once. Stores go through one number: the compiler takes stores of structures and vectors apart, and does not
// put all of them together again.
template <int kWords> struct Words {
  uint32_t at[kWords];
};
#ifdef __CUDACC__
template <int kWords> __device__ __forceinline__ Words<kWords> LoadWords(const void* from) {
  if constexpr (kWords == 4) {
    const uint4 words = *static_cast<const uint4*>(from);
    return {{words.x, words.y, words.z, words.w}};
  } else if constexpr (kWords == 2) {
    const uint2 words = *static_cast<const uint2*>(from);
    return {{words.x, words.y}};
  } else {
    static_assert(kWords == 1);
    return {{*static_cast<const uint32_t*>(from)}};
  }
}
template <int kWords> __device__ __forceinline__ void StoreWords(void* to, const Words<kWords>& words) {
  if constexpr (kWords == 4) {
    const uint64_t low = words.at[0] | static_cast<uint64_t>(words.at[1]) << 32;
    const uint64_t high = words.at[2] | static_cast<uint64_t>(words.at[3]) << 32;
    *static_cast<unsigned __int128*>(to) = low | static_cast<unsigned __int128>(high) << 64;
  } else if constexpr (kWords == 2) {
    *static_cast<uint64_t*>(to) = words.at[0] | static_cast<uint64_t>(words.at[1]) << 32;
  } else {
    static_assert(kWords == 1);
    *static_cast<uint32_t*>(to) = words.at[0];
  }
}
#else
template <int kWords> Words<kWords> LoadWords(const void* from) {
  Words<kWords> words;
  SHOAL_CHECK(reinterpret_cast<uintptr_t>(from) % sizeof(words) == 0) << kWords << " words at an odd address";
  std::memcpy(&words, from, sizeof(words));
  return words;
}
template <int kWords> void StoreWords(void* to, const Words<kWords>& words) {
  SHOAL_CHECK(reinterpret_cast<uintptr_t>(to) % sizeof(words) == 0) << kWords << " words at an odd address";
  std::memcpy(to, &words, sizeof(words));
}
#endif

// Two bf16 in a word, the first in its lower half.
__device__ __forceinline__ uint32_t Bf16Pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return FromFloat<Bf16>(low).bits | static_cast<uint32_t>(FromFloat<Bf16>(high).bits) << 16;
#endif
}

template <int N> struct Floats {
  float at[N];
};

template <int N, typename T> __device__ __forceinline__ Floats<N> Load(const T* from) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T)), kWords = (kBytes < 16 ? kBytes : 16) / 4;
  Floats<N> values;
  if constexpr (N == 1) {
    values.at[0] = ToFloat(*from);
  } else {
#pragma unroll
    for (int part = 0; part < kBytes / 4; part += kWords) {
      const Words<kWords> words = LoadWords<kWords>(reinterpret_cast<const uint32_t*>(from) + part);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        if constexpr (sizeof(T) == 4) {
          values.at[part + word] = __uint_as_float(words.at[word]);
        } else {
          values.at[2 * (part + word)] = __uint_as_float(words.at[word] << 16);
          values.at[2 * (part + word) + 1] = __uint_as_float(words.at[word] & 0xffff0000u);
        }
      }
    }
  }
  return values;
}

template <int N, typename T> __device__ __forceinline__ void Store(T* to, const Floats<N>& values) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T)), kWords = (kBytes < 16 ? kBytes : 16) / 4;
  if constexpr (N == 1) {
    *to = FromFloat<T>(values.at[0]);
  } else {
#pragma unroll
    for (int part = 0; part < kBytes / 4; part += kWords) {
      Words<kWords> words;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        if constexpr (sizeof(T) == 4) {
          words.at[word] = __float_as_uint(values.at[part + word]);
        } else {
          words.at[word] = Bf16Pair(values.at[2 * (part + word)], values.at[2 * (part + word) + 1]);
        }
      }
      StoreWords(reinterpret_cast<uint32_t*>(to) + part, words);
    }
  }
}

// Whether the tensors may be accessed in packs of n at every multiple of n, and rows of `width` elements too.
template <typename... Tensors> bool CanPack(int n, int64_t width, const Tensors&... tensors) {
  const auto aligned = [n](const DeviceTensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data) % std::min<uint64_t>(16, static_cast<uint64_t>(n * SizeOf(tensor.dtype))) == 0;
  };
  return width % n == 0 && (aligned(tensors) && ...);
}

// Calls body(Width<N>) or body(Width<1>).
template <int N, typename Body> DeviceResult WithWidth(bool packed, const Body& body) {
  return packed ? body(Width<N>{}) : body(Width<1>{});
}

// Blocks of a grid whose threads walk: at most as many as run at once, with `threads` of 2048 on a multiprocessor.
inline int64_t WalkingBlocks(int64_t items, int threads) {
  return std::min(Blocks(items, threads), static_cast<int64_t>(MultiProcessors()) * (2048 / threads));
}

// Over n elements: values = load(i, width), then store(i, width, values), for packs [i, i + width), kAtOnce of them in flight; width is
// Width<N>, or Width<1> for the elements after the last whole pack.
template <int N, int kAtOnce, typename LoadAt, typename StoreAt>
__device__ __forceinline__ void ForEachPack(int64_t n, const LoadAt& load, const StoreAt& store) {
  const int64_t packs = n / N, block = static_cast<int64_t>(blockDim.x) * kAtOnce;
  for (int64_t first = blockIdx.x * block + threadIdx.x; first < packs; first += gridDim.x * block) {
    decltype(load(int64_t{0}, Width<N>{})) values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t pack = first + static_cast<int64_t>(u) * blockDim.x;
      if (pack < packs) values[u] = load(pack * N, Width<N>{});
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t pack = first + static_cast<int64_t>(u) * blockDim.x;
      if (pack < packs) store(pack * N, Width<N>{}, values[u]);
    }
  }
  const int64_t rest = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && rest < n) store(rest, Width<1>{}, load(rest, Width<1>{}));
}

// A thread's packs of a matrix, in order of memory, each a whole grid after the one before; it divides once.
struct PackWalk {
  int64_t row, row_step;
  int column, column_step, columns;  // In packs.

  __device__ __forceinline__ explicit PackWalk(int64_t packs_of_row) : columns(static_cast<int>(packs_of_row)) {
    const int64_t own = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    row = own / columns, column = static_cast<int>(own % columns);
    row_step = step / columns, column_step = static_cast<int>(step % columns);
  }
  __device__ __forceinline__ void Next() {
    row += row_step, column += column_step;
    if (column >= columns) column -= columns, ++row;
  }
};

}  // namespace shoal::cuda
