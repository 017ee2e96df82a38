#include "parallel/schedule/profiler.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "parallel/schedule/profile_file.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

constexpr CostKey kExpertsKey{Op::kExperts, Phase::kForward, Lane::kCompute};
constexpr CostKey kInterKey{Op::kDispatch, Phase::kForward, Lane::kInter};
constexpr CostKey kIntraKey{Op::kDispatch, Phase::kForward, Lane::kIntra};

// Steps of a machine whose truth is known: tasks of one lane follow each other, lanes run side by side.
class Machine {
 public:
  explicit Machine(uint64_t seed) : random_(seed) {}

  CostModel experts{.fixed_ns = 30'000, .ns_per_unit = 200};
  CostModel inter{.fixed_ns = 80'000, .ns_per_unit = 0.8};
  double noise = 0.03;
  double preempted = 0;  // Share of tasks that take 5 ms more.
  int tasks = 12;
  double units_low = 1e5, units_high = 2e6;  // Of transfers.

  void Step(Profiler* profiler) {
    Graph graph;
    StepRecord record;
    std::array<int64_t, kLanes> now{};
    for (int i = 0; i < tasks; ++i) {
      Add(&graph, &record, &now, Lane::kCompute, Op::kExperts, experts, std::floor(Uniform(200, 2000)));
      Add(&graph, &record, &now, Lane::kInter, Op::kDispatch, inter, std::floor(Uniform(units_low, units_high)));
    }
    profiler->Add(graph, record);
  }
  double Uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

 private:
  void Add(Graph* graph, StepRecord* record, std::array<int64_t, kLanes>* now, Lane lane, Op op, const CostModel& truth,
           double units) {
    Task task;
    task.lane = lane;
    task.op = op;
    graph->tasks.push_back(task);
    double ns = truth.Predict(units) * (1 + noise * std::normal_distribution<double>()(random_));
    if (Uniform(0, 1) < preempted) ns += 5e6;
    int64_t& begin = (*now)[static_cast<size_t>(lane)];
    record->tasks.push_back({begin, begin + std::llround(ns), units});
    begin = record->tasks.back().end_ns;
  }
  std::mt19937_64 random_;
};

double RelativeError(const CostTable& table, const CostKey& key, const CostModel& truth, double units) {
  const auto found = table.models.find(key);
  if (found == table.models.end()) return 1;
  return std::abs(found->second.Predict(units) / truth.Predict(units) - 1);
}

TEST(Profiler, FindsFixedAndPerUnitCosts) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    Profiler profiler;
    for (int step = 0; step < 20; ++step) machine.Step(&profiler);
    const CostTable table = profiler.table();
    for (double units : {200.0, 1000.0, 2000.0}) EXPECT_LT(RelativeError(table, kExpertsKey, machine.experts, units), 0.03);
    for (double units : {1e5, 1e6, 2e6}) EXPECT_LT(RelativeError(table, kInterKey, machine.inter, units), 0.03);
    EXPECT_NEAR(table.models.at(kInterKey).fixed_ns, 80'000, 20'000);
    EXPECT_NEAR(profiler.prediction_error(), 0.025, 0.02);
    EXPECT_EQ(profiler.jumps(), 0);
    for (const CostEstimate& estimate : profiler.profile().costs) {
      EXPECT_NEAR(estimate.residual, 0.03, 0.015);
      EXPECT_EQ(estimate.samples, 20 * 12);
    }
  }
}

TEST(Profiler, IsNotMovedByPreemptedTasks) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    machine.preempted = 0.1;
    Profiler profiler;
    for (int step = 0; step < 20; ++step) machine.Step(&profiler);
    const CostTable table = profiler.table();
    for (double units : {400.0, 2000.0}) EXPECT_LT(RelativeError(table, kExpertsKey, machine.experts, units), 0.1);
    for (double units : {4e5, 2e6}) EXPECT_LT(RelativeError(table, kInterKey, machine.inter, units), 0.1);
  }
}

TEST(Profiler, FollowsALinkThatBecomesFourTimesSlowerAndBack) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    machine.noise = 0.1;
    Profiler profiler;
    for (int step = 0; step < 50; ++step) machine.Step(&profiler);
    for (double factor : {4.0, 0.25}) {
      const int64_t before = profiler.jumps();
      machine.inter.ns_per_unit *= factor;
      for (int step = 0; step < 6; ++step) machine.Step(&profiler);
      EXPECT_LT(RelativeError(profiler.table(), kInterKey, machine.inter, 1e6), 0.1);
      EXPECT_LT(RelativeError(profiler.table(), kExpertsKey, machine.experts, 1000), 0.1);
      EXPECT_EQ(profiler.jumps(), before + 1);
    }
  }
}

TEST(Profiler, FollowsWhatTakesNextToNothingWithoutSayingThatPlansAreWrong) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    machine.experts = {.fixed_ns = 100, .ns_per_unit = 1};  // A five-hundredth of what transfers take.
    Profiler profiler;
    for (int step = 0; step < 50; ++step) machine.Step(&profiler);
    machine.experts.ns_per_unit *= 4;
    for (int step = 0; step < 6; ++step) machine.Step(&profiler);
    EXPECT_LT(RelativeError(profiler.table(), kExpertsKey, machine.experts, 1000), 0.1);
    EXPECT_EQ(profiler.jumps(), 0);
  }
}

// Plans settle on one number of chunks, so that units hardly differ: what chunks of other sizes would take must not be lost.
TEST(Profiler, KeepsTheFixedPartWhenTheLinkChangesAndUnitsHardlyDiffer) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    machine.inter.fixed_ns = 400'000;
    Profiler profiler;
    for (int step = 0; step < 12; ++step) machine.Step(&profiler);
    machine.units_low = 9.8e5;
    machine.units_high = 1e6;
    for (double factor : {1.0, 4.0, 0.25}) {
      machine.inter.ns_per_unit *= factor;
      // Long after all samples of other units are forgotten, too.
      for (int steps : {6, 60}) {
        for (int step = 0; step < steps; ++step) machine.Step(&profiler);
        for (double units : {1e5, 2.5e5, 5e5, 1e6}) {
          EXPECT_LT(RelativeError(profiler.table(), kInterKey, machine.inter, units), 0.1) << factor << " " << units;
        }
      }
    }
    EXPECT_EQ(profiler.jumps(), 2);
  }
}

TEST(Profiler, FollowsAFixedPartThatChangesToo) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Machine machine(seed);
    Profiler profiler;
    for (int step = 0; step < 12; ++step) machine.Step(&profiler);
    for (double factor : {4.0, 0.25}) {
      machine.inter.ns_per_unit *= factor;
      machine.inter.fixed_ns *= factor;
      for (int step = 0; step < 8; ++step) machine.Step(&profiler);
      for (double units : {1e5, 1e6}) EXPECT_LT(RelativeError(profiler.table(), kInterKey, machine.inter, units), 0.1) << units;
      EXPECT_NEAR(profiler.table().models.at(kInterKey).fixed_ns / machine.inter.fixed_ns, 1, 0.25);
    }
    // Units that say nothing at first: right where they are, and everywhere when they differ again.
    machine.units_low = machine.units_high = 1e6;
    machine.inter = {.fixed_ns = 320'000, .ns_per_unit = 3.2};
    for (int step = 0; step < 8; ++step) machine.Step(&profiler);
    EXPECT_LT(RelativeError(profiler.table(), kInterKey, machine.inter, 1e6), 0.05);
    machine.units_low = 1e5;
    for (int step = 0; step < 8; ++step) machine.Step(&profiler);
    for (double units : {1e5, 1e6}) EXPECT_LT(RelativeError(profiler.table(), kInterKey, machine.inter, units), 0.1) << units;
  }
}

TEST(Profiler, OtherUnitsAreNoOtherLevel) {
  // Chunks of a fourth take half: what was not known is the fixed cost.
  const CostModel truth{.fixed_ns = 400'000, .ns_per_unit = 600};
  Profiler profiler;
  for (int step = 0; step < 12; ++step) {
    Graph graph;
    StepRecord record;
    int64_t now = 0;
    for (int i = 0; i < 4; ++i) {
      Task task;
      task.op = Op::kExperts;
      graph.tasks.push_back(task);
      const double units = step < 6 ? 2000 : 500;
      record.tasks.push_back({now, now + std::llround(truth.Predict(units)), units});
      now = record.tasks.back().end_ns;
    }
    profiler.Add(graph, record);
  }
  EXPECT_EQ(profiler.jumps(), 0);
  for (double units : {500.0, 1000.0, 2000.0}) EXPECT_LT(RelativeError(profiler.table(), kExpertsKey, truth, units), 0.03);
}

TEST(Profiler, FollowsSlowDrift) {
  Machine machine(1);
  Profiler profiler;
  for (int step = 0; step < 100; ++step) {
    machine.experts.ns_per_unit *= 1.01;
    machine.Step(&profiler);
  }
  EXPECT_LT(RelativeError(profiler.table(), kExpertsKey, machine.experts, 1000), 0.12);
}

// One number of units says nothing about what is fixed.
TEST(Profiler, TakesEqualUnitsForProportionalAndNeverGoesBelowZero) {
  Profiler profiler;
  std::mt19937_64 random(7);
  for (int step = 0; step < 20; ++step) {
    Graph graph;
    StepRecord record;
    for (int i = 0; i < 4; ++i) {
      Task task;
      task.op = i < 2 ? Op::kAttention : Op::kUpdate;
      task.phase = i < 2 ? Phase::kForward : Phase::kUpdate;
      graph.tasks.push_back(task);
      // The update's times fall with its units, which no line with non-negative parameters does.
      const double units = i < 2 ? 2048 : 1000 * (i - 1);
      record.tasks.push_back({0, i < 2 ? static_cast<int64_t>(1e6 + random() % 1000) : 100'000 / (i - 1), units});
    }
    profiler.Add(graph, record);
  }
  const CostTable table = profiler.table();
  const CostModel attention = table.models.at({Op::kAttention, Phase::kForward, Lane::kCompute});
  EXPECT_NEAR(attention.Predict(2048), 1e6, 2e3);
  EXPECT_NEAR(attention.fixed_ns, 0, 1e4);
  const CostModel update = table.models.at({Op::kUpdate, Phase::kUpdate, Lane::kCompute});
  EXPECT_GE(update.fixed_ns, 0);
  EXPECT_EQ(update.ns_per_unit, 0);
  EXPECT_GT(update.fixed_ns, 50'000);
  EXPECT_LT(update.fixed_ns, 100'000);
}

TEST(Profiler, TasksWithoutUnitsHaveAFixedCost) {
  Profiler profiler;
  Graph graph;
  graph.tasks.resize(1);
  graph.tasks[0].op = Op::kBalance;
  for (int step = 0; step < 3; ++step) profiler.Add(graph, {.begin_ns = 0, .end_ns = 5000, .tasks = {{0, 5000, 0}}});
  EXPECT_NEAR(profiler.table().Predict(graph.tasks[0], 0), 5000, 1);
}

// All of a transfer but that of the rank that came last is waiting.
TEST(Profiler, CountsTransfersFromTheLastRankAndComputationAsTheMean) {
  Graph graph;
  for (Lane lane : {Lane::kCompute, Lane::kInter}) {
    Task task;
    task.lane = lane;
    task.op = lane == Lane::kCompute ? Op::kExperts : Op::kDispatch;
    graph.tasks.push_back(task);
  }
  Profiler profiler;
  for (int step = 0; step < 4; ++step) {
    const MeasuredTimes a = TimesOf(graph, {.begin_ns = 0, .end_ns = 0, .tasks = {{0, 1'000'000, 1000}, {1'000'000, 5'000'000, 3e6}}});
    const MeasuredTimes b = TimesOf(graph, {.begin_ns = 0, .end_ns = 0, .tasks = {{0, 3'000'000, 3000}, {3'000'000, 5'000'000, 1e6}}});
    MeasuredTimes both = a;
    for (size_t i = 0; i < both.least.size(); ++i) both.least[i] = std::min(a.least[i], b.least[i]);
    for (size_t i = 0; i < both.total.size(); ++i) both.total[i] = a.total[i] + b.total[i];
    profiler.Add(graph, both, 2);
  }
  EXPECT_NEAR(profiler.table().Predict(graph.tasks[0], 2000), 2e6, 1e4);
  EXPECT_NEAR(profiler.table().Predict(graph.tasks[1], 3e6), 2e6, 1e4);
}

TEST(Profiler, FindsTheInterferenceOfTheTwoLanes) {
  for (double truth : {1.0, 1.6}) {
    Profiler profiler;
    std::mt19937_64 random(3);
    std::normal_distribution<double> normal;
    for (int step = 0; step < 24; ++step) {
      Graph graph;
      StepRecord record;
      int64_t now = 0;
      for (int i = 0; i < 12; ++i) {
        const double units = 1e5 * static_cast<double>(1 + random() % 10);
        const bool overlap = i % 2 == 0;
        const double ns = (50'000 + units) * (overlap ? truth : 1.0);
        for (Lane lane : {Lane::kIntra, Lane::kInter}) {
          Task task;
          task.op = Op::kDispatch;
          task.lane = lane;
          graph.tasks.push_back(task);
          const int64_t duration = std::llround(ns * (1 + 0.03 * normal(random)));
          record.tasks.push_back({now, now + duration, units});
          if (!overlap) now += duration;
        }
        now += std::llround(ns * 1.5);
      }
      profiler.Add(graph, record);
    }
    const CostTable table = profiler.table();
    EXPECT_NEAR(table.interference, truth, 0.06);
    for (const CostKey& key : {kInterKey, kIntraKey}) EXPECT_NEAR(table.models.at(key).Predict(5e5), 550'000, 25'000);
  }
}

TEST(Profiler, PriorKnowledgeIsUsedAndFades) {
  Machine machine(5);
  Profiler first;
  for (int step = 0; step < 20; ++step) machine.Step(&first);
  Profiler second;
  second.StartFrom(first.profile());
  EXPECT_LT(RelativeError(second.table(), kInterKey, machine.inter, 1e6), 0.03);
  machine.Step(&second);
  EXPECT_LT(second.prediction_error(), 0.05);
  machine.inter.ns_per_unit *= 3;  // Another network than last time.
  for (int step = 0; step < 6; ++step) machine.Step(&second);
  EXPECT_LT(RelativeError(second.table(), kInterKey, machine.inter, 1e6), 0.05);
}

TEST(ProfileFile, ReadsWhatItWrote) {
  Machine machine(5);
  Profiler profiler;
  for (int step = 0; step < 5; ++step) machine.Step(&profiler);
  const ProfileFile file{.about = "a model, 2 ranks", .profile = profiler.profile()};
  const auto back = ProfileFromJson(ToJson(file));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(ToJson(*back), ToJson(file));
  EXPECT_EQ(back->profile.costs.size(), 2u);
  const std::string text = ProfileText(*back);
  EXPECT_THAT(text, HasSubstr("a model, 2 ranks"));
  EXPECT_THAT(text, HasSubstr("ns/row"));
  EXPECT_THAT(text, HasSubstr("GB/s"));
}

TEST(ProfileFile, ErrorsNameTheField) {
  const auto error = [](std::string_view json) { return std::string(StdSv(ProfileFromJson(json).status().message())); };
  EXPECT_THAT(error("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error(R"({"version": 2})"), HasSubstr("`version`"));
  EXPECT_THAT(error(R"({"version": 1, "about": "x", "interference": 1, "costs": [{"op": "sleep"}]})"),
              HasSubstr("costs[0]: `op`: there is no \"sleep\""));
  EXPECT_THAT(error(R"({"version": 1, "about": "x", "interference": 1,
                        "costs": [{"op": "pack", "phase": "forward", "lane": "copy", "fixed_ns": -1}]})"),
              HasSubstr("costs[0]: `fixed_ns` must be a number of at least 0"));
}

}  // namespace
}  // namespace shoal
