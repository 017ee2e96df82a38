#include "parallel/schedule/workload.h"

#include <gtest/gtest.h>

#include <random>

namespace shoal {
namespace {

Task Of(Op op, Lane lane, int layer, int chunk, Phase phase = Phase::kForward) {
  Task task;
  task.op = op;
  task.lane = lane;
  task.layer = layer;
  task.chunk = chunk;
  task.phase = phase;
  return task;
}

// Two hosts of two ranks, four experts, one each.
Workload OneExpertEach() {
  Workload work;
  work.tokens = {12};
  work.choices = 2;
  work.row_bytes = 10;
  work.expert_elements = 100;
  work.expert_weight_bytes = 200;
  work.expert_gradient_bytes = 400;
  work.bucket_elements = {8, 40};
  work.bucket_bytes = {32, 80};
  work.summary_bytes = 16;
  work.experts = {{.placement = OwnersOnly({0, 1, 2, 3})}};
  work.experts_of_layer = {0};
  return work;
}

TEST(ShareExperts, EvenRowsOfOneExpertEach) {
  const Workload work = OneExpertEach();
  for (const ExpertShare& share : ShareExperts(work, work.experts[0], {{0, 0, 1, 1}})) {
    EXPECT_DOUBLE_EQ(share.rows, 24);
    EXPECT_DOUBLE_EQ(share.stay, 6);
    EXPECT_DOUBLE_EQ(share.intra, 6);
    EXPECT_DOUBLE_EQ(share.inter, 12);
    EXPECT_DOUBLE_EQ(share.arrived, 24);
    EXPECT_DOUBLE_EQ(share.owned, 1);
    EXPECT_DOUBLE_EQ(share.copies, 0);
  }
}

TEST(ShareExperts, ARankWithMoreTokensSendsMore) {
  Workload work = OneExpertEach();
  work.tokens = {12, 0};
  work.experts[0].placement = OwnersOnly({0, 1});
  const auto shares = ShareExperts(work, work.experts[0], Topology::OneHost(2));
  EXPECT_DOUBLE_EQ(shares[0].rows, 24);
  EXPECT_DOUBLE_EQ(shares[0].stay, 12);
  EXPECT_DOUBLE_EQ(shares[0].intra, 12);
  EXPECT_DOUBLE_EQ(shares[1].rows, 0);
  EXPECT_DOUBLE_EQ(shares[1].intra, 12);
  EXPECT_DOUBLE_EQ(shares[1].arrived, 12);
}

TEST(ShareExperts, CopiesAreCountedAlongTheTree) {
  Workload work = OneExpertEach();
  // Expert 0: owner 0, everywhere. Expert 1: owner 1, also on 3. Experts 2 and 3 stay alone.
  work.experts[0].placement[0].holders = {1, 2, 3};
  work.experts[0].placement[1].holders = {3};
  const auto shares = ShareExperts(work, work.experts[0], {{0, 0, 1, 1}});
  EXPECT_DOUBLE_EQ(shares[0].copies, 2);  // To rank 1 and to the leader of the other host.
  EXPECT_DOUBLE_EQ(shares[1].copies, 1);  // Receives one, sends one.
  EXPECT_DOUBLE_EQ(shares[2].copies, 1);  // Leads for expert 0: receives it and hands it on.
  EXPECT_DOUBLE_EQ(shares[3].copies, 2);
}

// What spreads evenly is what the dispatcher does with equal rows.
TEST(ShareExperts, EvenRowsAgreeWithTheDispatcher) {
  const Topology topology = {{0, 0, 0, 1, 1, 2}};
  for (int seed = 0; seed < 20; ++seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    Workload work = OneExpertEach();
    ExpertPlacement placement;
    for (int e = 0; e < 5; ++e) {
      ExpertCopies copies{static_cast<int>(random() % 6), {}};
      for (int rank = 0; rank < 6; ++rank) {
        if (rank != copies.owner && random() % 3 == 0) copies.holders.push_back(rank);
      }
      placement.push_back(copies);
    }
    // A multiple of every number of copies, so that all splits are whole.
    work.tokens = {5 * 60};
    const auto even = ShareExperts(work, {placement, {}}, topology);
    const auto split = ShareExperts(work, {placement, std::vector<int64_t>(30, 120)}, topology);
    for (size_t rank = 0; rank < 6; ++rank) {
      EXPECT_NEAR(even[rank].stay, split[rank].stay, 1e-6) << "seed " << seed << " rank " << rank;
      EXPECT_NEAR(even[rank].arrived, split[rank].arrived, 1e-6) << "seed " << seed << " rank " << rank;
      EXPECT_NEAR(even[rank].intra, split[rank].intra, 1e-6) << "seed " << seed << " rank " << rank;
      EXPECT_NEAR(even[rank].inter, split[rank].inter, 1e-6) << "seed " << seed << " rank " << rank;
      EXPECT_EQ(even[rank].copies, split[rank].copies);
    }
  }
}

TEST(StepUnits, CountsEachTaskAsItsCostModelDoes) {
  const Workload work = OneExpertEach();
  const Topology topology = {{0, 0, 1, 1}};
  const StepUnits units(work, topology);
  Schedule schedule;
  schedule.layers = {{.forward_chunks = 2, .backward_chunks = 3}};
  schedule.gradients = {{.bucket = 1, .begin = 0, .count = 30}};
  const auto of = [&](const Task& task) { return units.Of(task, schedule, 1); };
  EXPECT_DOUBLE_EQ(of(Of(Op::kGather, Lane::kInter, -1, 1)), 80);
  EXPECT_DOUBLE_EQ(of(Of(Op::kAttention, Lane::kCompute, 0, -1)), 12);
  EXPECT_DOUBLE_EQ(of(Of(Op::kExchange, Lane::kControl, 0, -1)), 64);
  EXPECT_DOUBLE_EQ(of(Of(Op::kPack, Lane::kCompute, 0, 1)), 12);
  EXPECT_DOUBLE_EQ(of(Of(Op::kPack, Lane::kCompute, 0, 1, Phase::kBackward)), 8);
  EXPECT_DOUBLE_EQ(of(Of(Op::kDispatch, Lane::kInter, 0, 0)), 60);
  EXPECT_DOUBLE_EQ(of(Of(Op::kReturn, Lane::kIntra, 0, 0, Phase::kBackward)), 20);
  EXPECT_DOUBLE_EQ(of(Of(Op::kDispatch, Lane::kInter, 0, 1, Phase::kRecompute)), 60);
  EXPECT_DOUBLE_EQ(of(Of(Op::kStay, Lane::kCopy, 0, 0)), 30);
  EXPECT_DOUBLE_EQ(of(Of(Op::kExperts, Lane::kCompute, 0, 0)), 12);
  EXPECT_DOUBLE_EQ(of(Of(Op::kNorm, Lane::kCompute, -1, -1)), 2 + 10 + 100);
  EXPECT_DOUBLE_EQ(of(Of(Op::kUpdate, Lane::kCompute, -1, 1)), 10);
  EXPECT_DOUBLE_EQ(of(Of(Op::kUpdate, Lane::kCompute, 0, -1)), 100);
  Task reduce = Of(Op::kReduce, Lane::kInter, -1, 1, Phase::kBackward);
  reduce.slice = 0;
  EXPECT_DOUBLE_EQ(of(reduce), 120);
}

TEST(StepUnits, WavesAreWholeSequences) {
  Workload work = OneExpertEach();
  work.sequence_tokens = 4;  // Three sequences: two waves of 8 and 4 tokens.
  const StepUnits units(work, {{0, 0, 1, 1}});
  Schedule schedule;
  schedule.layers = {{.forward_chunks = 2, .backward_chunks = 1}};
  schedule.waves = 2;
  const auto of = [&](Task task, int wave) {
    task.wave = wave;
    return units.Of(task, schedule, 0);
  };
  EXPECT_DOUBLE_EQ(of(Of(Op::kAttention, Lane::kCompute, 0, -1), 0), 8);
  EXPECT_DOUBLE_EQ(of(Of(Op::kAttention, Lane::kCompute, 0, -1), 1), 4);
  EXPECT_DOUBLE_EQ(of(Of(Op::kPack, Lane::kCompute, 0, 1), 0), 8);  // Of 24 rows.
  EXPECT_DOUBLE_EQ(of(Of(Op::kPack, Lane::kCompute, 0, 1), 1), 4);
  EXPECT_DOUBLE_EQ(of(Of(Op::kExperts, Lane::kCompute, 0, 0, Phase::kBackward), 1), 8);
}

TEST(StepUnits, EveryRankIsTheLargestOfAll) {
  Workload work = OneExpertEach();
  work.tokens = {12, 4};
  work.experts[0].placement = OwnersOnly({0, 1, 1});
  const Topology topology = Topology::OneHost(2);
  const StepUnits units(work, topology);
  Schedule schedule;
  schedule.layers.resize(1);
  for (const Task& task : {Of(Op::kAttention, Lane::kCompute, 0, -1), Of(Op::kDispatch, Lane::kIntra, 0, 0),
                           Of(Op::kExperts, Lane::kCompute, 0, 0), Of(Op::kUpdate, Lane::kCompute, 0, -1)}) {
    EXPECT_DOUBLE_EQ(units.Of(task, schedule, StepUnits::kEveryRank),
                     std::max(units.Of(task, schedule, 0), units.Of(task, schedule, 1)));
  }
  EXPECT_NE(units.KeyOfRank(0), units.KeyOfRank(1));
}

TEST(DescribeTraffic, SaysWhetherRowsAndWeightsTravel) {
  Workload work = OneExpertEach();
  StepShape shape;
  DescribeTraffic(work, {{0, 0, 1, 1}}, &shape);
  EXPECT_TRUE(shape.dispatch && shape.intra && shape.inter && !shape.materialise);
  work.experts[0].placement = GroupedPlacement(1, 4, 2, 1)[0];
  DescribeTraffic(work, Topology::OneHost(2), &shape);
  EXPECT_TRUE(!shape.dispatch && shape.intra && !shape.inter && shape.materialise);
  EXPECT_EQ(shape.ranks, 2);
}

}  // namespace
}  // namespace shoal
