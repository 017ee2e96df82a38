#include "models/data/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace shoal {
namespace {

TEST(SplitMix64, GivesThePublishedSequence) {
  // First outputs of the generator's reference implementation with seed 1234567.
  EXPECT_EQ(SplitMix64(1234567, 0), 6457827717110365317ull);
  EXPECT_EQ(SplitMix64(1234567, 1), 3203168211198807973ull);
  EXPECT_EQ(SplitMix64(1234567, 2), 9817491932198370423ull);
}

TEST(Permutation, HitsEveryIndexOnceForEverySize) {
  for (uint64_t size = 1; size <= 600; ++size) {
    const Permutation permutation(size, 0x5eed + size);
    std::vector<bool> hit(size);
    for (uint64_t i = 0; i < size; ++i) {
      const uint64_t to = permutation.At(i);
      ASSERT_LT(to, size);
      ASSERT_FALSE(hit[to]) << "size " << size << " index " << i;
      hit[to] = true;
    }
  }
}

TEST(Permutation, StaysInRangeForHugeSizes) {
  for (const uint64_t size : {(uint64_t{1} << 62), (uint64_t{1} << 62) - 1, (uint64_t{1} << 40) + 1}) {
    const Permutation permutation(size, 7);
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < 1000; ++i) seen.insert(permutation.At(i * (size / 1000)));
    EXPECT_EQ(seen.size(), 1000u);
    EXPECT_LT(*seen.rbegin(), size);
  }
}

// Over many keys every index goes everywhere equally often, within five standard deviations.
TEST(Permutation, SpreadsEveryIndexUniformlyOverKeys) {
  constexpr int kKeys = 12000;
  for (const uint64_t size : {2u, 3u, 5u, 12u}) {
    std::vector<std::vector<int>> counts(size, std::vector<int>(size));
    for (int key = 0; key < kKeys; ++key) {
      const Permutation permutation(size, key);
      for (uint64_t i = 0; i < size; ++i) ++counts[i][permutation.At(i)];
    }
    const double mean = double{kKeys} / static_cast<double>(size);
    for (uint64_t i = 0; i < size; ++i) {
      for (uint64_t j = 0; j < size; ++j) {
        EXPECT_NEAR(counts[i][j], mean, 5 * std::sqrt(mean)) << size << ": " << i << " to " << j;
      }
    }
  }
}

// Neighbours must not stay neighbours: of a random permutation about one pair of adjacent indices does.
TEST(Permutation, SeparatesNeighbours) {
  const Permutation permutation(10000, 42);
  int adjacent = 0;
  for (uint64_t i = 0; i + 1 < permutation.size(); ++i)
    adjacent += permutation.At(i) + 1 == permutation.At(i + 1);
  EXPECT_LE(adjacent, 8);
}

}  // namespace
}  // namespace shoal
