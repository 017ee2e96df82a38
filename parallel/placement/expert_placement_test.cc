#include "parallel/placement/expert_placement.h"

#include <algorithm>
#include <set>

#include "gtest/gtest.h"
#include "parallel/placement/placement.h"
#include "parallel/placement/topology.h"

namespace shoal {
namespace {

TEST(EvenOwners, AreDealtOnFromLayerToLayer) {
  EXPECT_EQ(EvenOwners(3, 2, 4), (OwnerMap{{0, 1}, {2, 3}, {0, 1}}));
  EXPECT_EQ(EvenOwners(2, 5, 3), (OwnerMap{{0, 1, 2, 0, 1}, {2, 0, 1, 2, 0}}));
  EXPECT_TRUE(EvenOwners(0, 4, 2).empty());
}

TEST(GroupedPlacement, RanksWithTheSamePlaceInTheirGroupsHoldTheSameExperts) {
  for (int ranks : {1, 2, 3, 4, 6, 8, 12}) {
    for (int group = 1; group <= ranks; ++group) {
      if (ranks % group != 0) continue;
      for (int experts : {1, 3, 8, 13}) {
        if (group > experts) continue;
        for (const ExpertPlacement& layer : GroupedPlacement(3, experts, ranks, group)) {
          ASSERT_EQ(static_cast<int>(layer.size()), experts);
          for (int e = 0; e < experts; ++e) {
            for (int rank = 0; rank < ranks; ++rank) {
              const Range held = EvenPart(experts, group, rank % group);
              EXPECT_EQ(layer[static_cast<size_t>(e)].On(rank), e >= held.begin && e < held.begin + held.count);
            }
            EXPECT_EQ(static_cast<int>(layer[static_cast<size_t>(e)].holders.size()), ranks / group - 1);
          }
        }
      }
    }
  }
}

TEST(GroupedPlacement, OwnershipIsDealtEvenlyAmongTheRanksOfAPlace) {
  for (int group : {1, 2, 4, 8}) {
    std::vector<int> owned(8);
    for (const std::vector<int>& layer : OwnersOf(GroupedPlacement(5, 9, 8, group))) {
      for (int owner : layer) ++owned[static_cast<size_t>(owner)];
    }
    for (int place = 0; place < group; ++place) {
      int least = owned[static_cast<size_t>(place)], most = least;
      for (int rank = place; rank < 8; rank += group) {
        least = std::min(least, owned[static_cast<size_t>(rank)]);
        most = std::max(most, owned[static_cast<size_t>(rank)]);
      }
      EXPECT_LE(most - least, 1);
    }
  }
}

TEST(ExpertPlacement, OwnersComeBackOut) {
  const OwnerMap owners = {{3, 0, 0}, {1, 2, 3}};
  EXPECT_EQ(OwnersOf(std::vector<ExpertPlacement>{OwnersOnly(owners[0]), OwnersOnly(owners[1])}), owners);
  EXPECT_TRUE(OwnersOf({}).empty());
  const ExpertCopies copies{2, {0, 5}};
  EXPECT_TRUE(copies.On(0) && copies.On(2) && copies.On(5));
  EXPECT_FALSE(copies.On(1) || copies.On(6));
}

TEST(Fingerprint, EveryMutationChangesIt) {
  const std::vector<ExpertPlacement> base = GroupedPlacement(3, 8, 6, 3);
  std::set<uint64_t> seen = {Fingerprint(base)};
  EXPECT_EQ(Fingerprint(base), *seen.begin());
  size_t mutations = 1;
  const auto add = [&](const std::vector<ExpertPlacement>& changed) {
    seen.insert(Fingerprint(changed));
    ++mutations;
  };
  for (size_t layer = 0; layer < base.size(); ++layer) {
    for (size_t e = 0; e < base[layer].size(); ++e) {
      std::vector<ExpertPlacement> changed = base;
      ExpertCopies& copies = changed[layer][e];
      std::swap(copies.owner, copies.holders[0]);
      add(changed);
      copies = base[layer][e];
      copies.holders.clear();
      add(changed);
      copies = base[layer][e];
      copies.holders[0] += 6;
      add(changed);
      copies = base[layer][e];
      copies.holders.push_back(11);
      add(changed);
      copies = base[layer][e];
      copies.owner += 6;
      add(changed);
    }
  }
  std::vector<ExpertPlacement> shorter = base;
  shorter.pop_back();
  add(shorter);
  shorter.push_back({});
  add(shorter);
  add({});
  EXPECT_EQ(seen.size(), mutations);
}

// Where a list ends is part of the fingerprint: the same numbers cut differently differ.
TEST(Fingerprint, TellsLayersAndHoldersApart) {
  const auto print = [](std::vector<ExpertPlacement> layers) { return Fingerprint(layers); };
  EXPECT_NE(print({{{0, {}}, {1, {}}}}), print({{{0, {}}}, {{1, {}}}}));
  EXPECT_NE(print({{{0, {1}}}}), print({{{0, {}}, {1, {}}}}));
  EXPECT_NE(print({{{0, {1, 2}}, {3, {}}}}), print({{{0, {1}}, {2, {3}}}}));
  EXPECT_NE(print({{{0, {1}}, {4, {}}}}), print({{{0, {}}, {2, {3}}}}));
}

TEST(Topology, NumbersHostsByFirstRank) {
  const Topology topology = TopologyOf({70, 9, 70, -1, 9});
  EXPECT_EQ(topology.host_of_rank, (std::vector<int>{0, 1, 0, 2, 1}));
  EXPECT_EQ(topology.hosts(), 3);
  EXPECT_EQ(topology.RanksOf(1), (std::vector<int>{1, 4}));
  EXPECT_EQ(topology.RanksByHost(), (std::vector<std::vector<int>>{{0, 2}, {1, 4}, {3}}));
  EXPECT_EQ(Topology::OneHost(3), TopologyOf({5, 5, 5}));
}

}  // namespace
}  // namespace shoal
