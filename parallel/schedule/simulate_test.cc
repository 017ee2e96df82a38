#include "parallel/schedule/simulate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <random>

#include "parallel/placement/traces.h"
#include "parallel/schedule/step_graph.h"

namespace shoal {
namespace {

Task Of(Op op, Lane lane, double units, std::vector<int> after) {
  Task task;
  task.op = op;
  task.lane = lane;
  task.units = units;
  task.after.assign(after.begin(), after.end());
  return task;
}

// A nanosecond a unit, whatever the task.
CostTable UnitCosts() {
  CostTable costs;
  for (int op = 0; op < kOps; ++op) {
    for (int phase = 0; phase < 4; ++phase) {
      for (int lane = 0; lane < kLanes; ++lane) {
        costs.models[{static_cast<Op>(op), static_cast<Phase>(phase), static_cast<Lane>(lane)}] = {0, 1};
      }
    }
  }
  return costs;
}

TEST(SimulateAlike, RunsLanesInOrderAndTasksWhenReady) {
  Graph graph;
  graph.tasks = {Of(Op::kPack, Lane::kCompute, 10, {}),     Of(Op::kDispatch, Lane::kInter, 30, {0}),
                 Of(Op::kPack, Lane::kCompute, 5, {}),      Of(Op::kDispatch, Lane::kInter, 30, {2}),
                 Of(Op::kExperts, Lane::kCompute, 20, {1}), Of(Op::kExperts, Lane::kCompute, 20, {3})};
  const Prediction got = SimulateAlike(graph, FlatCosts(UnitCosts()), Record::kYes);
  EXPECT_DOUBLE_EQ(got.step_ns, 90);  // 10 + 30 + 30 + 20.
  EXPECT_EQ(got.record.tasks[3].begin_ns, 40);
  EXPECT_EQ(got.record.tasks[4].begin_ns, 40);
  EXPECT_EQ(got.record.tasks[5].begin_ns, 70);
  EXPECT_DOUBLE_EQ(got.busy_ns[0], 55);
  EXPECT_DOUBLE_EQ(got.busy_ns[static_cast<size_t>(Lane::kInter)], 60);
  EXPECT_DOUBLE_EQ(got.exposed_ns, 35);  // From 15 to 40 and from 60 to 70.
}

TEST(SimulateAlike, WavesThatPartDoNotWaitForEachOther) {
  Graph graph;
  graph.tasks = {Of(Op::kDispatch, Lane::kInter, 10, {}), Of(Op::kExperts, Lane::kCompute, 10, {0}),
                 Of(Op::kAttention, Lane::kCompute, 10, {}), Of(Op::kRoute, Lane::kCompute, 10, {1})};
  for (size_t i = 0; i < 4; ++i) graph.tasks[i].wave = i == 2 ? 1 : 0;
  const FlatCosts costs(UnitCosts());
  EXPECT_EQ(SimulateAlike(graph, costs, Record::kNo).step_ns, 40);
  graph.waves_apart = true;
  const Prediction prediction = SimulateAlike(graph, costs, Record::kYes);
  EXPECT_EQ(prediction.step_ns, 30);
  EXPECT_EQ(prediction.record.tasks[2].begin_ns, 0);
}

TEST(SimulateAlike, CommunicationSlowsOtherCommunication) {
  Graph graph;
  graph.tasks = {Of(Op::kDispatch, Lane::kIntra, 10, {}), Of(Op::kDispatch, Lane::kInter, 20, {})};
  CostTable costs = UnitCosts();
  costs.interference = 1.5;
  const Prediction got = SimulateAlike(graph, FlatCosts(costs), Record::kYes);
  // Both run at 2/3 until 15; then 10 are left of the second.
  EXPECT_EQ(got.record.tasks[0].end_ns, 15);
  EXPECT_DOUBLE_EQ(got.step_ns, 25);
}

TEST(SimulateAlike, EqualsTheLongestPathWithoutInterference) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    Graph graph;
    std::vector<double> ends;
    std::array<double, kLanes> lane_free = {};
    for (int i = 0; i < 200; ++i) {
      std::vector<int> after;
      for (int k = 0; k < 3 && i > 0; ++k) after.push_back(static_cast<int>(random() % static_cast<unsigned>(i)));
      const Lane lane = static_cast<Lane>(random() % kLanes);
      graph.tasks.push_back(Of(Op::kPack, lane, static_cast<double>(random() % 7), after));
      double& free = lane_free[static_cast<size_t>(lane)];
      for (int before : after) free = std::max(free, ends[static_cast<size_t>(before)]);
      free += graph.tasks.back().units;
      ends.push_back(free);
    }
    const Prediction got = SimulateAlike(graph, FlatCosts(UnitCosts()), Record::kYes);
    EXPECT_DOUBLE_EQ(got.step_ns, *std::max_element(ends.begin(), ends.end())) << "seed " << seed;
    for (size_t i = 0; i < ends.size(); ++i)
      ASSERT_EQ(got.record.tasks[i].end_ns, static_cast<int64_t>(ends[i])) << "seed " << seed;
  }
}

struct Case {
  StepShape shape;
  Workload work;
  Schedule schedule;
  Graph graph;
};

Case MakeCase(int layers, int chunks, const Topology& topology, int experts, int group) {
  Case c;
  c.shape.layers.resize(static_cast<size_t>(layers));
  c.work.tokens = {600};
  c.work.choices = 2;
  c.work.row_bytes = 4;
  c.work.expert_elements = 100;
  c.work.expert_weight_bytes = c.work.expert_gradient_bytes = 400;
  c.work.experts = {{.placement = GroupedPlacement(1, experts, topology.ranks(), group)[0]}};
  c.work.experts_of_layer.assign(static_cast<size_t>(layers), 0);
  c.work.bucket_elements.assign(static_cast<size_t>(c.shape.buckets().count()), 1000);
  c.work.bucket_bytes.assign(c.work.bucket_elements.size(), 4000);
  DescribeTraffic(c.work, topology, &c.shape);
  c.schedule = PlainSchedule(c.shape, c.work.bucket_elements);
  for (LayerSchedule& layer : c.schedule.layers) layer = {chunks, chunks};
  c.graph = EmitStep(c.shape, c.schedule);
  return c;
}

TEST(SimulateCluster, ABalancedClusterIsOneRank) {
  const Topology topology = {{0, 0, 1, 1}};
  Case c = MakeCase(3, 2, topology, 4, 4);
  CostTable costs = UnitCosts();
  costs.interference = 1.4;
  const StepUnits units(c.work, topology);
  const auto cluster = SimulateCluster(c.graph, FlatCosts(costs), c.schedule, units, topology, Record::kYes);
  ASSERT_EQ(cluster.classes.size(), 1u);
  EXPECT_EQ(cluster.classes[0].ranks, 4);
  FillUnits(c.work, topology, c.schedule, 0, &c.graph);
  const Prediction alone = SimulateAlike(c.graph, FlatCosts(costs), Record::kYes);
  EXPECT_NEAR(cluster.step_ns, alone.step_ns, 1e-6 * alone.step_ns);
  EXPECT_NEAR(cluster.classes[0].prediction.exposed_ns, alone.exposed_ns, 1e-6 * alone.step_ns);
  for (size_t i = 0; i < c.graph.tasks.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(cluster.classes[0].prediction.record.tasks[i].end_ns),
                static_cast<double>(alone.record.tasks[i].end_ns), 1.0)
        << Name(c.graph.tasks[i]);
  }
}

TEST(SimulateCluster, CommunicationWaitsForTheSlowestRank) {
  const Topology topology = Topology::OneHost(2);
  Case c = MakeCase(1, 1, topology, 2, 2);
  c.work.experts[0].rows = {900, 300, 900, 300};  // Expert 0 has three times the rows.
  const StepUnits units(c.work, topology);
  const auto got = SimulateCluster(c.graph, FlatCosts(UnitCosts()), c.schedule, units, topology, Record::kYes);
  ASSERT_EQ(got.classes.size(), 2u);
  EXPECT_EQ(got.slowest().first_rank, 0);
  for (size_t i = 0; i < c.graph.tasks.size(); ++i) {
    const TaskRecord& a = got.classes[0].prediction.record.tasks[i];
    const TaskRecord& b = got.classes[1].prediction.record.tasks[i];
    if (c.graph.tasks[i].lane == Lane::kIntra || c.graph.tasks[i].lane == Lane::kControl) {
      EXPECT_EQ(a.begin_ns, b.begin_ns) << Name(c.graph.tasks[i]);
      EXPECT_EQ(a.end_ns, b.end_ns) << Name(c.graph.tasks[i]);
    }
    if (c.graph.tasks[i].op == Op::kExperts) {
      EXPECT_EQ(a.end_ns - a.begin_ns, 1800);
      EXPECT_EQ(b.end_ns - b.begin_ns, 600);
    }
  }
  EXPECT_GT(got.classes[1].prediction.exposed_ns + 1, got.classes[0].prediction.exposed_ns);
}

// 100 of computation: at full rate until 10, at 3/4 while 40 are sent (30 done by 50), then 60 at full rate.
TEST(SimulateAlike, CommunicationSlowsComputation) {
  Graph graph;
  graph.tasks = {Of(Op::kPack, Lane::kCompute, 10, {}), Of(Op::kDispatch, Lane::kInter, 40, {0}),
                 Of(Op::kExperts, Lane::kCompute, 90, {})};
  CostTable costs = UnitCosts();
  costs.compute_share[static_cast<size_t>(Lane::kInter)] = 0.25;
  const Prediction got = SimulateAlike(graph, FlatCosts(costs), Record::kYes);
  EXPECT_EQ(got.record.tasks[1].end_ns, 50);
  EXPECT_DOUBLE_EQ(got.step_ns, 110);
  EXPECT_DOUBLE_EQ(got.exposed_ns, 0);
}

// A lane that would take all of it leaves some.
TEST(SimulateAlike, ComputationAlwaysGoesOn) {
  Graph graph;
  graph.tasks = {Of(Op::kDispatch, Lane::kInter, 40, {}), Of(Op::kExperts, Lane::kCompute, 22, {})};
  CostTable costs = UnitCosts();
  costs.compute_share[static_cast<size_t>(Lane::kInter)] = 3;
  EXPECT_DOUBLE_EQ(SimulateAlike(graph, FlatCosts(costs), Record::kNo).step_ns, 60);  // 2 of the 22 by 40.
}

// Ranks that all do the same take as long as one of them, also where communication slows computation.
TEST(SimulateCluster, CommunicationSlowsComputation) {
  const Topology topology = {{0, 0, 1, 1}};
  const Case c = MakeCase(3, 2, topology, 4, 4);
  CostTable costs = UnitCosts();
  for (auto& [key, model] : costs.models) model.ns_per_unit = key.lane == Lane::kCompute ? 20 : 1;
  const StepUnits units(c.work, topology);
  const double without = SimulateCluster(c.graph, FlatCosts(costs), c.schedule, units, topology, Record::kNo).step_ns;
  costs.compute_share[static_cast<size_t>(Lane::kInter)] = 0.2;
  costs.compute_share[static_cast<size_t>(Lane::kIntra)] = 0.1;
  const double with = SimulateCluster(c.graph, FlatCosts(costs), c.schedule, units, topology, Record::kNo).step_ns;
  Graph graph = c.graph;
  for (Task& task : graph.tasks) task.units = units.Of(task, c.schedule, 0);
  EXPECT_GT(with, without);
  EXPECT_NEAR(with, SimulateAlike(graph, FlatCosts(costs), Record::kNo).step_ns, 1e-6 * with);
}

// Ranks that are simulated once must come out as if each had been simulated.
TEST(SimulateCluster, ClassesAreInvisible) {
  const Topology topology = {{0, 0, 1, 1, 2, 2}};
  Case c = MakeCase(2, 2, topology, 6, 6);
  c.work.experts[0].rows.clear();
  const int64_t load[6] = {500, 100, 200, 200, 150, 50};
  for (int source = 0; source < 6; ++source) c.work.experts[0].rows.insert(c.work.experts[0].rows.end(), load, load + 6);
  CostTable costs = UnitCosts();
  costs.interference = 1.3;
  const StepUnits units(c.work, topology);
  const auto alike = SimulateCluster(c.graph, FlatCosts(costs), c.schedule, units, topology, Record::kNo);
  // A token more or less on each rank tells all ranks apart and changes times by as little.
  c.work.tokens = {600, 601, 602, 603, 604, 605};
  const StepUnits apart(c.work, topology);
  const auto each = SimulateCluster(c.graph, FlatCosts(costs), c.schedule, apart, topology, Record::kNo);
  EXPECT_EQ(each.classes.size(), 6u);
  EXPECT_LT(alike.classes.size(), 6u);
  EXPECT_NEAR(each.step_ns, alike.step_ns, 0.02 * alike.step_ns);
}

TEST(SimulateCluster, SixteenThousandRanksInSeconds) {
  Topology topology;
  for (int rank = 0; rank < 16384; ++rank) topology.host_of_rank.push_back(rank / 8);
  Case c = MakeCase(8, 2, topology, 64, 64);
  const StepUnits units(c.work, topology);
  const auto begin = std::chrono::steady_clock::now();
  const auto got = SimulateCluster(c.graph, FlatCosts(UnitCosts()), c.schedule, units, topology, Record::kNo);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  EXPECT_EQ(got.rank_count, 16384);
  EXPECT_LE(got.classes.size(), 32u);
}

}  // namespace
}  // namespace shoal
