#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "runtime/kernels/cuda/warp_group.h"

namespace shoal::cuda {
namespace {

// c[16 rows_of_warps, 16] = a[16, 32] b[32, 16] by one warp, from shared matrices that lie in either way.
template <bool kTransposeA, bool kTransposeB, typename Layout> __global__ void Product(const Bf16* a, const Bf16* b, float* c) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_b = shared + 64 * 64;
  // a is [16, 32] or [32, 16], b [16, 32] or [32, 16]: rows of 64, of which the rest is zeros.
  LoadTile<Layout, 32, 64, 32>(shared, a, kTransposeA ? 16 : 32, kTransposeA ? 32 : 16, kTransposeA ? 16 : 32, true);
  LoadTile<Layout, 32, 64, 32>(shared_b, b, kTransposeB ? 16 : 32, kTransposeB ? 32 : 16, kTransposeB ? 16 : 32, true);
  CommitCopies();
  WaitCopies<0>();
  __syncthreads();
  float sums[2][4] = {};
  for (int k = 0; k < 32; k += 16) {
    uint32_t fa[4], fb[4];
    if (kTransposeA) {
      LoadATransposed<Layout>(fa, shared, 0, k);
    } else {
      LoadA<Layout>(fa, shared, 0, k);
    }
    if (kTransposeB) {
      LoadBTransposed<Layout>(fb, shared_b, 0, k);
    } else {
      LoadB<Layout>(fb, shared_b, 0, k);
    }
    Mma(sums[0], fa, fb[0], fb[1]);
    Mma(sums[1], fa, fb[2], fb[3]);
  }
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = sums[half][i];
  }
}

// Small integers: every order of summation is exact.
template <bool kTransposeA, bool kTransposeB, typename Layout> void Check() {
  std::mt19937 random(5);
  std::vector<Bf16> a(512), b(512);
  for (std::vector<Bf16>* x : {&a, &b}) {
    for (Bf16& value : *x) value = FromFloat<Bf16>(static_cast<float>(random() % 17) - 8);
  }
  std::vector<float> c(256, -1);
  ASSERT_EQ(Launch({.threads = 32, .shared_bytes = 96 * 72 * 2}, nullptr, Product<kTransposeA, kTransposeB, Layout>, a.data(), b.data(),
                   c.data())
                .code,
            DeviceResult::Code::kOk);
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 16; ++n) {
      float want = 0;
      for (size_t k = 0; k < 32; ++k) {
        want += ToFloat(kTransposeA ? a[k * 16 + m] : a[m * 32 + k]) * ToFloat(kTransposeB ? b[k * 16 + n] : b[n * 32 + k]);
      }
      ASSERT_EQ(c[m * 16 + n], want) << m << ", " << n << " transposed " << kTransposeA << kTransposeB;
    }
  }
}

TEST(Mma, FragmentsOfEveryLayoutMultiply) {
  Check<false, false, Swizzled<32>>();
  Check<false, true, Swizzled<32>>();
  Check<true, false, Swizzled<32>>();
  Check<true, true, Swizzled<32>>();
  Check<false, false, Padded<64>>();
  Check<false, true, Padded<64>>();
  Check<true, false, Padded<64>>();
  Check<true, true, Padded<64>>();
}

// The sums of one product, rounded, are the left operand of the next: (a b) b' with integers that bf16 holds.
__global__ void Chain(const Bf16* a, const Bf16* b, float* c) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  using Layout = Padded<16>;
  LoadTile<Layout, 16, 16, 32>(shared, a, 16, 16, 16, true);
  LoadTile<Layout, 16, 16, 32>(shared + 16 * Layout::kStride, b, 16, 16, 16, true);
  CommitCopies();
  WaitCopies<0>();
  __syncthreads();
  uint32_t fa[4], fb[4];
  LoadA<Layout>(fa, shared, 0, 0);
  LoadBTransposed<Layout>(fb, shared + 16 * Layout::kStride, 0, 0);
  float first[2][4] = {}, second[2][4] = {};
  Mma(first[0], fa, fb[0], fb[1]);
  Mma(first[1], fa, fb[2], fb[3]);
  const uint32_t next[4] = {PackBf16(first[0][0], first[0][1]), PackBf16(first[0][2], first[0][3]), PackBf16(first[1][0], first[1][1]),
                            PackBf16(first[1][2], first[1][3])};
  Mma(second[0], next, fb[0], fb[1]);
  Mma(second[1], next, fb[2], fb[3]);
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = second[half][i];
  }
}

TEST(Mma, SumsAreTheLeftOperandOfTheNextProduct) {
  std::mt19937 random(6);
  std::vector<Bf16> a(256), b(256);
  std::vector<float> c(256), ab(256);
  for (std::vector<Bf16>* x : {&a, &b}) {
    for (Bf16& value : *x) value = FromFloat<Bf16>(static_cast<float>(random() % 5) - 2);
  }
  ASSERT_EQ(Launch({.threads = 32, .shared_bytes = 2048}, nullptr, Chain, a.data(), b.data(), c.data()).code, DeviceResult::Code::kOk);
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 16; ++n) {
      for (size_t k = 0; k < 16; ++k) ab[m * 16 + n] += ToFloat(a[m * 16 + k]) * ToFloat(b[k * 16 + n]);
    }
  }
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 16; ++n) {
      float want = 0;
      for (size_t k = 0; k < 16; ++k) want += ab[m * 16 + k] * ToFloat(b[k * 16 + n]);
      ASSERT_EQ(c[m * 16 + n], want) << m << ", " << n;
    }
  }
}

// c[64, kN] = a[64, 64] b[64, kN] by a warp group, from shared matrices that lie in either way, or with a from registers.
template <int kN, bool kAAcross, bool kBAcross, bool kRegisters> __global__ void GroupProduct(const Bf16* a, const Bf16* b, float* c) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_b = shared + 64 * 64;
  LoadTile<Swizzled<64>, 64, 64, 128>(shared, a, 64, 64, 64, true);
  if (kBAcross) {
    LoadTile<Swizzled<64>, 64, kN, 128>(shared_b, b, kN, 64, kN, true);
  } else {
    LoadTile<Swizzled<kN>, kN, 64, 128>(shared_b, b, 64, kN, 64, true);
  }
  CommitCopies();
  WaitCopies<0>();
  PublishShared();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float sums[kN / 8][4];
  StartProducts();
  if constexpr (kRegisters) {
    for (auto& row : sums) row[0] = row[1] = row[2] = row[3] = 0;
    for (int k = 0; k < 64; k += 16) {
      uint32_t fragment[4];
      LoadA<Swizzled<64>>(fragment, shared, 16 * warp, k);
      MultiplyWarpGroup(sums, fragment, shared_b, k);
    }
  } else {
    MultiplyWarpGroup<kAAcross, kBAcross, true>(sums, shared, shared_b, 0);
    for (int k = 16; k < 64; k += 16) MultiplyWarpGroup<kAAcross, kBAcross>(sums, shared, shared_b, k);
  }
  CommitProducts();
  WaitProducts<0>(sums);
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int j = 0; j < kN / 8; ++j) {
    for (int i = 0; i < 4; ++i) c[(16 * warp + g + i / 2 * 8) * kN + 8 * j + 2 * t + i % 2] = sums[j][i];
  }
}

template <int kN, bool kAAcross, bool kBAcross, bool kRegisters> void CheckGroup() {
  std::mt19937 random(7);
  std::vector<Bf16> a(64 * 64), b(64 * kN);
  for (std::vector<Bf16>* x : {&a, &b}) {
    for (Bf16& value : *x) value = FromFloat<Bf16>(static_cast<float>(random() % 17) - 8);
  }
  std::vector<float> c(64 * kN, -1);
  ASSERT_EQ(Launch({.threads = 128, .shared_bytes = (64 + kN) * 128}, nullptr, GroupProduct<kN, kAAcross, kBAcross, kRegisters>, a.data(),
                   b.data(), c.data())
                .code,
            DeviceResult::Code::kOk);
  for (size_t m = 0; m < 64; ++m) {
    for (size_t n = 0; n < kN; ++n) {
      float want = 0;
      for (size_t k = 0; k < 64; ++k)
        want += ToFloat(kAAcross ? a[k * 64 + m] : a[m * 64 + k]) * ToFloat(kBAcross ? b[k * kN + n] : b[n * 64 + k]);
      ASSERT_EQ(c[m * kN + n], want) << m << ", " << n << " of " << kN << " across " << kAAcross << kBAcross;
    }
  }
}

TEST(WarpGroup, OperandsOfEveryLayoutMultiply) {
  CheckGroup<64, false, false, false>();
  CheckGroup<256, false, false, false>();
  CheckGroup<256, false, true, false>();
  CheckGroup<256, true, true, false>();
  CheckGroup<64, false, true, true>();
  CheckGroup<128, false, true, true>();
}

// c[64, 128] = a[64, 128] b[128, 128]^T of codes that lie as [row][k] and [column][k], by a warp group or by warps.
__global__ void CodeProduct(const Bf16* a, const Bf16* b, bool by_group, float* c) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  Bf16* const shared_b = shared + 64 * 64;
  LoadTile<Swizzled<64>, 64, 64, 128>(shared, a, 64, 64, 64, true);
  LoadTile<Swizzled<128>, 128, 64, 128>(shared_b, b, 64, 128, 64, true);
  CommitCopies();
  WaitCopies<0>();
  PublishShared();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float sums[16][4] = {};
  if (by_group) {
    StartProducts();
    MultiplyWarpGroupE4m3<true>(sums, shared, shared_b, 0);
    for (int k = 16; k < 64; k += 16) MultiplyWarpGroupE4m3<false>(sums, shared, shared_b, k);
    CommitProducts();
    WaitProducts<0>(sums);
  } else {
    for (int k = 0; k < 64; k += 16) {
      uint32_t of_a[4], of_b[4];
      LoadA<Swizzled<64>>(of_a, shared, 16 * warp, k);
      for (int j = 0; j < 16; j += 2) {
        LoadB<Swizzled<128>>(of_b, shared_b, 8 * j, k);
        MmaE4m3(sums[j], of_a, of_b[0], of_b[1]);
        MmaE4m3(sums[j + 1], of_a, of_b[2], of_b[3]);
      }
    }
  }
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < 4; ++i) c[(16 * warp + g + i / 2 * 8) * 128 + 8 * j + 2 * t + i % 2] = sums[j][i];
  }
}

TEST(MmaE4m3, CodesMultiplyByWarpsAndByAWarpGroup) {
  std::mt19937 random(8);
  std::vector<uint8_t> a(64 * 128), b(128 * 128);
  for (std::vector<uint8_t>* x : {&a, &b}) {
    for (uint8_t& code : *x) code = ToE4m3(static_cast<float>(random() % 17) - 8);  // Sums are exact.
  }
  for (const bool by_group : {true, false}) {
    std::vector<float> c(64 * 128, -1);
    ASSERT_EQ(Launch({.threads = 128, .shared_bytes = (64 + 128) * 128}, nullptr, CodeProduct, reinterpret_cast<const Bf16*>(a.data()),
                     reinterpret_cast<const Bf16*>(b.data()), by_group, c.data())
                  .code,
              DeviceResult::Code::kOk);
    for (size_t m = 0; m < 64; ++m) {
      for (size_t n = 0; n < 128; ++n) {
        float want = 0;
        for (size_t k = 0; k < 128; ++k) want += FromE4m3(a[m * 128 + k]) * FromE4m3(b[n * 128 + k]);
        ASSERT_EQ(c[m * 128 + n], want) << m << ", " << n << " by group " << by_group;
      }
    }
  }
}

__global__ void LoadOdd(const Bf16* from, int rows, int columns, bool aligned, Bf16* to) {
  SHOAL_DYNAMIC_SHARED(Bf16, shared);
  LoadTile<Swizzled<16>, 16, 64, 64>(shared, from, columns, rows, columns, aligned);
  CommitCopies();
  WaitCopies<0>();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 64; i += 64) to[i] = shared[Swizzled<16>::At(i / 64, i % 64 / 8) + i % 8];
}

TEST(Mma, TilesAreZeroBesideTheMatrix) {
  for (const int columns : {64, 40, 37, 3}) {
    for (const bool aligned : {false, true}) {
      if (aligned && columns % 8 != 0) continue;
      constexpr int kRows = 11;
      std::vector<Bf16> from(static_cast<size_t>(kRows * columns)), to(16 * 64);
      for (size_t i = 0; i < from.size(); ++i) from[i] = FromFloat<Bf16>(static_cast<float>(1 + i % 100));
      (void)Launch({.threads = 64, .shared_bytes = 2048}, nullptr, LoadOdd, from.data(), kRows, columns, aligned, to.data());
      for (int i = 0; i < 16 * 64; ++i) {
        const int row = i / 64, column = i % 64;
        const float want = row < kRows && column < columns ? ToFloat(from[static_cast<size_t>(row * columns + column)]) : 0;
        ASSERT_EQ(ToFloat(to[static_cast<size_t>(i)]), want) << row << ", " << column << " of " << columns;
      }
    }
  }
}

}  // namespace
}  // namespace shoal::cuda
