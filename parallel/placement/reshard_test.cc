#include "parallel/placement/reshard.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "gtest/gtest.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/layer_cost.h"
#include "parallel/placement/traces.h"

namespace shoal {
namespace {

using Loads = std::vector<std::vector<int64_t>>;

std::vector<int64_t> Owned(const OwnerMap& owners, int ranks) {
  std::vector<int64_t> owned(static_cast<size_t>(ranks));
  for (const std::vector<int>& layer : owners) {
    for (int owner : layer) ++owned[static_cast<size_t>(owner)];
  }
  return owned;
}

// Load per rank of the fullest place (a rank or a host) of each layer without its `overlap` hottest experts, summed over layers.
int64_t ColdMaximum(const Loads& loads, const OwnerMap& owners, absl::Span<const int> place_of_rank,
                    absl::Span<const int> size_of_place, int overlap) {
  int64_t sum = 0;
  for (size_t layer = 0; layer < loads.size(); ++layer) {
    std::vector<int> order(loads[layer].size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return loads[layer][static_cast<size_t>(a)] > loads[layer][static_cast<size_t>(b)];
    });
    std::vector<int64_t> load(size_of_place.size());
    for (size_t i = static_cast<size_t>(overlap); i < order.size(); ++i) {
      const size_t e = static_cast<size_t>(order[i]);
      load[static_cast<size_t>(place_of_rank[static_cast<size_t>(owners[layer][e])])] += loads[layer][e];
    }
    for (size_t p = 0; p < load.size(); ++p) load[p] /= size_of_place[p];
    sum += *std::max_element(load.begin(), load.end());
  }
  return sum;
}

int64_t ColdMaximum(const Loads& loads, const OwnerMap& owners, int ranks, int overlap) {
  std::vector<int> ranks_alone(static_cast<size_t>(ranks));
  std::iota(ranks_alone.begin(), ranks_alone.end(), 0);
  return ColdMaximum(loads, owners, ranks_alone, std::vector<int>(static_cast<size_t>(ranks), 1), overlap);
}

int64_t Unevenness(const Loads& loads, const Topology& topology, const OwnerMap& owners, int overlap) {
  std::vector<int> sizes;
  for (const std::vector<int>& ranks : topology.RanksByHost()) sizes.push_back(static_cast<int>(ranks.size()));
  return ColdMaximum(loads, owners, topology.ranks(), overlap) +
         ColdMaximum(loads, owners, topology.host_of_rank, sizes, overlap);
}

Topology HostsOfFour(int hosts) {
  Topology topology;
  for (int rank = 0; rank < 4 * hosts; ++rank) topology.host_of_rank.push_back(rank / 4);
  return topology;
}

Loads LoadsOf(const RoutingTrace& trace, int layers, int experts) {
  Loads loads;
  for (int layer = 0; layer < layers; ++layer) loads.push_back(ColumnSums(trace.Rows(layer), experts));
  return loads;
}

OwnerMap Contiguous(int layers, int experts, int ranks) {
  OwnerMap owners(static_cast<size_t>(layers));
  for (std::vector<int>& layer : owners) {
    for (int e = 0; e < experts; ++e) layer.push_back(static_cast<int>(int64_t{e} * ranks / experts));
  }
  return owners;
}

TEST(Reshard, EveryRankOwnsAsManyWhateverTheShape) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const int ranks = 1 + static_cast<int>(random() % 12), experts = 1 + static_cast<int>(random() % 20);
    const int layers = 1 + static_cast<int>(random() % 5), overlap = static_cast<int>(random() % 8);
    std::vector<int64_t> labels;
    for (int rank = 0; rank < ranks; ++rank) labels.push_back(random() % 3);
    const Topology topology = TopologyOf(labels);
    Loads loads(static_cast<size_t>(layers));
    OwnerMap current(static_cast<size_t>(layers));
    for (size_t layer = 0; layer < loads.size(); ++layer) {
      for (int e = 0; e < experts; ++e) {
        loads[layer].push_back(random() % 4 == 0 ? 0 : 1 << random() % 12);
        current[layer].push_back(static_cast<int>(random() % static_cast<uint32_t>(ranks)));
      }
    }
    const OwnerMap owners = Reshard(loads, topology, current, overlap);
    const std::vector<int64_t> owned = Owned(owners, ranks);
    EXPECT_LE(*std::max_element(owned.begin(), owned.end()) - *std::min_element(owned.begin(), owned.end()), 1);
    EXPECT_EQ(Reshard(loads, topology, current, overlap), owners);
    // From an even start the sum of the fullest rank's and the fullest host's cold load never grows.
    OwnerMap last = owners;
    for (std::vector<int64_t>& layer : loads) std::shuffle(layer.begin(), layer.end(), random);
    for (int round = 0; round < 3; ++round) {
      const OwnerMap next = Reshard(loads, topology, last, overlap);
      EXPECT_LE(Unevenness(loads, topology, next, overlap), Unevenness(loads, topology, last, overlap));
      last = next;
    }
  }
}

TEST(Reshard, ColdExpertsAreSpreadOverHostsAndRanks) {
  // All load in the first half of the experts, which the first host owns.
  const Topology topology = TopologyOf({0, 0, 1, 1});
  const Loads loads = {{4, 4, 4, 4, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0, 0}};
  const OwnerMap owners = Reshard(loads, topology, Contiguous(2, 8, 4), 0);
  std::vector<int64_t> load(4);
  for (size_t e = 0; e < 8; ++e) load[static_cast<size_t>(owners[0][e])] += loads[0][e];
  EXPECT_EQ(load, (std::vector<int64_t>{4, 4, 4, 4}));
}

TEST(Reshard, HotExpertsOfALayerGetDifferentHostsIfTheyMustMove) {
  // Rank 0 owns everything; the two hottest experts of each layer are materialised anyway.
  const Topology topology = TopologyOf({0, 0, 1, 1});
  const Loads loads = {{100, 90, 1, 1}, {100, 90, 1, 1}};
  const OwnerMap owners = Reshard(loads, topology, {{0, 0, 0, 0}, {0, 0, 0, 0}}, 2);
  for (size_t layer = 0; layer < 2; ++layer) {
    EXPECT_NE(owners[layer][0], owners[layer][1]) << layer;
    EXPECT_NE(topology.HostOf(owners[layer][2]), topology.HostOf(owners[layer][3])) << layer;
  }
}

TEST(Reshard, HotExpertsThatMustMoveAreSpreadOverRanks) {
  // Rank 0 owns all of both layers and keeps the cold of either and two hot ones of the first layer.
  const Loads loads(2, {100, 100, 100, 100, 1, 1, 1, 1});
  const OwnerMap owners = Reshard(loads, Topology::OneHost(4), OwnerMap(2, std::vector<int>(8, 0)), 4);
  for (int rank = 1; rank < 4; ++rank) {
    EXPECT_GE(std::count(owners[1].begin(), owners[1].begin() + 4, rank), 1) << rank;
  }
}

TEST(Reshard, WhatIsBalancedStays) {
  const Loads loads = {{5, 5, 5, 5, 5, 5}, {1, 2, 3, 3, 2, 1}};
  OwnerMap current = Contiguous(2, 6, 3);
  current[1] = {0, 1, 2, 0, 1, 2};  // 4, 4, 4.
  EXPECT_EQ(Reshard(loads, Topology::OneHost(3), current, 0), current);
  EXPECT_EQ(Reshard(Loads{}, Topology::OneHost(3), {}, 2), OwnerMap{});
}

TEST(Reshard, EvensOutColdLoadAndThenMovesAsLittleAsItMay) {
  const int ranks = 16, experts = 64, layers = 6, overlap = 3;
  const Topology topology = HostsOfFour(4);
  TraceOptions options;
  options.layers = layers;
  options.ranks = ranks;
  options.experts = experts;
  options.choices = 2;
  options.tokens_per_rank = 1024;
  size_t moved[2] = {};
  for (uint64_t seed = 0; seed < 4; ++seed) {
    SCOPED_TRACE(seed);
    options.seed = seed;
    RoutingTrace trace(options);
    const Loads loads = LoadsOf(trace, layers, experts);
    for (int step = 0; step < 10; ++step) trace.Advance();
    const Loads later = LoadsOf(trace, layers, experts);
    int64_t bound = 0;  // The mean of the cold, or the largest of them.
    for (const std::vector<int64_t>& layer : loads) {
      std::vector<int64_t> sorted = layer;
      std::sort(sorted.rbegin(), sorted.rend());
      bound += std::max(std::accumulate(sorted.begin() + overlap, sorted.end(), int64_t{0}) / ranks, sorted[overlap]);
    }
    const OwnerMap start = Contiguous(layers, experts, ranks);
    for (int slack : {0, 20}) {
      const OwnerMap first = Reshard(loads, topology, start, overlap, slack);
      const int64_t most = ColdMaximum(loads, first, ranks, overlap);
      EXPECT_LE(most * 100, bound * (115 + slack));
      EXPECT_LT(most * 100, ColdMaximum(loads, start, ranks, overlap) * 80);
      EXPECT_EQ(Reshard(loads, topology, first, overlap, slack), first);
      const size_t moves = MovesBetween(first, Reshard(later, topology, first, overlap, slack)).size();
      moved[slack / 20] += moves;
      std::printf("slack %d: fullest rank %.3f of the bound; %zu of %d experts move at first, %zu ten steps later\n", slack,
                  static_cast<double>(most) / static_cast<double>(bound), MovesBetween(start, first).size(),
                  layers * experts, moves);
    }
  }
  EXPECT_LT(moved[1] * 2, moved[0]);
}

TEST(Reshard, MaterialisingIsFasterFromReshardedOwners) {
  const Topology topology = HostsOfFour(8);
  const LayerCosts costs = {100'000, 6'400, 154'000, 20'000'000, 472'000'000};
  TraceOptions options;
  options.layers = 6;
  options.ranks = 32;
  options.experts = 64;
  options.choices = 2;
  options.tokens_per_rank = 4096;
  RoutingTrace trace(options);
  const Loads loads = LoadsOf(trace, 6, 64);
  const OwnerMap start = Contiguous(6, 64, 32), resharded = Reshard(loads, topology, start, 3);
  trace.Advance();
  const auto step_ps = [&](const OwnerMap& owners) {
    int64_t sum = 0;
    for (size_t layer = 0; layer < 6; ++layer) {
      const ExpertPlacement placement = Materialise(owners[layer], loads[layer], topology, {3, 3});
      const std::vector<int64_t> rows = trace.Rows(static_cast<int>(layer));
      sum += StepPs(RowsOf(topology, SplitTokens(DispatchRule::kWaterFill, topology, placement, rows)), costs);
    }
    return sum;
  };
  EXPECT_LT(step_ps(resharded) * 100, step_ps(start) * 92);
}

TEST(MovesBetween, ListsWhatChangedInOrder) {
  EXPECT_EQ(MovesBetween({{0, 1}, {2, 0}}, {{0, 2}, {1, 0}}), (std::vector<OwnerMove>{{0, 1, 1, 2}, {1, 0, 2, 1}}));
  EXPECT_TRUE(MovesBetween({{0, 1}}, {{0, 1}}).empty());
}

}  // namespace
}  // namespace shoal
