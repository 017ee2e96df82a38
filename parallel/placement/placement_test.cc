#include "parallel/placement/placement.h"

#include <numeric>

#include "gtest/gtest.h"

namespace shoal {
namespace {

std::vector<BlockShape> Blocks(int dense, int layers, int experts) {
  std::vector<BlockShape> blocks;
  for (int i = 0; i < dense; ++i) blocks.push_back({1000 + 37 * i, -1});
  for (int layer = 0; layer < layers; ++layer) {
    for (int expert = 0; expert < experts; ++expert) blocks.push_back({500, expert});
  }
  return blocks;
}

TEST(EvenPart, DealsEverythingOnceInOrder) {
  for (int64_t total = 0; total < 20; ++total) {
    for (int parts = 1; parts < 9; ++parts) {
      int64_t next = 0;
      for (int i = 0; i < parts; ++i) {
        const Range part = EvenPart(total, parts, i);
        EXPECT_EQ(part.begin, next);
        EXPECT_GE(part.count, total / parts);
        EXPECT_LE(part.count, (total + parts - 1) / parts);
        next += part.count;
      }
      EXPECT_EQ(next, total);
    }
  }
}

TEST(Placement, EveryBlockHasOneOwnerPerReplicaGroupThatHoldsIt) {
  for (int ranks = 1; ranks <= 12; ++ranks) {
    for (int expert = 1; expert <= ranks; ++expert) {
      const std::vector<BlockShape> blocks = Blocks(11, 3, 8);
      const absl::StatusOr<Placement> placement = Placement::Make(blocks, {ranks, expert, 8});
      if (ranks % expert != 0 || expert > 8) {
        EXPECT_EQ(placement.status().code(), absl::StatusCode::kInvalidArgument);
        continue;
      }
      ASSERT_TRUE(placement.ok()) << placement.status();
      for (size_t i = 0; i < blocks.size(); ++i) {
        const int block = static_cast<int>(i);
        int holders = 0, owners = 0;
        for (int r = 0; r < ranks; ++r) {
          if (!placement->Materialised(block, Rank{r})) continue;
          ++holders;
          const Rank owner = placement->OwnerFor(block, Rank{r});
          EXPECT_TRUE(placement->Materialised(block, owner));
          if (owner == Rank{r}) ++owners;
        }
        EXPECT_EQ(holders, blocks[i].expert < 0 ? ranks : ranks / expert);
        EXPECT_EQ(owners, 1);
      }
    }
  }
}

TEST(Placement, OwnersAreContiguousAndBalanced) {
  const std::vector<BlockShape> blocks = Blocks(64, 8, 8);
  for (int ranks : {1, 2, 3, 4, 7}) {
    const absl::StatusOr<Placement> placement = Placement::Make(blocks, {ranks, 1, 8});
    ASSERT_TRUE(placement.ok());
    int last_dense = 0, last_expert = 0;
    std::vector<int64_t> owned(static_cast<size_t>(ranks));
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int owner = Index(placement->OwnerFor(static_cast<int>(i), Rank{0}));
      int& last = blocks[i].expert < 0 ? last_dense : last_expert;
      EXPECT_GE(owner, last);
      last = owner;
      owned[static_cast<size_t>(owner)] += blocks[i].elements;
    }
    const int64_t total = std::accumulate(owned.begin(), owned.end(), int64_t{0});
    for (int64_t elements : owned) EXPECT_NEAR(static_cast<double>(elements), static_cast<double>(total) / ranks, 4000.0);
  }
}

TEST(Placement, GroupsOfSixRanksInExpertGroupsOfThree) {
  const absl::StatusOr<Placement> placement = Placement::Make(Blocks(1, 1, 8), {6, 3, 8});
  ASSERT_TRUE(placement.ok());
  EXPECT_EQ(placement->ExpertGroup(Rank{4}), (std::vector<int>{3, 4, 5}));
  EXPECT_EQ(placement->ReplicaGroup(Rank{4}), (std::vector<int>{1, 4}));
  EXPECT_EQ(placement->ExpertsOf(Rank{0}), (Range{0, 3}));
  EXPECT_EQ(placement->ExpertsOf(Rank{5}), (Range{6, 2}));
}

TEST(Placement, ErrorSaysWhatWouldFit) {
  const absl::Status status = Placement::Make(Blocks(1, 1, 4), {6, 4, 4}).status();
  EXPECT_NE(status.message().find("sizes that fit: 1, 2, 3"), absl::string_view::npos) << status;
}

}  // namespace
}  // namespace shoal
