#include "parallel/placement/dispatch.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <random>

#include "gtest/gtest.h"
#include "parallel/placement/layer_cost.h"

namespace shoal {
namespace {

struct Case {
  Topology topology;
  ExpertPlacement placement;
  std::vector<int64_t> rows;

  int64_t Rows(int source, int expert) const {
    return rows[static_cast<size_t>(source) * placement.size() + static_cast<size_t>(expert)];
  }
};

// `held_percent`: chance of a rank to hold an expert that it does not own.
Case RandomCase(int ranks, int experts, uint32_t held_percent, std::mt19937& random) {
  Case result;
  std::vector<int64_t> labels;
  const uint32_t hosts = 1 + random() % 5;
  for (int rank = 0; rank < ranks; ++rank) labels.push_back(random() % hosts);
  result.topology = TopologyOf(labels);
  for (int expert = 0; expert < experts; ++expert) {
    ExpertCopies copies{static_cast<int>(random() % static_cast<uint32_t>(ranks)), {}};
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank != copies.owner && random() % 100 < held_percent) copies.holders.push_back(rank);
    }
    result.placement.push_back(copies);
  }
  for (int i = 0; i < ranks * experts; ++i) result.rows.push_back(random() % 3 == 0 ? 0 : 1 << random() % 12);
  return result;
}

std::vector<int64_t> WorkOf(const Case& c, DispatchRule rule) {
  return RowsOf(c.topology, SplitTokens(rule, c.topology, c.placement, c.rows)).work;
}

int64_t LargestWork(const Case& c, DispatchRule rule) {
  const std::vector<int64_t> work = WorkOf(c, rule);
  return *std::max_element(work.begin(), work.end());
}

// Every row once, on a rank that holds the expert, as near as there is a copy; shares in order and not empty.
void ExpectValid(const Case& c, DispatchRule rule) {
  const std::vector<std::vector<DispatchShare>> shares = SplitTokens(rule, c.topology, c.placement, c.rows);
  ASSERT_EQ(static_cast<int>(shares.size()), c.topology.ranks());
  for (int source = 0; source < c.topology.ranks(); ++source) {
    std::vector<int64_t> sent(c.placement.size());
    int expert = 0;
    for (const DispatchShare& share : shares[static_cast<size_t>(source)]) {
      ASSERT_GE(share.expert, expert);
      expert = share.expert;
      ASSERT_GT(share.rows, 0);
      sent[static_cast<size_t>(expert)] += share.rows;
      const ExpertCopies& copies = c.placement[static_cast<size_t>(expert)];
      ASSERT_TRUE(copies.On(share.rank));
      ASSERT_TRUE(!copies.On(source) || share.rank == source);
      bool on_host = false;
      for (int rank : c.topology.RanksOf(c.topology.HostOf(source))) on_host |= copies.On(rank);
      ASSERT_TRUE(!on_host || c.topology.HostOf(share.rank) == c.topology.HostOf(source));
    }
    for (int e = 0; e < static_cast<int>(c.placement.size()); ++e) ASSERT_EQ(sent[static_cast<size_t>(e)], c.Rows(source, e));
  }
}

TEST(SplitTokens, EveryRowGoesOnceToTheNearestCopies) {
  const std::pair<int, int> shapes[] = {{1, 1}, {1, 8}, {2, 1}, {3, 8}, {5, 3}, {8, 8}, {7, 20}, {16, 64}, {64, 8}, {64, 256}};
  for (const auto& [ranks, experts] : shapes) {
    for (uint32_t held : {0u, 10u, 50u, 100u}) {
      for (uint32_t seed = 0; seed < (ranks * experts > 1000 ? 1 : 10); ++seed) {
        SCOPED_TRACE(testing::Message() << ranks << " ranks, " << experts << " experts, held " << held << ", seed " << seed);
        std::mt19937 random(seed);
        const Case c = RandomCase(ranks, experts, held, random);
        ExpectValid(c, DispatchRule::kNearest);
        ExpectValid(c, DispatchRule::kWaterFill);
        ExpectValid(c, DispatchRule::kNearestWhole);
        ExpectValid(c, DispatchRule::kWaterFillWhole);
        EXPECT_LE(LargestWork(c, DispatchRule::kWaterFill), LargestWork(c, DispatchRule::kNearest));
      }
    }
  }
}

TEST(SplitTokens, WholeRulesNeverSplitTheRowsOfASource) {
  int64_t nearest = 0, filled = 0;
  for (uint32_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const Case c = RandomCase(2 + static_cast<int>(random() % 12), 1 + static_cast<int>(random() % 20), 40, random);
    for (DispatchRule rule : {DispatchRule::kNearestWhole, DispatchRule::kWaterFillWhole}) {
      ASSERT_TRUE(IsWhole(rule));
      const auto shares = SplitTokens(rule, c.topology, c.placement, c.rows);
      for (size_t source = 0; source < shares.size(); ++source) {
        for (size_t i = 1; i < shares[source].size(); ++i) EXPECT_NE(shares[source][i].expert, shares[source][i - 1].expert);
      }
    }
    nearest += LargestWork(c, DispatchRule::kNearestWhole);
    filled += LargestWork(c, DispatchRule::kWaterFillWhole);
  }
  EXPECT_LT(filled, nearest);
}

TEST(SplitTokens, WholeParcelsGoRoundOrToTheEmptiestCopy) {
  // Copies on ranks 0 to 2; ranks 3 to 8 hold none.
  Case c{Topology::OneHost(9), ExpertPlacement(1, ExpertCopies{1, {0, 2}}), {0, 5, 0, 1, 2, 3, 4, 5, 6}};
  const auto target = [&](DispatchRule rule, size_t source) {
    return SplitTokens(rule, c.topology, c.placement, c.rows)[source].at(0).rank;
  };
  for (size_t source = 3; source < 9; ++source) EXPECT_EQ(target(DispatchRule::kNearestWhole, source), source % 3);
  const int filled[] = {0, 2, 1, 2, 0, 0};  // Of parcels of 6, 5, 4, 3, 2 and 1 rows, beside 5 rows that stay on rank 1.
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(target(DispatchRule::kWaterFillWhole, 8 - i), filled[i]) << i;
}

TEST(SplitTokens, NoRowsAreNoShares) {
  std::mt19937 random(1);
  Case c = RandomCase(6, 5, 40, random);
  std::fill(c.rows.begin(), c.rows.end(), 0);
  for (DispatchRule rule : {DispatchRule::kNearest, DispatchRule::kWaterFill, DispatchRule::kNearestWhole,
                            DispatchRule::kWaterFillWhole}) {
    for (const auto& shares : SplitTokens(rule, c.topology, c.placement, c.rows)) EXPECT_TRUE(shares.empty());
  }
  for (const auto& shares : SplitTokens(DispatchRule::kWaterFill, c.topology, {}, {})) EXPECT_TRUE(shares.empty());
}

TEST(SplitTokens, NearestSharesAreEqualAndTheExtraRowsGoRound) {
  // Copies on ranks 0 to 2; ranks 3 to 8 hold none and have 10 rows each for all six experts.
  Case c{Topology::OneHost(9), ExpertPlacement(6, ExpertCopies{1, {0, 2}}), std::vector<int64_t>(9 * 6, 10)};
  const auto shares = SplitTokens(DispatchRule::kNearest, c.topology, c.placement, c.rows);
  for (size_t source = 3; source < 9; ++source) {
    ASSERT_EQ(shares[source].size(), 18u);
    for (const DispatchShare& share : shares[source]) EXPECT_TRUE(share.rows == 3 || share.rows == 4);
  }
  const std::vector<int64_t> work = WorkOf(c, DispatchRule::kNearest);
  EXPECT_EQ(work[0], work[1]);
  EXPECT_EQ(work[1], work[2]);
}

TEST(SplitTokens, WaterFillingGivesMoreToTheEmptierCopy) {
  // Rank 0 has 100 rows of its own; rank 2's 60 rows may go to rank 0 or 1 and all go to rank 1.
  Case c{Topology::OneHost(3), {{0, {1}}}, {100, 0, 60}};
  EXPECT_EQ(WorkOf(c, DispatchRule::kNearest), (std::vector<int64_t>{130, 30, 0}));
  EXPECT_EQ(WorkOf(c, DispatchRule::kWaterFill), (std::vector<int64_t>{100, 60, 0}));
  c.rows = {10, 0, 61};
  EXPECT_EQ(WorkOf(c, DispatchRule::kWaterFill), (std::vector<int64_t>{35, 36, 0}));
}

TEST(SplitTokens, WaterFillingStaysOnTheHostEvenIfAnotherIsEmpty) {
  Case c{TopologyOf({0, 0, 1, 1}), {{0, {2}}}, {0, 50, 0, 10}};
  EXPECT_EQ(WorkOf(c, DispatchRule::kWaterFill), (std::vector<int64_t>{50, 0, 10, 0}));
}

// The least maximum over all splits that are allowed, by trying each.
int64_t BestLargestWork(const Case& c) {
  struct Part { int64_t rows; std::vector<int> targets; };
  std::vector<Part> parts;
  std::vector<int64_t> work(static_cast<size_t>(c.topology.ranks()));
  for (int e = 0; e < static_cast<int>(c.placement.size()); ++e) {
    const ExpertCopies& copies = c.placement[static_cast<size_t>(e)];
    for (int s = 0; s < c.topology.ranks(); ++s) {
      if (copies.On(s)) {
        work[static_cast<size_t>(s)] += c.Rows(s, e);
        continue;
      }
      Part part{c.Rows(s, e), {}};
      for (int near = 1; near >= 0 && part.targets.empty(); --near) {
        for (int r = 0; r < c.topology.ranks(); ++r) {
          if (copies.On(r) && (near == 0 || c.topology.HostOf(r) == c.topology.HostOf(s))) part.targets.push_back(r);
        }
      }
      if (part.rows > 0) parts.push_back(part);
    }
  }
  int64_t best = INT64_MAX;
  const std::function<void(size_t, size_t, int64_t)> place = [&](size_t i, size_t from, int64_t left) {
    if (i == parts.size()) {
      best = std::min(best, *std::max_element(work.begin(), work.end()));
      return;
    }
    if (left == 0) return place(i + 1, 0, i + 1 < parts.size() ? parts[i + 1].rows : 0);
    for (size_t t = from; t < parts[i].targets.size(); ++t) {
      ++work[static_cast<size_t>(parts[i].targets[t])];
      place(i, t, left - 1);
      --work[static_cast<size_t>(parts[i].targets[t])];
    }
  };
  place(0, 0, parts.empty() ? 0 : parts[0].rows);
  return best;
}

TEST(SplitTokens, WaterFillingIsNearlyTheBestSplitThereIs) {
  int64_t exact = 0, cases = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Case c = RandomCase(2 + static_cast<int>(random() % 3), 3, 40, random);
    for (int64_t& rows : c.rows) rows = random() % 4;
    const int64_t found = LargestWork(c, DispatchRule::kWaterFill), best = BestLargestWork(c);
    EXPECT_LE(found, best + 1);
    exact += found == best;
    ++cases;
  }
  EXPECT_GE(exact * 100, cases * 98) << exact << " of " << cases;
}

TEST(SplitTokens, TakesLittleTimeAtManyRanksAndExperts) {
  std::mt19937 random(3);
  const Case c = RandomCase(256, 256, 3, random);
  for (DispatchRule rule : {DispatchRule::kNearest, DispatchRule::kWaterFill}) {
    const auto start = std::chrono::steady_clock::now();
    size_t shares = 0;
    for (const auto& of_source : SplitTokens(rule, c.topology, c.placement, c.rows)) shares += of_source.size();
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    RecordProperty(rule == DispatchRule::kNearest ? "nearest_us" : "water_fill_us", static_cast<int>(ms * 1000));
    std::printf("256 ranks, 256 experts, rule %d: %zu shares in %.2f ms\n", static_cast<int>(rule), shares, ms);
    EXPECT_LT(ms, 2000);  // A sanity bound for slow and busy machines, not a measurement.
  }
}

}  // namespace
}  // namespace shoal
