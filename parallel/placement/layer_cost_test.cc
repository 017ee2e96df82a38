#include "parallel/placement/layer_cost.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(LayerCost, CountsRowsWhereTheyAreComputedAndWhatTheyCross) {
  const Topology topology = TopologyOf({0, 0, 1, 1});
  // Expert 0 on rank 0 with a copy on rank 3, expert 1 on rank 2.
  const ExpertPlacement placement = {{0, {3}}, {2, {}}};
  const std::vector<int64_t> rows_SE = {5, 1, 7, 2, 11, 3, 13, 4};
  const LayerRows rows = RowsOf(topology, SplitTokens(DispatchRule::kNearest, topology, placement, rows_SE));
  EXPECT_EQ(rows.work, (std::vector<int64_t>{12, 0, 10, 24}));
  EXPECT_EQ(rows.rank_in, (std::vector<int64_t>{7, 0, 7, 11}));
  EXPECT_EQ(rows.rank_out, (std::vector<int64_t>{1, 9, 11, 4}));
  EXPECT_EQ(rows.host_in, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(rows.host_out, (std::vector<int64_t>{3, 0}));
  EXPECT_EQ(rows.total, 46);
  EXPECT_EQ(rows.local, 5 + 3 + 13);
  EXPECT_EQ(ForwardPs(rows, {100, 10, 0}), 2400 + 2 * 110);
  EXPECT_EQ(ForwardPs(rows, {100, 10, 50}), 2400 + 2 * 150);
  EXPECT_EQ(StepPs(rows, {100, 10, 50}), 3 * 2400 + 4 * 150);
}

TEST(LayerCost, AnExpertEntersAHostOnce) {
  const Topology topology = TopologyOf({0, 0, 1, 1, 2, 2});
  const std::vector<int> owners = {0, 0, 2};
  const ExpertPlacement from = OwnersOnly(owners);
  const ExpertPlacement to = {{0, {1, 2, 3}}, {0, {3, 4}}, {2, {3}}};
  EXPECT_EQ(GatherPs(topology, from, to, {0, 0, 0, 1, 0}), 3);     // Rank 3 gets all three.
  EXPECT_EQ(GatherPs(topology, from, to, {0, 0, 0, 1, 100}), 200);  // Host 1 gets experts 0 and 1 from outside.
  EXPECT_EQ(GatherPs(topology, to, to, {0, 0, 0, 1, 1}), 0);
  EXPECT_EQ(GatherPs(topology, {{0, {2}}}, {{0, {2, 3}}}, {0, 0, 0, 0, 1}), 0);  // From its own host.
}

TEST(LayerCost, SumsByExpertAndByHost) {
  EXPECT_EQ(ColumnSums({1, 2, 3, 4, 5, 6}, 2), (std::vector<int64_t>{9, 12}));
  EXPECT_EQ(SumByHost(TopologyOf({8, 5, 8}), {1, 2, 3, 4, 5, 6}, 2), (std::vector<int64_t>{6, 8, 3, 4}));
}

}  // namespace
}  // namespace shoal
