#include "parallel/expert/expert_summary.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(SummariseExperts, CountsRowsCopiesAndBytes) {
  // Two hosts of two ranks; layer 0 is dense, layer 1 has four experts, of which expert 0 has a copy on
  // rank 2.
  Workload workload;
  workload.expert_weight_bytes = 10;
  workload.expert_gradient_bytes = 20;
  workload.experts_of_layer = {-1, 0};
  workload.experts = {{{{0, {2}}, {1, {}}, {2, {}}, {3, {}}},
                       {4, 0, 0, 0,     // Stay.
                        4, 2, 0, 0,     // 4 to rank 0, 2 stay.
                        4, 0, 0, 0,     // Stay at the copy.
                        4, 2, 0, 0}}};  // 4 to the copy on this host, 2 across.
  Graph graph;
  graph.tasks = {{.op = Op::kMaterialise, .layer = 1},
                 {.op = Op::kMaterialise, .layer = 1},
                 {.op = Op::kReduceExperts, .layer = 1}};
  const ExpertSummary summary = SummariseExperts(workload, Topology{{0, 0, 1, 1}}, graph);
  EXPECT_DOUBLE_EQ(summary.expert_max_over_mean, 16 / 5.0);
  EXPECT_DOUBLE_EQ(summary.hottest_expert, 16 / 5.0);
  EXPECT_DOUBLE_EQ(summary.rank_max_over_mean, 8 / 5.0);
  EXPECT_DOUBLE_EQ(summary.stay_rank, 10 / 20.0);
  EXPECT_DOUBLE_EQ(summary.stay_host, 18 / 20.0);
  EXPECT_DOUBLE_EQ(summary.copies_per_layer, 1);
  EXPECT_EQ(summary.weight_bytes, 20);
  EXPECT_EQ(summary.gradient_bytes, 20);
}

TEST(SummariseExperts, KnowsCopiesWithoutRows) {
  Workload workload;
  workload.experts_of_layer = {0};
  workload.experts = {{{{0, {1}}, {1, {0}}}, {}}};
  const ExpertSummary summary = SummariseExperts(workload, Topology::OneHost(2), {});
  EXPECT_DOUBLE_EQ(summary.copies_per_layer, 2);
  EXPECT_EQ(summary.rank_max_over_mean, 0);
  EXPECT_EQ(summary.stay_rank, 0);
}

}  // namespace
}  // namespace shoal
