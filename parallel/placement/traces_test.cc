#include "parallel/placement/traces.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "gtest/gtest.h"
#include "parallel/placement/layer_cost.h"

namespace shoal {
namespace {

TraceOptions Options(double sigma) {
  TraceOptions options;
  options.layers = 3;
  options.ranks = 8;
  options.experts = 64;
  options.choices = 2;
  options.tokens_per_rank = 4096;
  options.sigma = sigma;
  options.seed = 7;
  return options;
}

double LargestOverMean(const std::vector<int64_t>& loads) {
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  return static_cast<double>(*std::max_element(loads.begin(), loads.end())) * static_cast<double>(loads.size()) /
         static_cast<double>(total);
}

TEST(RoutingTrace, EveryRankRoutesEachTokenToDistinctExperts) {
  for (double sigma : {0.0, 1.0, 4.0}) {
    TraceOptions options = Options(sigma);
    options.choices = 3;
    options.experts = 5;
    RoutingTrace trace(options);
    for (int step = 0; step < 3; ++step, trace.Advance()) {
      for (int layer = 0; layer < options.layers; ++layer) {
        const std::vector<int64_t> rows = trace.Rows(layer);
        ASSERT_EQ(rows.size(), 8u * 5u);
        for (size_t s = 0; s < 8; ++s) {
          EXPECT_EQ(std::accumulate(&rows[s * 5], &rows[s * 5] + 5, int64_t{0}), 3 * 4096);
          EXPECT_LE(*std::max_element(&rows[s * 5], &rows[s * 5] + 5), 4096);
        }
      }
    }
  }
}

TEST(RoutingTrace, ASeedIsATrace) {
  RoutingTrace first(Options(1)), second(Options(1));
  TraceOptions other = Options(1);
  other.seed = 8;
  for (int step = 0; step < 5; ++step, first.Advance(), second.Advance()) {
    EXPECT_EQ(first.Rows(1), second.Rows(1));
    EXPECT_NE(first.Rows(1), first.Rows(2));
  }
  EXPECT_NE(RoutingTrace(Options(1)).Rows(0), RoutingTrace(other).Rows(0));
}

// The logarithms of loads have the standard deviation that was asked for, at the start and after many steps.
TEST(RoutingTrace, PopularityIsLogNormalAndStaysSo) {
  TraceOptions options = Options(1.0);
  options.experts = 256;
  options.tokens_per_rank = 1 << 20;
  options.rank_noise = 0;
  options.ranks = 1;
  options.layers = 8;
  options.drift = 0.2;
  RoutingTrace trace(options);
  for (int step = 0; step <= 60; ++step, trace.Advance()) {
    if (step % 20 != 0) continue;
    double sum = 0, squares = 0, count = 0;
    for (int layer = 0; layer < options.layers; ++layer) {
      const std::vector<int64_t> rows = trace.Rows(layer);
      double mean = 0;
      for (int64_t r : rows) mean += std::log(static_cast<double>(r)) / 256;
      for (int64_t r : rows) {
        const double x = std::log(static_cast<double>(r)) - mean;
        sum += x * x * x;
        squares += x * x;
        ++count;
      }
    }
    EXPECT_NEAR(std::sqrt(squares / count), 1.0, 0.08) << step;
    EXPECT_NEAR(sum / count, 0.0, 0.35) << step;  // No skew of the logarithm.
  }
}

TEST(RoutingTrace, DriftIsSlowAndZeroSigmaIsBalanced) {
  RoutingTrace trace(Options(1.0));
  const std::vector<int64_t> before = ColumnSums(trace.Rows(0), 64);
  EXPECT_GT(LargestOverMean(before), 3.0);
  trace.Advance();
  const std::vector<int64_t> after = ColumnSums(trace.Rows(0), 64);
  int64_t moved = 0;
  for (size_t e = 0; e < 64; ++e) moved += std::abs(before[e] - after[e]);
  EXPECT_LT(moved, 8 * 4096 * 2 / 5);  // Of the rows; both counted where they leave and where they arrive.
  EXPECT_GT(moved, 0);
  TraceOptions flat = Options(0.0);
  flat.rank_noise = 0;
  EXPECT_NEAR(LargestOverMean(ColumnSums(RoutingTrace(flat).Rows(0), 64)), 1.0, 0.01);
}

TEST(RoutingTrace, RanksOfATasteAgreeAndTastesDiffer) {
  TraceOptions options = Options(0.0);
  options.rank_noise = 0;
  options.taste_sigma = 1.0;
  options.taste_ranks = 4;
  const std::vector<int64_t> rows = RoutingTrace(options).Rows(0);
  const auto of_rank = [&](size_t rank) { return std::vector<int64_t>(&rows[rank * 64], &rows[rank * 64] + 64); };
  EXPECT_EQ(of_rank(0), of_rank(3));
  EXPECT_EQ(of_rank(4), of_rank(7));
  EXPECT_NE(of_rank(3), of_rank(4));
}

}  // namespace
}  // namespace shoal
