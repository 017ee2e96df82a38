#include "parallel/placement/baselines.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/traces.h"

namespace shoal {
namespace {

TEST(ContiguousOwners, SpreadsAnyNumberOverAnyRanks) {
  EXPECT_EQ(ContiguousOwners(8, 3), (std::vector<int>{0, 0, 0, 1, 1, 1, 2, 2}));
  EXPECT_EQ(ContiguousOwners(2, 4), (std::vector<int>{0, 2}));
  EXPECT_TRUE(ContiguousOwners(0, 4).empty());
}

TEST(SmartMoeOwners, PacksEquallyManyByLoad) {
  EXPECT_EQ(SmartMoeOwners({10, 9, 8, 1, 2, 3}, Topology::OneHost(3)), (std::vector<int>{0, 1, 2, 0, 1, 2}));
  EXPECT_EQ(SmartMoeOwners({1, 1, 100}, Topology::OneHost(2)), (std::vector<int>{1, 0, 0}));  // Rank 1 has one place only.
  EXPECT_EQ(SmartMoeOwners({9, 8, 7, 6}, TopologyOf({0, 0, 1, 1})), (std::vector<int>{0, 2, 3, 1}));
  const std::vector<int> owners = SmartMoeOwners({5, 5, 5, 5, 5, 5, 5}, Topology::OneHost(3));
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(std::count(owners.begin(), owners.end(), rank), rank == 0 ? 3 : 2);
}

TEST(FasterMoeShadows, ShadowsWhatIsWorthItsBroadcast) {
  const Topology topology = Topology::OneHost(4);
  const std::vector<int> owners = {0, 1, 2, 3};
  // Everybody's rows are for expert 0.
  const std::vector<int64_t> rows_SE = {90, 4, 3, 3, 90, 4, 3, 3, 90, 4, 3, 3, 90, 4, 3, 3};
  LayerCosts costs{10, 1, 0, 1, 0};
  const ExpertPlacement cheap = FasterMoeShadows(owners, rows_SE, topology, costs);
  EXPECT_EQ(cheap[0].holders, (std::vector<int>{1, 2, 3}));
  // With expert 0 the step is 3 * 10 * 360 + 4 * 270; without, 3 * 10 * 106 + 4 * 12 or so: a shadow may cost the difference.
  costs.expert_send_ps = 3000;
  EXPECT_EQ(FasterMoeShadows(owners, rows_SE, topology, costs)[0].holders.size(), 3u);
  EXPECT_TRUE(FasterMoeShadows(owners, rows_SE, topology, costs)[1].holders.empty());
  costs.expert_send_ps = 10000;
  EXPECT_EQ(FasterMoeShadows(owners, rows_SE, topology, costs), OwnersOnly(owners));
}

TEST(FlexMoeAdjust, ExpandsWithinSlotsAndOnlyIfItPays) {
  const Topology topology = Topology::OneHost(4);
  const std::vector<int64_t> rows_SE = {90, 4, 3, 3, 90, 4, 3, 3, 90, 4, 3, 3, 90, 4, 3, 3};
  const ExpertPlacement start = OwnersOnly({0, 1, 2, 3});
  FlexMoeOptions options{2, 110, {10, 1, 0, 1, 0}};
  const ExpertPlacement adjusted = FlexMoeAdjust(start, rows_SE, topology, options);
  EXPECT_EQ(adjusted[0].holders, (std::vector<int>{1, 2, 3}));
  EXPECT_LT(FlexMoeStepPs(adjusted, rows_SE, topology, options.costs),
            FlexMoeStepPs(start, rows_SE, topology, options.costs));
  // The hot expert becomes another; there is no free slot, so the copies that nobody needs give way.
  std::vector<int64_t> later = rows_SE;
  for (size_t rank = 0; rank < 4; ++rank) std::swap(later[rank * 4], later[rank * 4 + 2]);
  const ExpertPlacement moved = FlexMoeAdjust(adjusted, later, topology, options);
  EXPECT_GE(moved[2].holders.size(), 2u);
  std::vector<int> held(4);
  for (const ExpertCopies& copies : moved) {
    ++held[static_cast<size_t>(copies.owner)];
    for (int holder : copies.holders) ++held[static_cast<size_t>(holder)];
  }
  for (int count : held) EXPECT_LE(count, 2);
  options.slots_per_rank = 1;
  EXPECT_EQ(FlexMoeAdjust(start, rows_SE, topology, options), start);
  options = {2, 1000, {10, 1, 0, 1, 0}};  // Not uneven enough to act.
  EXPECT_EQ(FlexMoeAdjust(start, rows_SE, topology, options), start);
  options = {2, 110, {10, 1, 0, 1'000'000, 0}};
  EXPECT_EQ(FlexMoeAdjust(start, rows_SE, topology, options), start);
}

// The order that Hecate's comparison finds, on steps with skew: Hecate before FasterMoE before static expert parallelism, all
// by what they place alone (Hecate's copies travel behind attention, FasterMoE's on the critical path).
TEST(Baselines, HecateIsFasterThanFasterMoeIsFasterThanExpertParallelism) {
  const LayerCosts costs = {100'000, 6'400, 154'000, 20'000'000, 472'000'000};
  Topology topology;
  for (int rank = 0; rank < 32; ++rank) topology.host_of_rank.push_back(rank / 8);
  const std::vector<int> owners = ContiguousOwners(64, 32);
  TraceOptions options;
  options.ranks = 32;
  options.experts = 64;
  options.choices = 2;
  options.tokens_per_rank = 4096;
  options.sigma = 1.5;
  int64_t plain = 0, faster = 0, hecate = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    options.seed = seed;
    RoutingTrace trace(options);
    const std::vector<int64_t> before = ColumnSums(trace.Rows(0), 64);
    trace.Advance();
    const std::vector<int64_t> rows = trace.Rows(0);
    const auto step_ps = [&](DispatchRule rule, const ExpertPlacement& placement) {
      return StepPs(RowsOf(topology, SplitTokens(rule, topology, placement, rows)), costs);
    };
    const ExpertPlacement shadows = FasterMoeShadows(owners, rows, topology, costs);
    plain += step_ps(DispatchRule::kNearest, OwnersOnly(owners));
    faster += step_ps(DispatchRule::kNearest, shadows) + 2 * GatherPs(topology, OwnersOnly(owners), shadows, costs);
    hecate += step_ps(DispatchRule::kNearest, Materialise(owners, before, topology, {3, 3}));
  }
  std::printf("over expert parallelism: FasterMoE %.2f, Hecate's materialisation %.2f\n",
              static_cast<double>(plain) / static_cast<double>(faster),
              static_cast<double>(plain) / static_cast<double>(hecate));
  EXPECT_LT(faster, plain);
  EXPECT_LT(hecate, faster);
}

}  // namespace
}  // namespace shoal
