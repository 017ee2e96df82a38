#include "parallel/placement/tuner.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>

#include "gtest/gtest.h"
#include "parallel/placement/traces.h"

namespace shoal {
namespace {

Topology Hosts(int hosts, int ranks_per_host) {
  Topology topology;
  for (int rank = 0; rank < hosts * ranks_per_host; ++rank) topology.host_of_rank.push_back(rank / ranks_per_host);
  return topology;
}

int64_t PsOf(const std::vector<int>& owners, absl::Span<const int64_t> rows, const Topology& topology,
             const LayerCosts& costs) {
  return ForwardPs(RowsOf(topology, SplitTokens(DispatchRule::kNearest, topology, OwnersOnly(owners), rows)), costs);
}

// The least time over all owners, ranks^experts of them, with at most `most` experts on a rank.
int64_t BruteForce(absl::Span<const int64_t> rows, const Topology& topology, const LayerCosts& costs, int most) {
  const int ranks = topology.ranks();
  std::vector<int> owners(rows.size() / static_cast<size_t>(ranks), 0);
  int64_t best = INT64_MAX;
  for (size_t digit = 0; digit < owners.size();) {
    std::vector<int> count(static_cast<size_t>(ranks));
    for (int owner : owners) ++count[static_cast<size_t>(owner)];
    if (*std::max_element(count.begin(), count.end()) <= most) best = std::min(best, PsOf(owners, rows, topology, costs));
    for (digit = 0; digit < owners.size() && ++owners[digit] == ranks; ++digit) owners[digit] = 0;
  }
  return best;
}

TEST(TuneOwners, IsAsGoodAsBruteForceOnSmallCases) {
  const LayerCosts all_costs[] = {{100, 0, 0}, {100, 20, 150}, {10, 0, 300}, {0, 30, 30}};
  for (uint32_t seed = 0; seed < 8; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const Topology topology = seed % 2 == 0 ? Hosts(2, 2) : TopologyOf({0, 1, 1, 1});
    const int experts = seed < 2 ? 8 : 6;
    std::vector<int64_t> rows;
    for (int i = 0; i < 4 * experts; ++i) rows.push_back(random() % 5 == 0 ? 0 : random() % 1000);
    TuneOptions options;
    options.costs = all_costs[seed / 2];
    options.experts_per_rank_max = seed % 3 == 0 ? 2 : 0;
    const TunedOwners tuned = TuneOwners(rows, {}, topology, options);
    EXPECT_EQ(tuned.forward_ps, PsOf(tuned.owners, rows, topology, options.costs));
    EXPECT_GE(tuned.forward_ps, tuned.bound_ps);
    const int64_t best = BruteForce(rows, topology, options.costs, options.experts_per_rank_max == 0 ? experts : 2);
    EXPECT_LE(tuned.forward_ps * 100, best * 102);
    EXPECT_GE(tuned.forward_ps, best);
    for (int rank = 0; rank < 4 && options.experts_per_rank_max > 0; ++rank) {
      EXPECT_LE(std::count(tuned.owners.begin(), tuned.owners.end(), rank), options.experts_per_rank_max);
    }
  }
}

TEST(TuneOwners, LoadIsWithinTwoPercentOfTheBound) {
  const std::pair<int, int> shapes[] = {{8, 64}, {16, 128}, {32, 64}, {64, 256}};
  for (const auto& [ranks, experts] : shapes) {
    TraceOptions trace;
    trace.ranks = ranks;
    trace.experts = experts;
    trace.choices = 2;
    trace.tokens_per_rank = 4096;
    trace.seed = 5;
    TuneOptions options;
    options.costs.row_work_ps = 100;
    const auto start = std::chrono::steady_clock::now();
    const TunedOwners tuned = TuneOwners(RoutingTrace(trace).Rows(0), {}, Hosts(ranks / 8, 8), options);
    std::printf("%d ranks, %d experts: %.4f of the bound in %.0f ms\n", ranks, experts,
                static_cast<double>(tuned.forward_ps) / static_cast<double>(tuned.bound_ps),
                std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    EXPECT_LE(tuned.forward_ps * 100, tuned.bound_ps * 102);
  }
}

TEST(TuneOwners, ExpertsGoToTheHostsThatUseThem) {
  const Topology topology = Hosts(4, 4);
  TraceOptions trace;
  trace.ranks = 16;
  trace.experts = 64;
  trace.choices = 2;
  trace.tokens_per_rank = 2048;
  trace.sigma = 0.3;
  trace.taste_sigma = 1.5;
  trace.taste_ranks = 4;
  const std::vector<int64_t> rows = RoutingTrace(trace).Rows(0);
  const auto crossing = [&](const std::vector<int>& owners) {
    const LayerRows counted = RowsOf(topology, SplitTokens(DispatchRule::kNearest, topology, OwnersOnly(owners), rows));
    return std::accumulate(counted.host_in.begin(), counted.host_in.end(), int64_t{0});
  };
  TuneOptions options;
  options.costs = {100, 6, 154};
  const auto start = std::chrono::steady_clock::now();
  const TunedOwners tuned = TuneOwners(rows, {}, topology, options);
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  options.costs = {100, 0, 0};
  const TunedOwners balanced = TuneOwners(rows, {}, topology, options);
  std::printf("rows between hosts: %ld, of owners balanced by load alone %ld; %.0f ms\n",
              static_cast<long>(crossing(tuned.owners)), static_cast<long>(crossing(balanced.owners)), ms);
  EXPECT_LT(crossing(tuned.owners) * 10, crossing(balanced.owners) * 7);
  EXPECT_LT(PsOf(tuned.owners, rows, topology, {100, 6, 154}), PsOf(balanced.owners, rows, topology, {100, 6, 154}));
}

TEST(TuneOwners, IsNeverWorseThanWhereItStartsAndRepeats) {
  int64_t with_restarts = 0, without = 0;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    std::vector<int64_t> rows;
    std::vector<int> start;
    for (int i = 0; i < 6 * 30; ++i) rows.push_back(random() % 100);
    for (int e = 0; e < 30; ++e) start.push_back(static_cast<int>(random() % 6));
    TuneOptions options{{50, 5, 40}, 0, 2};
    const TunedOwners tuned = TuneOwners(rows, start, Hosts(3, 2), options);
    EXPECT_EQ(TuneOwners(rows, start, Hosts(3, 2), options).owners, tuned.owners);
    EXPECT_LE(TuneOwners(rows, tuned.owners, Hosts(3, 2), options).forward_ps, tuned.forward_ps);
    with_restarts += tuned.forward_ps;
    options.restarts = 0;
    without += TuneOwners(rows, start, Hosts(3, 2), options).forward_ps;
  }
  EXPECT_LT(with_restarts, without);
}

TEST(TuneOwners, EdgeShapes) {
  TuneOptions options;
  options.costs.row_work_ps = 1;
  EXPECT_TRUE(TuneOwners({}, {}, Hosts(1, 2), options).owners.empty());
  EXPECT_EQ(TuneOwners({3, 1}, {}, Hosts(1, 1), options).owners, (std::vector<int>{0, 0}));
  // Traffic would have all on rank 0, whose tokens use them; there is room for one each.
  TuneOptions one_each{{1, 100, 100}, 1};
  std::vector<int> spread = TuneOwners({9, 8, 7, 0, 0, 0, 0, 0, 0}, {}, Hosts(1, 3), one_each).owners;
  std::sort(spread.begin(), spread.end());
  EXPECT_EQ(spread, (std::vector<int>{0, 1, 2}));
  const std::vector<int> two = TuneOwners({4, 4, 0, 0, 0, 0, 0, 0}, {}, Hosts(2, 2), options).owners;
  EXPECT_NE(two[0], two[1]);
  EXPECT_EQ(TuneOwners(std::vector<int64_t>(12), {}, Hosts(2, 2), options).forward_ps, 0);
}

}  // namespace
}  // namespace shoal
