// What the executor costs: bench_executor [runs]. Nanoseconds per task (best and median run) of empty tasks
//   compute      all on the caller's lane: nobody waits;
//   overlapped   on two lanes, each waiting for a task of the other that is long done;
//   alternating  on two lanes in turns: every task is a hand-over to a thread that sleeps.
// The first row without records of times, too. Each graph is verified first: every body runs once, after what it waits for.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "parallel/schedule/executor.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int kTasks = 2000;

Graph MakeGraph(int lanes, int distance) {
  Graph graph;
  for (int i = 0; i < kTasks; ++i) {
    Task task;
    task.lane = i % lanes == 0 ? Lane::kCompute : Lane::kInter;
    if (lanes > 1 && i >= distance) task.after.push_back(i - distance);
    graph.tasks.push_back(std::move(task));
  }
  return graph;
}

void Verify(Executor& executor, const Graph& graph) {
  std::vector<int> runs(graph.tasks.size(), 0);
  const Executor::Body body = [&](const Task& task) -> absl::StatusOr<double> {
    for (int before : task.after) SHOAL_CHECK_EQ(runs[static_cast<size_t>(before)], 1);
    ++runs[static_cast<size_t>(&task - graph.tasks.data())];
    return 1.0;
  };
  SHOAL_CHECK_OK(executor.Run(graph, body, nullptr, nullptr));
  for (int count : runs) SHOAL_CHECK_EQ(count, 1);
}

void Measure(const char* name, const Graph& graph, int runs, bool with_record) {
  Executor executor;
  Verify(executor, graph);
  const Executor::Body body = [](const Task&) -> absl::StatusOr<double> { return 1.0; };
  StepRecord record;
  std::vector<double> ns;
  for (int run = 0; run < runs; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    SHOAL_CHECK_OK(executor.Run(graph, body, nullptr, with_record ? &record : nullptr));
    ns.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count() / kTasks);
  }
  std::sort(ns.begin(), ns.end());
  std::printf("%-12s %-10s %10.0f %10.0f\n", name, with_record ? "recorded" : "", ns.front(), ns[ns.size() / 2]);
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  using namespace shoal;
  const int runs = argc > 1 ? std::atoi(argv[1]) : 50;
  if (runs <= 0) {
    std::fprintf(stderr, "usage: bench_executor [runs]\n");
    return 2;
  }
  std::printf("ns per task                   best     median\n");
  Measure("compute", MakeGraph(1, 0), runs, /*with_record=*/false);
  Measure("compute", MakeGraph(1, 0), runs, /*with_record=*/true);
  Measure("overlapped", MakeGraph(2, 999), runs, /*with_record=*/true);
  Measure("alternating", MakeGraph(2, 1), runs, /*with_record=*/true);
  return 0;
}
