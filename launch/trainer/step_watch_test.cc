#include "launch/trainer/step_watch.h"

#include <chrono>
#include <cmath>
#include <map>
#include <mutex>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "launch/trainer/trace.h"
#include "nlohmann/json.hpp"
#include "parallel/schedule/profile_file.h"
#include "parallel/schedule/step_graph.h"
#include "runtime/files/file.h"
#include "tests/harness/ranks.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using Json = nlohmann::json;
using ::shoal::testing::TempDir;
using ::testing::HasSubstr;

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Graph TwoRankStep() {
  StepShape shape;
  shape.layers = {{}, {.moe = false}};
  shape.ranks = 2;
  shape.intra = shape.dispatch = true;
  return EmitStep(shape, PlainSchedule(shape, std::vector<int64_t>(static_cast<size_t>(shape.buckets().count()), 10)));
}

// Runs the graph on this rank with empty bodies.
StepRecord RunStep(Executor& executor, const Graph& graph, int rank) {
  StepRecord record;
  const auto body = [&](const Task&) -> absl::StatusOr<double> { return 100.0 + rank; };
  EXPECT_TRUE(executor.Run(graph, body, nullptr, &record).ok());
  return record;
}

TEST(ClockOffset, FindsHowFarClocksAreApart) {
  RunRanks(3, "auto", [](Communicator& world) {
    const int64_t ahead = 1'000'000'000 * world.index();
    const int64_t begin = NowNs();
    const auto offset = ClockOffset(world, [&] { return NowNs() + ahead; });
    ASSERT_TRUE(offset.ok()) << offset.status();
    // No question takes longer than all of them.
    EXPECT_NEAR(static_cast<double>(*offset), static_cast<double>(-ahead), static_cast<double>(NowNs() - begin));
  });
}

TEST(StepWatch, RankZeroWritesTheProfileAndAllRanksGoOnFromIt) {
  const TempDir folder;
  const Graph graph = TwoRankStep();
  RunRanks(2, "auto", [&](Communicator& world) {
    Profiler profiler;
    auto watch = StepWatch::Create({.run_dir = folder.path(), .about = "this"}, world, profiler);
    ASSERT_TRUE(watch.ok()) << watch.status();
    Executor executor;
    for (int64_t step = 0; step < 4; ++step) {
      const StepRecord record = RunStep(executor, graph, world.index());
      profiler.Add(graph, record);
      ASSERT_TRUE((*watch)->AfterStep(step, graph, record).ok());
      EXPECT_EQ((*watch)->predicted_seconds() > 0, step > 0);
    }
    ASSERT_TRUE((*watch)->Finish().ok());
  });
  const auto text = ReadFile(ProfilePath(folder.path()));
  ASSERT_TRUE(text.ok()) << text.status();
  const auto file = ProfileFromJson(*text);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->about, "this");
  EXPECT_GT(file->profile.costs.size(), 10u);

  std::mutex mutex;
  std::vector<std::string> profiles;
  RunRanks(2, "auto", [&](Communicator& world) {
    Profiler same, other;
    ASSERT_TRUE(StepWatch::Create({.run_dir = folder.path(), .about = "this"}, world, same).ok());
    ASSERT_TRUE(StepWatch::Create({.run_dir = folder.path(), .about = "that"}, world, other).ok());
    EXPECT_TRUE(other.table().models.empty());
    const std::lock_guard<std::mutex> lock(mutex);
    profiles.push_back(ToJson({.about = "this", .profile = same.profile()}));
  });
  ASSERT_EQ(profiles.size(), 2u);
  EXPECT_EQ(profiles[0], profiles[1]);
  const auto begun = ProfileFromJson(profiles[0]);
  ASSERT_TRUE(begun.ok()) << begun.status();
  EXPECT_EQ(begun->profile.costs.size(), file->profile.costs.size());
}

TEST(StepWatch, TracesHaveAllRanksOnOneClockBesideThePrediction) {
  const TempDir folder;
  const Graph graph = TwoRankStep();
  RunRanks(2, "auto", [&](Communicator& world) {
    Profiler profiler;
    auto watch = StepWatch::Create({.run_dir = folder.path(), .about = "this", .trace_steps = {1}}, world, profiler);
    ASSERT_TRUE(watch.ok()) << watch.status();
    Executor executor;
    for (int64_t step = 0; step < 3; ++step) {
      const StepRecord record = RunStep(executor, graph, world.index());
      profiler.Add(graph, record);
      ASSERT_TRUE((*watch)->AfterStep(step, graph, record).ok());
    }
  });
  for (int64_t step : {0, 2}) EXPECT_TRUE(absl::IsNotFound(ReadFile(TracePath(folder.path(), step)).status()));
  const auto text = ReadFile(TracePath(folder.path(), 1));
  ASSERT_TRUE(text.ok()) << text.status();
  const Json trace = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(trace.is_object());
  std::map<int, size_t> tasks;
  std::map<std::pair<int, int>, double> ends;
  for (const Json& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X") continue;
    const int pid = event.at("pid"), tid = event.at("tid");
    ++tasks[pid];
    if (pid < 2) {
      EXPECT_EQ(event.at("args").at("units"), 100 + pid);
    }
    const double begin = event.at("ts"), duration = event.at("dur");
    double& end = ends[{pid, tid}];
    EXPECT_GE(begin, end - 0.01) << event;  // Microseconds; a double has fewer digits than the file.
    end = begin + duration;
  }
  ASSERT_EQ(tasks.size(), 4u);  // Two ranks, measured and predicted.
  for (const auto& [pid, count] : tasks) EXPECT_EQ(count, graph.tasks.size()) << pid;
}

TEST(StepWatch, ABrokenProfileIsNoReasonNotToTrain) {
  const TempDir folder;
  ASSERT_TRUE(WriteFileAtomic(ProfilePath(folder.path()), "{").ok());
  RunRanks(1, "auto", [&](Communicator& world) {
    Profiler profiler;
    const auto watch = StepWatch::Create({.run_dir = folder.path(), .about = "this"}, world, profiler);
    ASSERT_TRUE(watch.ok()) << watch.status();
  });
}

TEST(StepWatch, FeedsMetrics) {
  const Graph graph = TwoRankStep();
  auto server = MetricsServer::Create("127.0.0.1", MetricsServer::kNoPort);
  ASSERT_TRUE(server.ok()) << server.status();
  RunRanks(1, "auto", [&](Communicator& world) {
    Profiler profiler;
    auto watch = StepWatch::Create({.about = "this", .metrics = (*server)->metrics()}, world, profiler);
    ASSERT_TRUE(watch.ok()) << watch.status();
    StepRecord record;
    int64_t now = 0;
    for (size_t i = 0; i < graph.tasks.size(); ++i, now += 1'000'000) record.tasks.push_back({now, now + 1'000'000, 1});
    record.end_ns = now;
    for (int64_t step = 0; step < 2; ++step) {
      profiler.Add(graph, record);
      ASSERT_TRUE((*watch)->AfterStep(step, graph, record).ok());
    }
  });
  const Metrics& metrics = (*server)->metrics();
  double busy = 0;
  for (const Counter& lane : metrics.lane_busy) busy += lane.value();
  EXPECT_NEAR(busy, 2e-3 * static_cast<double>(graph.tasks.size()), 1e-9);
  EXPECT_NEAR(metrics.lane_busy[0].value() + metrics.exposed_communication.value() + metrics.scheduling_overhead.value(), busy, 1e-9);
  EXPECT_NEAR(metrics.task_prediction_error.value(), 0, 1e-6);
  EXPECT_GT(metrics.predicted_step_duration.value(), 0);
  EXPECT_THAT((*server)->Text(), HasSubstr("shoal_step_lane_busy_seconds_total{lane=\"intra\"}"));
}

}  // namespace
}  // namespace shoal
