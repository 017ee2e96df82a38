#include "parallel/placement/eplb.h"

#include <algorithm>
#include <random>

#include "gtest/gtest.h"

namespace shoal {
namespace {

// The example of EPLB's own README: 12 experts, 16 slots, 4 groups, 2 hosts, 8 ranks.
TEST(BalanceReplicas, ReproducesTheExampleOfTheOriginal) {
  const EplbShape shape{16, 8, 2, 4};
  EXPECT_EQ(*BalanceReplicas({90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86}, shape),
            (std::vector<int>{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(*BalanceReplicas({20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}, shape),
            (std::vector<int>{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
}

TEST(BalanceReplicas, EveryExpertHasASlotAndTheHottestAreHalved) {
  for (uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const int hosts = 1 + static_cast<int>(random() % 3), ranks = hosts * (1 + static_cast<int>(random() % 4));
    const int experts = 12;
    EplbShape shape{0, ranks, hosts, random() % 2 == 0 ? 12 : 1};
    shape.slots = (experts + ranks - 1) / ranks * ranks + ranks * static_cast<int>(random() % 3);
    std::vector<int64_t> loads;
    for (int e = 0; e < experts; ++e) loads.push_back(1 << random() % 12);
    if (shape.groups % hosts == 0 && shape.slots / hosts < experts / hosts) continue;
    const std::vector<int> slots = *BalanceReplicas(loads, shape);
    ASSERT_EQ(static_cast<int>(slots.size()), shape.slots);
    std::vector<int64_t> count(static_cast<size_t>(experts));
    for (int expert : slots) ++count[static_cast<size_t>(expert)];
    EXPECT_GE(*std::min_element(count.begin(), count.end()), 1);
    if (shape.groups % hosts == 0 && hosts > 1) continue;  // Replicas are counted within a host.
    for (size_t a = 0; a < count.size(); ++a) {
      for (size_t b = 0; b < count.size(); ++b) {
        // No replica of b would have done more for a.
        EXPECT_TRUE(count[b] == 1 || loads[a] * (count[b] - 1) <= loads[b] * count[a]);
      }
    }
    const ExpertPlacement placement = PlacementOfSlots(slots, experts, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      for (int e = 0; e < experts; ++e) {
        const auto begin = slots.begin() + rank * (shape.slots / ranks), end = begin + shape.slots / ranks;
        EXPECT_EQ(placement[static_cast<size_t>(e)].On(rank), std::find(begin, end, e) != end);
      }
    }
  }
}

TEST(BalanceReplicas, TiesGoToTheFirst) {
  EXPECT_EQ(*BalanceReplicas({4, 4}, {3, 1}), (std::vector<int>{1, 0, 0}));  // Expert 0 is halved; whole 1 weighs most.
  EXPECT_EQ(*BalanceReplicas({0, 0, 0, 0}, {4, 2}), (std::vector<int>{0, 1, 2, 3}));
}

TEST(PlacementOfSlots, TheFirstSlotIsTheOwners) {
  EXPECT_EQ(PlacementOfSlots({2, 1, 0, 2, 2, 2}, 3, 3), (ExpertPlacement{{1, {}}, {0, {}}, {0, {1, 2}}}));
}

TEST(BalanceReplicas, ErrorNamesTheNumbers) {
  const EplbShape bad[] = {{3, 1}, {9, 2}, {8, 4, 3}, {8, 4, 2, 3}, {8, 0}};
  for (const EplbShape& shape : bad) {
    const absl::Status status = BalanceReplicas({1, 2, 3, 4}, shape).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("slots for 4 experts"), absl::string_view::npos) << status;
  }
}

}  // namespace
}  // namespace shoal
