#include "parallel/schedule/trace.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "parallel/schedule/step_graph.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr int64_t kBegin = 22'000'000'000'000'123;  // A steady clock after half a year.

Graph SomeStep() {
  StepShape shape;
  shape.layers = {{.moe = true, .shared_expert = true}, {.moe = false}};
  shape.ranks = 2;
  shape.inter = shape.intra = shape.dispatch = true;
  return EmitStep(shape, PlainSchedule(shape, std::vector<int64_t>(static_cast<size_t>(shape.buckets().count()), 10)));
}

StepRecord SomeTimes(const Graph& graph, uint64_t seed) {
  std::mt19937_64 random(seed);
  StepRecord record;
  record.begin_ns = kBegin;
  std::array<int64_t, kLanes> now;
  now.fill(kBegin);
  for (const Task& task : graph.tasks) {
    int64_t& lane = now[static_cast<size_t>(task.lane)];
    for (int before : task.after) lane = std::max(lane, record.tasks[static_cast<size_t>(before)].end_ns);
    const int64_t begin = lane + static_cast<int64_t>(random() % 3);
    lane = begin + static_cast<int64_t>(random() % 100'000);
    record.tasks.push_back({begin, lane, static_cast<double>(random() % 1000)});
  }
  record.end_ns = *std::max_element(now.begin(), now.end());
  return record;
}

std::vector<Json> TasksOf(const Json& trace) {
  std::vector<Json> tasks;
  for (const Json& event : trace.at("traceEvents")) {
    if (event.at("ph") == "X") tasks.push_back(event);
  }
  return tasks;
}

// Nanoseconds of a number of microseconds, from its text: exact.
int64_t Ns(const std::string& json, size_t task, const char* field) {
  size_t at = 0;
  for (size_t i = 0; i <= task; ++i) at = json.find("\"ph\":\"X\"", at + 1);
  at = json.find(field, at) + std::string(field).size() + 1;
  std::string digits = json.substr(at, json.find(',', at) - at);
  digits.erase(digits.find('.'), 1);
  return std::stoll(digits);
}

TEST(Trace, EventsOfALaneNeverOverlapAndKeepTheirTimes) {
  const Graph graph = SomeStep();
  const StepRecord record = SomeTimes(graph, 1);
  const std::string text = TraceJson(graph, 7, {{.rank = 0, .clock_ns = 5, .measured = record}});
  const Json trace = Json::parse(text);
  const std::vector<Json> tasks = TasksOf(trace);
  ASSERT_EQ(tasks.size(), graph.tasks.size());
  std::map<int, int64_t> ends;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Json& task = tasks[i];
    EXPECT_EQ(task.at("pid"), 0);
    EXPECT_EQ(task.at("tid"), static_cast<int>(graph.tasks[i].lane));
    EXPECT_EQ(task.at("name"), Name(graph.tasks[i]));
    EXPECT_EQ(task.at("args").at("key"), Name(KeyOf(graph.tasks[i])));
    EXPECT_EQ(task.at("args").at("units"), record.tasks[i].units);
    EXPECT_EQ(task.at("args").at("step"), 7);
    EXPECT_FALSE(task.at("args").contains("predicted_us"));
    const int64_t begin = Ns(text, i, "\"ts\""), duration = Ns(text, i, "\"dur\"");
    EXPECT_EQ(begin, record.tasks[i].begin_ns + 5);
    EXPECT_EQ(duration, record.tasks[i].end_ns - record.tasks[i].begin_ns);
    int64_t& end = ends[task.at("tid")];
    EXPECT_GE(begin, end) << Name(graph.tasks[i]);
    end = begin + duration;
  }
}

TEST(Trace, NamesRanksAndLanes) {
  const Graph graph = SomeStep();
  std::vector<RankTrace> ranks;
  for (int rank : {0, 1}) {
    ranks.push_back({.rank = rank, .host = rank == 0 ? "a\"b" : "", .measured = SomeTimes(graph, 2), .predicted = SomeTimes(graph, 3)});
  }
  const Json trace = Json::parse(TraceJson(graph, 0, ranks));
  std::map<int, std::string> processes;
  std::map<std::pair<int, int>, std::string> threads;
  std::set<int> places;
  for (const Json& event : trace.at("traceEvents")) {
    if (event.at("name") == "process_name") processes[event.at("pid")] = event.at("args").at("name");
    if (event.at("name") == "process_sort_index") places.insert(event.at("args").at("sort_index").get<int>());
    if (event.at("name") == "thread_name") threads[{event.at("pid"), event.at("tid")}] = event.at("args").at("name");
  }
  EXPECT_EQ(processes, (std::map<int, std::string>{
                           {0, "rank 0 on a\"b"}, {1, "rank 1"}, {2, "rank 0, predicted"}, {3, "rank 1, predicted"}}));
  EXPECT_EQ(places.size(), 4u);
  EXPECT_EQ(threads.size(), 4u * kLanes);
  EXPECT_EQ((threads[{3, static_cast<int>(Lane::kInter)}]), "inter");
}

TEST(Trace, ShowsThePredictionFromWhereTheStepBegan) {
  const Graph graph = SomeStep();
  const StepRecord measured = SomeTimes(graph, 2);
  StepRecord predicted = SomeTimes(graph, 3);
  predicted.begin_ns -= kBegin;
  predicted.end_ns -= kBegin;
  for (TaskRecord& task : predicted.tasks) {
    task.begin_ns -= kBegin;
    task.end_ns -= kBegin;
  }
  const std::string text = TraceJson(graph, 0, {{.rank = 0, .measured = measured, .predicted = predicted}});
  const std::vector<Json> tasks = TasksOf(Json::parse(text));
  ASSERT_EQ(tasks.size(), 2 * graph.tasks.size());
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const size_t guess = graph.tasks.size() + i;
    EXPECT_EQ(tasks[guess].at("pid"), 1);
    EXPECT_EQ(Ns(text, guess, "\"ts\""), kBegin + predicted.tasks[i].begin_ns);
    EXPECT_EQ(tasks[i].at("args").at("predicted_us"), tasks[guess].at("dur"));
  }
}

TEST(Trace, StepsJoin) {
  const Graph graph = SomeStep();
  const std::string one = TraceJson(graph, 1, {{.rank = 0, .measured = SomeTimes(graph, 1)}});
  const std::string two = TraceJson(graph, 2, {{.rank = 0, .measured = SomeTimes(graph, 2)}});
  const std::string none = TraceJson(Graph(), 3, {});
  const auto joined = JoinTraces({none, one, two});
  ASSERT_TRUE(joined.ok()) << joined.status();
  EXPECT_EQ(TasksOf(Json::parse(*joined)).size(), 2 * graph.tasks.size());
  EXPECT_TRUE(absl::IsInvalidArgument(JoinTraces({"nothing"}).status()));
}

}  // namespace
}  // namespace shoal
