#include "parallel/placement/copies.h"

#include <algorithm>
#include <random>

#include "gtest/gtest.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/owners.h"
#include "parallel/placement/reshard.h"
#include "parallel/placement/traces.h"

namespace shoal {
namespace {

Topology Hosts(int hosts, int ranks_each) {
  Topology topology;
  for (int rank = 0; rank < hosts * ranks_each; ++rank) topology.host_of_rank.push_back(rank / ranks_each);
  return topology;
}

std::vector<int> Dealt(int experts, int ranks) {
  std::vector<int> owners;
  for (int e = 0; e < experts; ++e) owners.push_back(e % ranks);
  return owners;
}

CopyOptions Options(int room, int64_t expert_ps, int64_t hidden_ps = 0) {
  return {.room = room,
          .costs = {.layer = {.row_work_ps = 100,
                              .row_send_ps = 10,
                              .row_cross_ps = 10,
                              .expert_send_ps = expert_ps,
                              .expert_cross_ps = expert_ps},
                    .hidden_forward_ps = hidden_ps,
                    .hidden_backward_ps = 2 * hidden_ps}};
}

TEST(CopiesPs, CountsTheBusiestEnd) {
  // Two hosts of two ranks. Expert 0 of rank 0 goes everywhere: the owner sends to its host and to the other,
  // whose leader sends on.
  const Topology topology = Hosts(2, 2);
  const ExpertPlacement placement = {{0, {1, 2, 3}}, {1, {}}};
  EXPECT_EQ(CopiesPs(topology, placement, {.expert_send_ps = 10}), 20);
  EXPECT_EQ(CopiesPs(topology, placement, {.expert_cross_ps = 10}), 10);
  // On four hosts of one rank the owner's link carries it three times.
  EXPECT_EQ(CopiesPs(Hosts(4, 1), placement, {.expert_cross_ps = 10}), 30);
  EXPECT_EQ(CopiesPs(topology, OwnersOnly(Dealt(4, 4)), {.expert_send_ps = 10, .expert_cross_ps = 10}), 0);
}

TEST(StepWithCopiesPs, AddsWhatIsNotHidden) {
  const Topology topology = Topology::OneHost(2);
  const std::vector<int64_t> rows = {10, 0, 10, 0};  // All rows for expert 0.
  CopyCosts costs = Options(1, 1000).costs;
  const ExpertPlacement copied = {{0, {1}}, {1, {}}};
  EXPECT_EQ(StepWithCopiesPs(topology, OwnersOnly(Dealt(2, 2)), rows, DispatchRule::kNearest, costs),
            3 * 20 * 100 + 4 * 10 * 10);
  EXPECT_EQ(StepWithCopiesPs(topology, copied, rows, DispatchRule::kNearest, costs),
            3 * 10 * 100 + 1000 + 2000);
  costs.hidden_forward_ps = 400;
  costs.hidden_backward_ps = 5000;
  EXPECT_EQ(StepWithCopiesPs(topology, copied, rows, DispatchRule::kNearest, costs), 3 * 10 * 100 + 600);
  costs.gather_twice = true;
  costs.gradient_percent = 450;
  EXPECT_EQ(StepWithCopiesPs(topology, copied, rows, DispatchRule::kNearest, costs),
            3 * 10 * 100 + 600 + 500);
}

TEST(ChooseCopies, CopiesTheHotExpertAndNothingAtEvenLoads) {
  const Topology topology = Topology::OneHost(4);
  std::vector<int64_t> even(4 * 8, 25), skewed(4 * 8, 10);
  for (size_t rank = 0; rank < 4; ++rank) skewed[rank * 8 + 5] = 130;
  const std::vector<int> owners = Dealt(8, 4);
  EXPECT_EQ(ChooseCopies(owners, even, topology, Options(4, 50'000)), OwnersOnly(owners));
  const ExpertPlacement placement = ChooseCopies(owners, skewed, topology, Options(4, 5'000));
  EXPECT_EQ(placement[5].holders, (std::vector<int>{0, 2, 3}));
  for (size_t e = 0; e < 8; ++e) {
    EXPECT_EQ(placement[e].holders.empty(), e != 5) << e;
  }
  // Without room, or with copies that cost more than they save, there are none.
  EXPECT_EQ(ChooseCopies(owners, skewed, topology, Options(0, 5'000)), OwnersOnly(owners));
  EXPECT_EQ(ChooseCopies(owners, skewed, topology, Options(4, 100'000'000)), OwnersOnly(owners));
}

TEST(ChooseCopies, BecomesDataParallelismWhereWeightsCostNothing) {
  const Topology topology = Hosts(2, 2);
  const std::vector<int> owners = Dealt(8, 4);
  const std::vector<int64_t> rows(4 * 8, 25);
  const ExpertPlacement placement = ChooseCopies(owners, rows, topology, Options(6, 1'000, 1'000'000));
  for (const ExpertCopies& copies : placement) EXPECT_EQ(copies.holders.size(), 3u);
}

TEST(ChooseCopies, StaysWithTheLastPlanForLittleGain) {
  const Topology topology = Topology::OneHost(2);
  const std::vector<int> owners = {0, 1};
  CopyOptions options = Options(1, 9'800);
  options.costs.layer.row_send_ps = 0;
  const ExpertPlacement none = OwnersOnly(owners), copied = {{0, {1}}, {1, {}}};
  // A copy of expert 0 saves 1% at 100 rows of each rank, 9% at 120, and costs 4% at 90.
  const auto rows = [](int64_t hot) { return std::vector<int64_t>{hot, 0, hot, 0}; };
  EXPECT_TRUE(ChooseCopies(owners, rows(100), topology, options) == none);
  EXPECT_TRUE(ChooseCopies(owners, rows(120), topology, options) == copied);
  EXPECT_TRUE(ChooseCopies(owners, rows(100), topology, options, copied) == copied);
  EXPECT_TRUE(ChooseCopies(owners, rows(90), topology, options, copied) == none);
}

TEST(ChooseCopies, IsNeverPredictedSlowerThanNoneAndFitsTheRoom) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const int hosts = 1 + static_cast<int>(random() % 3), each = 1 + static_cast<int>(random() % 3),
              ranks = hosts * each;
    const int experts = 1 + static_cast<int>(random() % 12);
    const Topology topology = Hosts(hosts, each);
    RoutingTrace trace(
        {.ranks = ranks, .experts = experts, .tokens_per_rank = 200, .sigma = 1.0, .seed = seed});
    std::vector<int> owners;
    for (int e = 0; e < experts; ++e)
      owners.push_back(static_cast<int>(random() % static_cast<uint64_t>(ranks)));
    CopyOptions options = Options(static_cast<int>(random() % 5), static_cast<int64_t>(random() % 20'000),
                                  static_cast<int64_t>(random() % 20'000));
    ExpertPlacement before;
    for (int step = 0; step < 5; ++step, trace.Advance()) {
      const std::vector<int64_t> rows = trace.Rows(0);
      const ExpertPlacement placement = ChooseCopies(owners, rows, topology, options, before);
      const auto ps = [&](const ExpertPlacement& p) {
        return StepWithCopiesPs(topology, p, rows, options.rule, options.costs);
      };
      EXPECT_LE(ps(placement), ps(OwnersOnly(owners)));
      // Nor much slower than what attention hides, whatever that is.
      for (int overlap : {1, 2, 4, 8}) {
        if (overlap > std::min(options.room, experts)) break;
        const int64_t fixed =
            ps(Materialise(owners, ColumnSums(rows, experts), topology, {overlap, options.room}));
        EXPECT_LE(ps(placement), fixed + fixed / 40);
      }
      EXPECT_EQ(OwnersOf({placement}).front(), owners);
      std::vector<int> copies(static_cast<size_t>(ranks));
      for (const ExpertCopies& expert : placement) {
        EXPECT_TRUE(std::is_sorted(expert.holders.begin(), expert.holders.end()));
        EXPECT_EQ(std::adjacent_find(expert.holders.begin(), expert.holders.end()), expert.holders.end());
        for (int holder : expert.holders) {
          EXPECT_NE(holder, expert.owner);
          ++copies[static_cast<size_t>(holder)];
        }
      }
      for (int count : copies) EXPECT_LE(count, options.room);
      EXPECT_EQ(placement, ChooseCopies(owners, rows, topology, options, before));
      before = placement;
    }
  }
}

class ChooseOwnersTest : public testing::TestWithParam<OwnerPolicy> {};

TEST_P(ChooseOwnersTest, MovesWhatPaysAndKeepsPlaces) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const Topology topology = Hosts(2, 2);
    const int layers = 3, experts = 10;
    RoutingTrace trace({.layers = layers,
                        .ranks = 4,
                        .experts = experts,
                        .tokens_per_rank = 400,
                        .sigma = 1.0,
                        .seed = seed});
    std::vector<std::vector<int64_t>> rows;
    OwnerMap current;
    for (int layer = 0; layer < layers; ++layer) {
      rows.push_back(trace.Rows(layer));
      current.emplace_back();
      for (int e = 0; e < experts; ++e) current.back().push_back((layer * experts + e) % 4);
    }
    OwnerOptions options = {.policy = GetParam(), .copies = Options(2, 10'000), .steps = 100};
    const OwnerMap after = ChooseOwners(rows, topology, current, options);
    std::vector<int> owned(4);
    for (const std::vector<int>& layer : after) {
      ASSERT_EQ(layer.size(), static_cast<size_t>(experts));
      for (int owner : layer) ++owned[static_cast<size_t>(owner)];
    }
    EXPECT_EQ(owned[0] + owned[1] + owned[2] + owned[3], layers * experts);
    for (int count : owned) EXPECT_LE(count, 8);  // 30 experts: 8, 8, 7 and 7 at the start.
    if (after == current) continue;
    int64_t saved = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
      const auto ps = [&](const std::vector<int>& owners) {
        return StepWithCopiesPs(topology, ChooseCopies(owners, rows[layer], topology, options.copies),
                                rows[layer], DispatchRule::kNearest, options.copies.costs);
      };
      saved += ps(current[layer]) - ps(after[layer]);
    }
    EXPECT_GT(saved * options.steps,
              MovePs(topology, current, after, options.copies.costs.layer, options.move_percent));
    // What is too dear to move in one step stays.
    options.steps = 1;
    options.move_percent = 1'000'000;
    EXPECT_EQ(ChooseOwners(rows, topology, current, options), current);
  }
}

TEST_P(ChooseOwnersTest, FindsTheEvenOnes) {
  // Without room for copies: both busy experts are on rank 0.
  const Topology topology = Topology::OneHost(2);
  const std::vector<std::vector<int64_t>> rows = {{90, 1, 80, 1, 90, 1, 80, 1}};
  const OwnerOptions options = {.policy = GetParam(), .copies = Options(0, 1'000), .steps = 100};
  const OwnerMap after = ChooseOwners(rows, topology, {{0, 1, 0, 1}}, options);
  EXPECT_NE(after[0][0], after[0][2]);
}

INSTANTIATE_TEST_SUITE_P(Policies, ChooseOwnersTest,
                         testing::Values(OwnerPolicy::kHecate, OwnerPolicy::kEplb, OwnerPolicy::kTuned));

}  // namespace
}  // namespace shoal
