#include "runtime/kernels/elementwise.h"

#include <algorithm>
#include <limits>
#include <set>

#include "runtime/kernels/cpu/philox.h"
#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

// Values that halve a bf16 step exactly, denormals, infinities and NaN among random bits.
Tensor AwkwardFloats(int64_t N) {
  Tensor x = Empty({N}, DType::kF32);
  std::mt19937 engine(1);
  const uint32_t special[] = {0x00000000, 0x80000000, 0x3f808000, 0x3f818000, 0x3f808001,
                              0x7f7fffff, 0x7f800000, 0xff800000, 0x7f800001, 0xffc00000,
                              0x00000001, 0x00008000, 0x007fffff};
  for (int64_t i = 0; i < N; ++i) {
    const uint32_t bits = i % 3 == 0 ? special[static_cast<size_t>(i / 3) % std::size(special)] : engine();
    x.data<float>()[i] = std::bit_cast<float>(bits);
  }
  return x;
}

TEST(Convert, RoundsToNearestEven) {
  Stream stream;
  for (int64_t N : {0, 1, 13, 64, 50001}) {
    const Tensor x = AwkwardFloats(N);
    SweepLevels(
        [&]() -> std::vector<Tensor> {
          const Tensor narrow = Empty({N}, DType::kBF16), wide = Empty({N}, DType::kF32),
                       copy = Empty({N}, DType::kF32);
          Convert(x, narrow, stream);
          Convert(narrow, wide, stream);
          Convert(x, copy, stream);
          return {narrow, wide, copy};
        },
        [&](const std::vector<Tensor>& got) {
          for (int64_t i = 0; i < N; ++i) {
            const float value = x.data<float>()[i];
            const uint16_t bits = got[0].data<BFloat16>()[i].bits;
            // AVX512_BF16 takes denormals for 0.
            const bool flushed = std::fpclassify(value) == FP_SUBNORMAL && (bits & 0x7fff) == 0;
            ASSERT_TRUE(flushed || bits == BFloat16(value).bits) << i << ": " << value << " gave " << bits;
            ASSERT_EQ(std::bit_cast<uint32_t>(got[1].data<float>()[i]), static_cast<uint32_t>(bits) << 16)
                << i;
            ASSERT_EQ(std::bit_cast<uint32_t>(got[2].data<float>()[i]),
                      std::bit_cast<uint32_t>(x.data<float>()[i]))
                << i;
          }
        });
  }
}

TEST(AddTo, MatchesReference) {
  Stream stream;
  for (int64_t N : {0, 1, 17, 50001}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const Tensor x = Random({N}, dtype, 1), before = Random({N}, DType::kF32, 2), want = Copy(before);
      ref::AddTo(x, want, stream);
      SweepLevels(
          [&]() -> std::vector<Tensor> {
            const Tensor sum = Copy(before);
            AddTo(x, sum, stream);
            return {sum};
          },
          [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], want, "sum"); });
    }
  }
}

// The known answers of Random123's kat_vectors for philox4x32-10.
TEST(Philox, MatchesPublishedVectors) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomBits, AreHalvesOfAPhiloxBlock) {
  EXPECT_EQ(RandomBits({.seed = 0, .stream = 0}, 0), 0xe169c58d6627e8d5u);
  EXPECT_EQ(RandomBits({.seed = 0, .stream = 0}, 1), 0x9b00dbd8bc57ac4cu);
  const std::array<uint32_t, 4> block = Philox({5, 1, 7, 3}, {9, 2});
  const RandomKey key = {.seed = 2ull << 32 | 9, .stream = 3ull << 32 | 7};
  EXPECT_EQ(RandomBits(key, 2 * (1ull << 32 | 5)), static_cast<uint64_t>(block[1]) << 32 | block[0]);
  EXPECT_EQ(RandomBits(key, 2 * (1ull << 32 | 5) + 1), static_cast<uint64_t>(block[3]) << 32 | block[2]);
}

TEST(RandomBits, SeedStreamAndIndexAllMatter) {
  std::set<uint64_t> seen;
  for (uint64_t seed : {0ull, 1ull, 1ull << 32}) {
    for (uint64_t stream : {0ull, 1ull, 1ull << 32}) {
      for (uint64_t index : {0ull, 1ull, 2ull, 1ull << 33, 1ull << 63})
        seen.insert(RandomBits({seed, stream}, index));
    }
  }
  EXPECT_EQ(seen.size(), 45u);
}

TEST(MakeStream, TellsItsArgumentsApart) {
  std::set<uint64_t> seen;
  for (uint64_t step = 0; step < 6; ++step) {
    for (uint64_t slice = 0; slice < 6; ++slice) {
      for (uint64_t layer = 0; layer < 6; ++layer) {
        for (uint64_t op = 0; op < 6; ++op) seen.insert(MakeStream(step, slice, layer, op));
      }
    }
  }
  EXPECT_EQ(seen.size(), 6u * 6 * 6 * 6);
}

TEST(FillNormal, IsAPureFunctionOfTheIndex) {
  Stream stream;
  const RandomKey key = {.seed = 42, .stream = 7};
  const Tensor all = Empty({5000}, DType::kF32);
  FillNormal(key, 100, 1, 2, all, stream);
  for (auto [begin, count] : {std::pair<int, int>{0, 1}, {1, 1}, {1, 2}, {17, 100}, {4999, 1}}) {
    const Tensor part = Empty({count}, DType::kF32);
    FillNormal(key, static_cast<uint64_t>(100 + begin), 1, 2, part, stream);
    ExpectSameBits(part, all.Elements(begin, {count}), "part");
  }
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor again = Empty({5000}, DType::kF32);
        FillNormal(key, 100, 1, 2, again, stream);
        return {again};
      },
      [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], all, "again"); });
}

TEST(FillNormal, IsNormal) {
  Stream stream;
  const int64_t N = 100000;
  const Tensor x = Empty({N}, DType::kF32);
  FillNormal({.seed = 1, .stream = 2}, 0, 3, 0.5, x, stream);
  std::vector<double> sorted(x.span<float>().begin(), x.span<float>().end());
  std::sort(sorted.begin(), sorted.end());
  // Kolmogorov and Smirnov's distance; beyond 1.95 / sqrt(N) with probability 0.001 for a true normal.
  double distance = 0;
  for (int64_t i = 0; i < N; ++i) {
    const double below = 0.5 * std::erfc(-(sorted[static_cast<size_t>(i)] - 3) / 0.5 / std::sqrt(2.0));
    distance = std::max(distance, std::abs(below - static_cast<double>(i) / static_cast<double>(N)));
  }
  EXPECT_LT(distance, 1.95 / std::sqrt(static_cast<double>(N)));
  // Neighbours come from one block: they must not be correlated. The correlation's deviation is 1 / sqrt(N /
  // 2).
  double product = 0;
  for (int64_t i = 0; i < N; i += 2) product += (Get(x, i) - 3) * (Get(x, i + 1) - 3) / 0.25;
  EXPECT_LT(std::abs(product / (static_cast<double>(N) / 2)), 4 / std::sqrt(static_cast<double>(N) / 2));
}

}  // namespace
}  // namespace shoal::kernels
