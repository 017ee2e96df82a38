#include "parallel/schedule/step_summary.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

struct Step {
  Graph graph;
  StepRecord record;
  int Add(Lane lane, int64_t begin, int64_t end, std::initializer_list<int> after = {}) {
    Task task;
    task.lane = lane;
    task.after.assign(after.begin(), after.end());
    graph.tasks.push_back(task);
    record.tasks.push_back({begin, end, 0});
    return static_cast<int>(graph.tasks.size()) - 1;
  }
};

TEST(Summarise, ASerialStepIsBusyAndOverhead) {
  Step step;
  step.record.begin_ns = 100;
  step.Add(Lane::kCompute, 110, 150);
  step.Add(Lane::kCompute, 155, 200);
  step.record.end_ns = 203;
  const StepSummary summary = Summarise(step.graph, step.record);
  EXPECT_EQ(summary.step_ns, 103);
  EXPECT_EQ(summary.busy_ns[0], 85);
  EXPECT_EQ(summary.exposed_ns, 0);
  EXPECT_EQ(summary.overhead_ns, 18);
}

TEST(Summarise, TasksOfWavesThatPartNeedNotRunInTheirOrder) {
  Step step;
  const int rows = step.Add(Lane::kInter, 0, 30);
  step.Add(Lane::kCompute, 30, 40, {rows});
  step.Add(Lane::kCompute, 0, 20);  // Another wave's.
  step.record.end_ns = 40;
  const StepSummary summary = Summarise(step.graph, step.record);
  EXPECT_EQ(summary.busy_ns[0], 30);
  EXPECT_EQ(summary.exposed_ns, 10);
  EXPECT_EQ(summary.overhead_ns, 0);
}

TEST(Summarise, WaitingForCommunicationIsExposedAndTheHandOverIsOverhead) {
  Step step;
  const int pack = step.Add(Lane::kCompute, 0, 10);
  const int inter = step.Add(Lane::kInter, 13, 40, {pack});
  const int intra = step.Add(Lane::kIntra, 12, 30, {pack});
  step.Add(Lane::kCompute, 10, 20);                 // Hides some of it.
  step.Add(Lane::kCompute, 46, 50, {inter, intra});  // Exposed from 20 to 40, late by 6.
  step.Add(Lane::kInter, 50, 60, {2});              // The end: the compute lane has nothing left to do.
  step.record.end_ns = 61;
  const StepSummary summary = Summarise(step.graph, step.record);
  EXPECT_EQ(summary.busy_ns[static_cast<size_t>(Lane::kCompute)], 24);
  EXPECT_EQ(summary.busy_ns[static_cast<size_t>(Lane::kInter)], 37);
  EXPECT_EQ(summary.busy_ns[static_cast<size_t>(Lane::kIntra)], 18);
  EXPECT_EQ(summary.exposed_ns, 30);
  EXPECT_EQ(summary.overhead_ns, 7);
}

TEST(Summarise, TimeInWhichNobodyWorksIsOverhead) {
  Step step;
  const int first = step.Add(Lane::kCompute, 0, 10);
  const int copy = step.Add(Lane::kCopy, 15, 20, {first});
  const int inter = step.Add(Lane::kInter, 25, 30, {copy});
  step.Add(Lane::kCompute, 30, 31, {inter});
  step.record.end_ns = 31;
  const StepSummary summary = Summarise(step.graph, step.record);
  EXPECT_EQ(summary.exposed_ns, 10);
  EXPECT_EQ(summary.overhead_ns, 10);
}

}  // namespace
}  // namespace shoal
