#include "parallel/placement/apportion.h"

#include <numeric>
#include <random>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(Apportion, LargestRemaindersGetWhatIsLeft) {
  EXPECT_EQ(Apportion(10, {1, 1, 1}), (std::vector<int64_t>{4, 3, 3}));
  EXPECT_EQ(Apportion(10, {6, 3, 1}), (std::vector<int64_t>{6, 3, 1}));
  EXPECT_EQ(Apportion(7, {5, 0, 3}), (std::vector<int64_t>{4, 0, 3}));  // 4.375 and 2.625.
  EXPECT_EQ(Apportion(5, {0, 0}), (std::vector<int64_t>{0, 0}));
  EXPECT_EQ(Apportion(0, {2, 1}), (std::vector<int64_t>{0, 0}));
  EXPECT_TRUE(Apportion(3, {}).empty());
}

TEST(Apportion, WhatACappedEntryCannotTakeGoesToTheOthers) {
  EXPECT_EQ(Apportion(10, {97, 2, 1}, 4), (std::vector<int64_t>{4, 4, 2}));
  EXPECT_EQ(Apportion(100, {5, 1, 0}, 3), (std::vector<int64_t>{3, 3, 0}));
}

TEST(Apportion, SumsExactlyAndKeepsTheOrderOfWeights) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    std::vector<int64_t> weights(1 + random() % 20);
    for (int64_t& weight : weights) weight = random() % 3 == 0 ? 0 : int64_t{1} << random() % 40;
    const int64_t total = random() % 1000, cap = 1 + random() % 200;
    const std::vector<int64_t> share = Apportion(total, weights, cap);
    int64_t positive = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      positive += weights[i] > 0;
      EXPECT_LE(share[i], cap);
      if (weights[i] == 0) {
        EXPECT_EQ(share[i], 0);
      }
      for (size_t j = 0; j < weights.size(); ++j) {
        EXPECT_TRUE(weights[i] <= weights[j] || share[i] >= share[j]);
        EXPECT_TRUE(weights[i] != weights[j] || std::abs(share[i] - share[j]) <= 1);
      }
    }
    EXPECT_EQ(std::accumulate(share.begin(), share.end(), int64_t{0}), std::min(total, cap * positive));
  }
}

}  // namespace
}  // namespace shoal
