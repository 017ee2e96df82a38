#include "parallel/placement/hecate.h"

#include <algorithm>
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

std::vector<int> EvenOwners(int experts, int ranks) {
  std::vector<int> owners;
  for (int e = 0; e < experts; ++e) owners.push_back(static_cast<int>(int64_t{e} * ranks / experts));
  return owners;
}

// Owners as given, holders ascending and without the owner, at most `memory` copies on a rank.
void ExpectFits(const ExpertPlacement& placement, absl::Span<const int> owners, int ranks, int memory) {
  ASSERT_EQ(placement.size(), owners.size());
  std::vector<int> held(static_cast<size_t>(ranks));
  for (size_t e = 0; e < placement.size(); ++e) {
    EXPECT_EQ(placement[e].owner, owners[e]);
    for (size_t i = 0; i < placement[e].holders.size(); ++i) {
      const int holder = placement[e].holders[i];
      ASSERT_TRUE(holder >= 0 && holder < ranks && holder != owners[e]);
      ASSERT_TRUE(i == 0 || holder > placement[e].holders[i - 1]);
      EXPECT_LE(++held[static_cast<size_t>(holder)], memory);
    }
  }
}

TEST(LoadWindow, SumsTheLastSteps) {
  LoadWindow window(2, 3, 2);
  EXPECT_EQ(window.Predicted(1), (std::vector<int64_t>{0, 0, 0}));
  window.Add({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(window.Predicted(1), (std::vector<int64_t>{4, 5, 6}));
  window.Add({10, 10, 10, 10, 10, 10});
  window.Add({100, 0, 0, 0, 0, 7});
  EXPECT_EQ(window.Predicted(0), (std::vector<int64_t>{110, 10, 10}));
  EXPECT_EQ(window.Predicted(1), (std::vector<int64_t>{10, 10, 17}));
}

TEST(OverlapBudget, CountsHowOftenAnExpertEntersAHost) {
  // 1 ms at 1 GB/s carries 1 MB: 10 experts of 100 kB, less one byte 9.
  OverlapInputs inputs{1'000'000, 1'000'000'000, 100'000};
  EXPECT_EQ(OverlapBudget(Hosts(4, 2), inputs), 10);
  inputs.other_work_ns -= 1;
  EXPECT_EQ(OverlapBudget(Hosts(4, 2), inputs), 9);
  inputs.entry = OverlapInputs::Entry::kOncePerRank;
  EXPECT_EQ(OverlapBudget(Hosts(4, 2), inputs), 4);
  EXPECT_EQ(OverlapBudget(Hosts(1, 8), inputs), 9);  // One host: nothing crosses.
  inputs.other_work_ns = -5;                          // The link is busy all the time.
  EXPECT_EQ(OverlapBudget(Hosts(4, 2), inputs), 0);
  EXPECT_EQ(OverlapBudget(Hosts(1, 1), {INT64_MAX, INT64_MAX, 1}), INT32_MAX);
}

TEST(Materialise, WithoutBudgetOnlyOwnersHaveExperts) {
  const std::vector<int> owners = EvenOwners(8, 4);
  const std::vector<int64_t> loads = {8, 7, 6, 5, 4, 3, 2, 1};
  EXPECT_EQ(Materialise(owners, loads, Hosts(2, 2), {0, 8}), OwnersOnly(owners));
  EXPECT_EQ(Materialise(owners, loads, Hosts(2, 2), {8, 0}), OwnersOnly(owners));
  EXPECT_EQ(Materialise(owners, std::vector<int64_t>(8), Hosts(2, 2), {4, 4}), OwnersOnly(owners));
  EXPECT_EQ(Materialise(std::vector<int>(8, 0), loads, Hosts(1, 1), {4, 4}), OwnersOnly(std::vector<int>(8, 0)));
  EXPECT_TRUE(Materialise({}, {}, Hosts(2, 2), {4, 4}).empty());
}

TEST(Materialise, IfMemoryAllowsTheHottestAreEverywhere) {
  const std::vector<int> owners = EvenOwners(5, 4);
  const ExpertPlacement placement = Materialise(owners, {3, 9, 1, 9, 0}, Hosts(2, 2), {2, 2});
  for (size_t e = 0; e < 5; ++e) EXPECT_EQ(placement[e].holders.size(), e == 1 || e == 3 ? 3u : 0u);
}

TEST(Materialise, WithBudgetForAllItIsFullySharding) {
  const std::vector<int> owners = EvenOwners(6, 3);
  for (int memory : {4, 6, 100}) {  // Two of six are each rank's own.
    const ExpertPlacement placement = Materialise(owners, {0, 0, 5, 0, 1, 0}, Hosts(3, 1), {6, memory});
    for (const ExpertCopies& copies : placement) EXPECT_EQ(copies.holders.size(), 2u);
    EXPECT_EQ(MaterialisePerHost(owners, std::vector<int64_t>(18), Hosts(3, 1), {6, memory}), placement);
  }
  // Memory falls short: what has no load stays with its owner.
  const ExpertPlacement short_of_memory = Materialise(owners, {0, 0, 5, 0, 1, 0}, Hosts(3, 1), {6, 3});
  for (size_t e = 0; e < 6; ++e) EXPECT_EQ(short_of_memory[e].holders.size(), e == 2 || e == 4 ? 2u : 0u);
}

TEST(Materialise, ScarcePlacesGoInProportionToLoad) {
  // Seven copies in all for loads of 70, 20 and 10: 4 (no more ranks), 2 and 1.
  const ExpertPlacement placement = Materialise({0, 1, 2, 3}, {70, 20, 10, 0}, Hosts(4, 1), {3, 1});
  EXPECT_EQ(placement, (ExpertPlacement{{0, {1, 2, 3}}, {1, {0}}, {2, {}}, {3, {}}}));
}

TEST(Materialise, CopiesGoToHostsWithoutOneFirst) {
  // Two experts of equal load, one place on each of eight ranks: each gets four copies beside its own, two on a host.
  const ExpertPlacement placement = Materialise({0, 7}, {50, 50}, Hosts(2, 4), {2, 1});
  for (const ExpertCopies& copies : placement) {
    int first_host = copies.owner < 4;
    for (int holder : copies.holders) first_host += holder < 4;
    EXPECT_EQ(copies.holders.size(), 4u);
    EXPECT_TRUE(first_host == 2 || first_host == 3) << first_host;
  }
}

TEST(Materialise, FewerExpertsThanRanks) {
  const ExpertPlacement placement = Materialise({5, 2}, {90, 10}, Hosts(2, 4), {1, 1});
  EXPECT_EQ(placement[0].holders, (std::vector<int>{0, 1, 2, 3, 4, 6, 7}));
  EXPECT_TRUE(placement[1].holders.empty());
}

TEST(Materialise, StaysInBudgetAndUsesIt) {
  for (uint32_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const int ranks = 1 + static_cast<int>(random() % 16), experts = 1 + static_cast<int>(random() % 24);
    std::vector<int64_t> labels;
    for (int rank = 0; rank < ranks; ++rank) labels.push_back(random() % 4);
    const Topology topology = TopologyOf(labels);
    std::vector<int> owners;
    std::vector<int64_t> loads, loads_HE;
    for (int e = 0; e < experts; ++e) {
      owners.push_back(static_cast<int>(random() % static_cast<uint32_t>(ranks)));
      loads.push_back(random() % 4 == 0 ? 0 : 1 << random() % 14);
    }
    for (int i = 0; i < topology.hosts() * experts; ++i) loads_HE.push_back(random() % 100);
    const MaterialiseBudget budget = {static_cast<int>(random() % 10), static_cast<int>(random() % 6)};
    const ExpertPlacement placement = Materialise(owners, loads, topology, budget);
    ExpectFits(placement, owners, ranks, budget.memory);
    ExpectFits(MaterialisePerHost(owners, loads_HE, topology, budget), owners, ranks, budget.memory);
    EXPECT_TRUE(Materialise(owners, loads, topology, budget) == placement);
    int moved = 0;
    std::vector<int> held(static_cast<size_t>(ranks));
    for (const ExpertCopies& copies : placement) {
      moved += !copies.holders.empty();
      for (int holder : copies.holders) ++held[static_cast<size_t>(holder)];
    }
    EXPECT_LE(moved, budget.overlap);
    if (budget.memory == 0 || budget.overlap == 0) continue;
    // An expert that is materialised somewhere is not left out by a rank with room for it while a hotter one fits too.
    for (size_t e = 0; e < placement.size(); ++e) {
      for (size_t other = 0; other < placement.size(); ++other) {
        if (loads[e] <= loads[other] || placement[other].holders.empty()) continue;
        const bool everywhere = static_cast<int>(placement[e].holders.size()) == ranks - 1;
        EXPECT_TRUE(everywhere || placement[e].holders.size() + 2 >= placement[other].holders.size());
      }
      if (placement[e].holders.empty()) continue;
      for (int rank = 0; rank < ranks; ++rank) {
        EXPECT_TRUE(placement[e].On(rank) || held[static_cast<size_t>(rank)] == budget.memory);
      }
    }
  }
}

TEST(MaterialisePerHost, EachHostGetsWhatItsTokensUse) {
  // Hosts 0 and 1; expert 0 is used by host 0 alone, expert 3 by host 1 alone; their owners are on the other host.
  const std::vector<int> owners = {2, 0, 1, 0};
  const std::vector<int64_t> loads_HE = {90, 5, 5, 0, 0, 5, 5, 90};
  const ExpertPlacement placement = MaterialisePerHost(owners, loads_HE, Hosts(2, 2), {1, 1});
  EXPECT_EQ(placement, (ExpertPlacement{{2, {0, 1}}, {0, {}}, {1, {}}, {0, {2, 3}}}));
}

TEST(MaterialisePerHost, WhatTheHostHasAlreadyIsNotSentThere) {
  // Host 0 uses experts 0 and 1, its own, most; expert 2 is the hottest that must come from host 1.
  const std::vector<int> owners = {0, 1, 2, 3};
  const std::vector<int64_t> loads_HE = {50, 40, 30, 20, 0, 0, 50, 40};
  const ExpertPlacement placement = MaterialisePerHost(owners, loads_HE, Hosts(2, 2), {1, 3});
  EXPECT_EQ(placement, (ExpertPlacement{{0, {1}}, {1, {0}}, {2, {0, 1, 3}}, {3, {2}}}));
  // With one host all count.
  EXPECT_EQ(MaterialisePerHost({0, 1}, {9, 8}, Hosts(1, 2), {1, 1}), (ExpertPlacement{{0, {1}}, {1, {}}}));
}

TEST(MaterialisePerHost, KeepsMoreRowsOnTheirHostWhereTastesDiffer) {
  TraceOptions options;
  options.ranks = 16;
  options.experts = 32;
  options.choices = 2;
  options.tokens_per_rank = 1000;
  options.sigma = 0.5;
  options.taste_sigma = 1.0;
  options.taste_ranks = 4;
  const Topology topology = Hosts(4, 4);
  const std::vector<int> owners = EvenOwners(32, 16);
  const auto crossing = [&](const ExpertPlacement& placement, const std::vector<int64_t>& rows) {
    int64_t sum = 0;
    for (int64_t in : RowsOf(topology, SplitTokens(DispatchRule::kNearest, topology, placement, rows)).host_in) sum += in;
    return sum;
  };
  int64_t with_global = 0, with_per_host = 0;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    options.seed = seed;
    const std::vector<int64_t> rows = RoutingTrace(options).Rows(0);
    const ExpertPlacement global = Materialise(owners, ColumnSums(rows, 32), topology, {3, 3});
    const ExpertPlacement per_host = MaterialisePerHost(owners, SumByHost(topology, rows, 32), topology, {3, 3});
    with_global += crossing(global, rows);
    with_per_host += crossing(per_host, rows);
    EXPECT_LT(crossing(per_host, rows), crossing(global, rows)) << seed;
  }
  EXPECT_LT(with_per_host * 100, with_global * 85);
}

// Two-tier cluster of 4 hosts with 8 ranks; times of a layer of width 768 and hidden width 1536 on V100s with 100 Gb/s.
const LayerCosts kCosts = {100'000, 6'400, 154'000, 20'000'000, 472'000'000};

TraceOptions Skewed(double sigma, uint64_t seed) {
  TraceOptions options;
  options.ranks = 32;
  options.experts = 64;
  options.choices = 2;
  options.tokens_per_rank = 4096;
  options.sigma = sigma;
  options.seed = seed;
  return options;
}

int64_t LayerPs(const ExpertPlacement& placement, const std::vector<int64_t>& rows, const Topology& topology) {
  return StepPs(RowsOf(topology, SplitTokens(DispatchRule::kWaterFill, topology, placement, rows)), kCosts);
}

TEST(Materialise, BeatsExpertParallelismTheMoreTheGreaterTheSkew) {
  const Topology topology = Hosts(4, 8);
  const std::vector<int> owners = EvenOwners(64, 32);
  double last = 1.0;
  for (double sigma : {0.0, 0.5, 1.0, 1.5}) {
    double speedup = 0;
    for (uint64_t seed = 0; seed < 4; ++seed) {
      RoutingTrace trace(Skewed(sigma, seed));
      LoadWindow window(1, 64);
      int64_t plain = 0, materialised = 0;
      for (int step = 0; step < 10; ++step, trace.Advance()) {
        const std::vector<int64_t> rows = trace.Rows(0);
        if (step >= 5) {
          const ExpertPlacement placement = Materialise(owners, window.Predicted(0), topology, {3, 3});
          plain += LayerPs(OwnersOnly(owners), rows, topology);
          materialised += LayerPs(placement, rows, topology);
        }
        window.Add(ColumnSums(rows, 64));
      }
      speedup += static_cast<double>(plain) / static_cast<double>(materialised) / 4;
    }
    std::printf("sigma %.1f: a layer's step is %.2f times as fast\n", sigma, speedup);
    EXPECT_GE(speedup, last);
    last = speedup;
  }
  EXPECT_GT(last, 1.5);
}

TEST(Calibrate, SendsMoreOnlyIfItPays) {
  const Topology topology = Hosts(4, 8);
  const std::vector<int> owners = EvenOwners(64, 32);
  int paid = 0;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    const std::vector<int64_t> rows = RoutingTrace(Skewed(1.2, seed)).Rows(0);
    // Planned from another trace: all wrong.
    const std::vector<int64_t> predicted = ColumnSums(RoutingTrace(Skewed(1.2, seed + 100)).Rows(0), 64);
    const ExpertPlacement planned = Materialise(owners, predicted, topology, {2, 2});
    CalibrateOptions options{{4, 5}, DispatchRule::kWaterFill, {.layer = kCosts, .hidden_backward_ps = int64_t{1} << 60}};
    const Calibration calibration = Calibrate(planned, rows, topology, options);
    ExpectFits(calibration.placement, owners, 32, options.budget.memory);
    for (size_t e = 0; e < planned.size(); ++e) {
      for (int holder : planned[e].holders) EXPECT_TRUE(calibration.placement[e].On(holder));
    }
    EXPECT_EQ(calibration.gain_ps, LayerPs(planned, rows, topology) - LayerPs(calibration.placement, rows, topology));
    EXPECT_EQ(calibration.copies_ps, GatherPs(topology, planned, calibration.placement, kCosts));
    EXPECT_TRUE(calibration.gain_ps - calibration.copies_ps > LayerPs(planned, rows, topology) / 50 ||
                calibration.placement == planned);
    paid += calibration.gain_ps > 0;
    CalibrateOptions exposed = options;  // Gradients of more copies return with nothing beside them.
    exposed.costs.hidden_backward_ps = 0;
    const Calibration dearer = Calibrate(planned, rows, topology, exposed);
    EXPECT_LE(dearer.gain_ps - dearer.copies_ps, calibration.gain_ps - calibration.copies_ps);
    EXPECT_TRUE(dearer.placement == planned ||
                dearer.copies_ps >= GatherPs(topology, planned, dearer.placement, kCosts) +
                                        ReturnCopiesPs(topology, dearer.placement, exposed.costs) -
                                        ReturnCopiesPs(topology, planned, exposed.costs));
    exposed.costs.layer.expert_cross_ps = exposed.costs.layer.expert_send_ps = int64_t{1} << 50;
    EXPECT_TRUE(Calibrate(planned, rows, topology, exposed).placement == planned);
    options.budget = {4, 0};  // No memory left.
    EXPECT_TRUE(Calibrate(planned, rows, topology, options).placement == planned);
    options.budget = {0, 64};
    EXPECT_TRUE(Calibrate(planned, rows, topology, options).placement == planned);
  }
  EXPECT_GT(paid, 0);
}

}  // namespace
}  // namespace shoal
