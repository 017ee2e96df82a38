// Products of a warp group (four warps, 128 threads) by Hopper's wgmma: both operands stay in shared memory, the instructions run beside
// the threads that put them there. Of sm_90a and the emulator alone (SHOAL_HAS_WARP_GROUPS); mma.h has the words for all.
#pragma once

#include <cstdint>

#include "runtime/kernels/cuda/mma.h"

#ifndef __CUDACC__
#include <array>
#include <deque>
#include <functional>
#include <vector>
#endif

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SHOAL_HAS_WARP_GROUPS 1
#else
#define SHOAL_HAS_WARP_GROUPS 0
#endif

namespace shoal::cuda {

#if SHOAL_HAS_WARP_GROUPS

// c += a b (kOverwrite: c = a b, whatever c holds), a being 64 x 16 and b 16 x n (n of c: 64 or 256), for the rows [16 w, 16 w + 16) of c
// in warp w as fragments of mma.h, 8 columns each. `a` is the Swizzled part of shared memory whose first row (kAAcross: whose block of 64
// columns) is the group's; `b` likewise holds the columns of all. k: the first of the 16, a multiple of 16 below 64. kAAcross: a lies as
// [k][row], of 64 k, else as [row][k]; b likewise. Or `a` comes from registers as fragments of mma.h of each warp's 16 rows, and b (n 64
// or 128) lies as [k][column].
//
// MultiplyWarpGroupE4m3: the same of codes (mma.h), 64 x 32 times 32 x 128, where a and b lie as [row][k] and [column][k]; k counts bf16.
//
//   StartProducts(); MultiplyWarpGroup(...) ...; CommitProducts(); ... WaitProducts<0>(c);
//
// c and a of registers may not be touched, nor a and b written, before WaitProducts. What threads wrote to shared memory (asynchronous
// copies among it) must be published by PublishShared and a barrier before it is multiplied.
__device__ __forceinline__ uint64_t SwizzledDescriptor(const Bf16* matrix) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kBlock = 64 * 128 / 16;  // From 64 columns to the next of a matrix that lies across: 64 rows of 128 bytes.
  constexpr uint64_t kEightRows = 8 * 128 / 16;
  return ((SharedAddress(matrix) & 0x3ffffu) >> 4) | kBlock << 16 | kEightRows << 32 | kSwizzle128;
}

// Elements from one k to the next.
template <bool kAcross> constexpr int kElementsPerK = kAcross ? 64 : 1;

#ifdef __CUDACC__
#define SHOAL_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SHOAL_SUMS8(j)                                                                                                             \
  SHOAL_SUMS(j), SHOAL_SUMS(j + 1), SHOAL_SUMS(j + 2), SHOAL_SUMS(j + 3), SHOAL_SUMS(j + 4), SHOAL_SUMS(j + 5), SHOAL_SUMS(j + 6), \
      SHOAL_SUMS(j + 7)
template <bool kAAcross, bool kBAcross, bool kOverwrite = false>
__device__ __forceinline__ void MultiplyWarpGroup(float (&c)[8][4], const Bf16* a, const Bf16* b, int k) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, "
      "%32, %33, %36, 1, 1, %34, %35;\n"
      : SHOAL_SUMS8(0)
      : "l"(SwizzledDescriptor(a + kElementsPerK<kAAcross> * k)), "l"(SwizzledDescriptor(b + kElementsPerK<kBAcross> * k)),
        "n"(kAAcross ? 1 : 0), "n"(kBAcross ? 1 : 0), "n"(kOverwrite ? 0 : 1));
}
template <bool kAAcross, bool kBAcross, bool kOverwrite = false>
__device__ __forceinline__ void MultiplyWarpGroup(float (&c)[32][4], const Bf16* a, const Bf16* b, int k) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
      "%57, %58, %59, %60, %61, %62, %63, "
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, "
      "%89, %90, %91, %92, %93, %94, %95, "
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "
      "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, %132, 1, 1, %130, %131;\n"
      : SHOAL_SUMS8(0), SHOAL_SUMS8(8), SHOAL_SUMS8(16), SHOAL_SUMS8(24)
      : "l"(SwizzledDescriptor(a + kElementsPerK<kAAcross> * k)), "l"(SwizzledDescriptor(b + kElementsPerK<kBAcross> * k)),
        "n"(kAAcross ? 1 : 0), "n"(kBAcross ? 1 : 0), "n"(kOverwrite ? 0 : 1));
}
__device__ __forceinline__ void MultiplyWarpGroup(float (&c)[8][4], const uint32_t (&a)[4], const Bf16* b, int k) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
      : SHOAL_SUMS8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(SwizzledDescriptor(b + kElementsPerK<true> * k)));
}
__device__ __forceinline__ void MultiplyWarpGroup(float (&c)[16][4], const uint32_t (&a)[4], const Bf16* b, int k) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
      "%57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
      : SHOAL_SUMS8(0), SHOAL_SUMS8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(SwizzledDescriptor(b + kElementsPerK<true> * k)));
}
template <bool kOverwrite> __device__ __forceinline__ void MultiplyWarpGroupE4m3(float (&c)[16][4], const Bf16* a, const Bf16* b, int k) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
      "%57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, %66, 1, 1;\n"
      : SHOAL_SUMS8(0), SHOAL_SUMS8(8)
      : "l"(SwizzledDescriptor(a + k)), "l"(SwizzledDescriptor(b + k)), "n"(kOverwrite ? 0 : 1));
}
#undef SHOAL_SUMS8
#undef SHOAL_SUMS

__device__ __forceinline__ void PublishShared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
__device__ __forceinline__ void StartProducts() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until all groups of products but the last kNewest are done; `sums` are those of which results are used next, all others stay untouched.
template <int kNewest, typename... Sums> __device__ __forceinline__ void WaitProducts(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kNewest) : "memory");
  const auto behind = [](auto& c) {  // Else the compiler may take a use before the wait.
#pragma unroll
    for (auto& row : c) {
#pragma unroll
      for (float& sum : row) asm volatile("" : "+f"(sum)::"memory");
    }
  };
  (behind(sums), ...);
}
#else
namespace emulator {
using Product = std::function<void()>;
inline std::array<std::deque<std::vector<Product> >, 1024> g_products;  // By thread; the last group is open.
inline std::deque<std::vector<Product> >& Products() {
  std::deque<std::vector<Product> >& groups = g_products[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

// Of element (line, k) of an operand by its descriptor: the canonical layouts of the instruction, which exchanges bits of the address.
inline uint32_t ElementAddress(uint64_t descriptor, bool across, int line, int k) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const auto l = static_cast<uint32_t>(line), of_k = static_cast<uint32_t>(k), blocks = field(16), eights = field(32);
  const uint32_t address =
      field(0) + (across ? l / 64 * blocks + of_k / 8 * eights + of_k % 8 * 128 + l % 64 * 2 : l / 8 * eights + l % 8 * 128 + of_k * 2);
  return address ^ (address >> 7 & 7) << 4;
}

// Every second thread multiplies at once and the others when they wait, so that both operands that are not there yet and those that are
// overwritten too early show as wrong results.
inline void MultiplyNowOrLater(Product multiply) {
  if (threadIdx.x % 2 == 0) return multiply();
  Products().back().push_back(std::move(multiply));
}

inline float Element(const unsigned char* shared, uint64_t descriptor, bool across, int line, int k) {
  return ToFloat(*reinterpret_cast<const Bf16*>(shared + ElementAddress(descriptor, across, line, k)));
}

// This lane's part of c from its two rows of a, at 16 k.
template <int kTiles>
void MultiplyRowsOfLane(float (&c)[kTiles][4], const float (&left)[2][16], const unsigned char* shared, uint64_t b, bool across, int t) {
  for (int column = 2 * t; column < 8 * kTiles; column += column % 2 == 0 ? 1 : 7) {
    for (int i = 0; i < 16; ++i) {
      const float right = Element(shared, b, across, column, i);
      for (int half = 0; half < 2; ++half) c[column / 8][2 * half + column % 2] += left[half][i] * right;
    }
  }
}
}  // namespace emulator

template <bool kAAcross, bool kBAcross, bool kOverwrite = false, int kTiles>
void MultiplyWarpGroup(float (&c)[kTiles][4], const Bf16* a, const Bf16* b, int k) {
  const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + emulator::Lane() / 4, t = emulator::Lane() % 4;
  const uint64_t of_a = SwizzledDescriptor(a + kElementsPerK<kAAcross> * k), of_b = SwizzledDescriptor(b + kElementsPerK<kBAcross> * k);
  emulator::MultiplyNowOrLater([&c, of_a, of_b, row, t, shared = emulator::t_dynamic_shared] {
    if (kOverwrite) std::memset(c, 0, sizeof(c));
    float left[2][16];
    for (int i = 0; i < 32; ++i) left[i / 16][i % 16] = emulator::Element(shared, of_a, kAAcross, row + i / 16 * 8, i % 16);
    emulator::MultiplyRowsOfLane(c, left, shared, of_b, kBAcross, t);
  });
}

template <int kTiles> void MultiplyWarpGroup(float (&c)[kTiles][4], const uint32_t (&a)[4], const Bf16* b, int k) {
  uint32_t all[32][4];
  emulator::Gather(a, sizeof(a), all);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  std::array<float, 32> left;
  for (int i = 0; i < 32; ++i) {
    const int of_k = i % 16;
    left[static_cast<size_t>(i)] = emulator::Half(all[4 * g + of_k % 8 / 2][i / 16 + of_k / 8 * 2], of_k % 2);
  }
  emulator::MultiplyNowOrLater(
      [&c, left, of_b = SwizzledDescriptor(b + kElementsPerK<true> * k), t, shared = emulator::t_dynamic_shared] {
        float rows[2][16];
        std::memcpy(rows, left.data(), sizeof(rows));
        emulator::MultiplyRowsOfLane(c, rows, shared, of_b, true, t);
      });
}
template <bool kOverwrite> void MultiplyWarpGroupE4m3(float (&c)[16][4], const Bf16* a, const Bf16* b, int k) {
  const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + emulator::Lane() / 4, t = emulator::Lane() % 4;
  emulator::MultiplyNowOrLater(
      [&c, of_a = SwizzledDescriptor(a + k), of_b = SwizzledDescriptor(b + k), row, t, shared = emulator::t_dynamic_shared] {
        const auto code = [&](uint64_t descriptor, int line, int i) {
          return emulator::CodeToFloat(shared[emulator::ElementAddress(descriptor, /*across=*/false, line, i / 2) + i % 2]);
        };
        if (kOverwrite) std::memset(c, 0, sizeof(c));
        for (int column = 2 * t; column < 128; column += column % 2 == 0 ? 1 : 7) {
          for (int i = 0; i < 32; ++i) {
            const float right = code(of_b, column, i);
            for (int half = 0; half < 2; ++half) c[column / 8][2 * half + column % 2] += code(of_a, row + 8 * half, i) * right;
          }
        }
      });
}
inline void PublishShared() {}
inline void StartProducts() {}
inline void CommitProducts() { emulator::Products().emplace_back(); }
template <int kNewest, typename... Sums> void WaitProducts(Sums&...) {
  std::deque<std::vector<emulator::Product> >& groups = emulator::Products();
  while (groups.size() > kNewest + 1) {
    for (const emulator::Product& product : groups.front()) product();
    groups.pop_front();
  }
}
#endif
#endif  // SHOAL_HAS_WARP_GROUPS

}  // namespace shoal::cuda
