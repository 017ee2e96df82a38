#include "parallel/schedule/executor.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <latch>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "parallel/schedule/step_graph.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

void NoFailure(const absl::Status& status) { ADD_FAILURE() << status; }

Task MakeTask(Lane lane, std::initializer_list<int> after) {
  Task task;
  task.lane = lane;
  task.op = lane == Lane::kCompute ? Op::kExperts : Op::kDispatch;
  task.after.assign(after.begin(), after.end());
  return task;
}

Graph RandomGraph(uint64_t seed) {
  std::mt19937_64 random(seed);
  const int tasks = 1 + static_cast<int>(random() % 60), lanes = 1 + static_cast<int>(random() % kLanes);
  Graph graph;
  for (int i = 0; i < tasks; ++i) {
    Task task = MakeTask(static_cast<Lane>(random() % static_cast<uint64_t>(lanes)), {});
    task.chunk = i;
    for (uint64_t edges = random() % 4; i > 0 && edges > 0; --edges) {
      task.after.push_back(static_cast<int>(random() % static_cast<uint64_t>(i)));
    }
    graph.tasks.push_back(std::move(task));
  }
  return graph;
}

// The order in which bodies began and ended, as one sequence that all lanes agree on.
class Journal {
 public:
  explicit Journal(const Graph& graph) : graph_(&graph), begin_(graph.tasks.size(), -1), end_(graph.tasks.size(), -1) {}

  Executor::Body Body() {
    return [this](const Task& task) -> absl::StatusOr<double> {
      Note(task, &begin_);
      Note(task, &end_);
      return static_cast<double>(IndexOf(task));
    };
  }
  void ExpectValid() const {
    std::array<int, kLanes> last;
    last.fill(-1);
    for (size_t i = 0; i < graph_->tasks.size(); ++i) {
      const Task& task = graph_->tasks[i];
      ASSERT_GE(begin_[i], 0) << Name(task) << " did not run";
      for (int before : task.after) EXPECT_LT(end_[static_cast<size_t>(before)], begin_[i]) << Name(task);
      int& previous = last[static_cast<size_t>(task.lane)];
      if (previous >= 0) {
        EXPECT_LT(end_[static_cast<size_t>(previous)], begin_[i]) << Name(task);
      }
      previous = static_cast<int>(i);
    }
    for (const std::vector<std::thread::id>& threads : threads_) {
      for (std::thread::id id : threads) EXPECT_EQ(id, threads.front());
    }
    const std::vector<std::thread::id>& compute = threads_[static_cast<size_t>(Lane::kCompute)];
    if (!compute.empty()) {
      EXPECT_EQ(compute.front(), std::this_thread::get_id());
    }
  }

 private:
  int IndexOf(const Task& task) const { return static_cast<int>(&task - graph_->tasks.data()); }
  void Note(const Task& task, std::vector<int>* times) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int& time = (*times)[static_cast<size_t>(IndexOf(task))];
    EXPECT_EQ(time, -1) << Name(task) << " ran twice";
    time = clock_++;
    threads_[static_cast<size_t>(task.lane)].push_back(std::this_thread::get_id());
  }

  const Graph* graph_;
  std::mutex mutex_;
  int clock_ = 0;
  std::vector<int> begin_, end_;
  std::array<std::vector<std::thread::id>, kLanes> threads_;
};

TEST(Executor, NoWaveWaitsForOneWhoseRowsAreLateWhereWavesPart) {
  Graph graph;
  graph.waves_apart = true;
  const auto add = [&](Lane lane, int wave, std::initializer_list<int> after) {
    graph.tasks.push_back(MakeTask(lane, after));
    graph.tasks.back().wave = wave;
  };
  add(Lane::kInter, 0, {});
  add(Lane::kCompute, 0, {0});
  add(Lane::kCompute, 1, {});
  add(Lane::kCompute, -1, {1, 2});
  std::latch computed(1);  // The rows of wave 0 arrive after wave 1 has computed.
  std::mutex mutex;
  std::vector<int> order;
  const Executor::Body body = [&](const Task& task) -> absl::StatusOr<double> {
    if (task.lane == Lane::kInter) computed.wait();
    if (task.lane == Lane::kCompute && task.wave == 1) computed.count_down();
    const std::lock_guard<std::mutex> lock(mutex);
    order.push_back(static_cast<int>(&task - graph.tasks.data()));
    return 0;
  };
  Executor executor;
  ASSERT_TRUE(executor.Run(graph, body, NoFailure, nullptr).ok());
  EXPECT_EQ(order.back(), 3);
  EXPECT_EQ(order.size(), 4u);
}

TEST(Executor, RunsEveryTaskOfARandomGraphInOrder) {
  Executor executor;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Graph graph = RandomGraph(seed);
    Journal journal(graph);
    StepRecord record;
    ASSERT_TRUE(executor.Run(graph, journal.Body(), NoFailure, &record).ok());
    journal.ExpectValid();
    ASSERT_EQ(record.tasks.size(), graph.tasks.size());
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const TaskRecord& task = record.tasks[i];
      EXPECT_EQ(task.units, static_cast<double>(i));
      EXPECT_GE(task.begin_ns, record.begin_ns);
      EXPECT_LE(task.begin_ns, task.end_ns);
      EXPECT_LE(task.end_ns, record.end_ns);
      for (int before : graph.tasks[i].after) EXPECT_LE(record.tasks[static_cast<size_t>(before)].end_ns, task.begin_ns);
    }
  }
}

TEST(Executor, RunsTrainingSteps) {
  Executor executor;
  for (int ranks : {1, 4}) {
    for (DensePolicy dense : {DensePolicy::kReplicated, DensePolicy::kSharded}) {
      StepShape shape;
      shape.layers = {{.moe = true, .shared_expert = true}, {.moe = false}, {.moe = true}};
      shape.ranks = ranks;
      shape.intra = shape.inter = shape.dispatch = shape.materialise = ranks > 1;
      shape.recompute = true;
      shape.dense = dense;
      Schedule schedule = PlainSchedule(shape, std::vector<int64_t>(static_cast<size_t>(shape.buckets().count()), 10));
      for (LayerSchedule& layer : schedule.layers) layer = {.forward_chunks = 3, .backward_chunks = 2};
      const Graph graph = EmitStep(shape, schedule);
      Journal journal(graph);
      ASSERT_TRUE(executor.Run(graph, journal.Body(), NoFailure, nullptr).ok());
      journal.ExpectValid();
    }
  }
}

TEST(Executor, NothingToDo) {
  Executor executor;
  StepRecord record;
  EXPECT_TRUE(executor.Run(Graph(), nullptr, NoFailure, &record).ok());
  EXPECT_TRUE(record.tasks.empty());
}

// Each body waits until all others have begun: they can only end if they run at the same time.
TEST(Executor, LanesRunAtTheSameTime) {
  Executor executor;
  Graph graph;
  for (int lane = 0; lane < kLanes; ++lane) graph.tasks.push_back(MakeTask(static_cast<Lane>(lane), {}));
  for (int run = 0; run < 20; ++run) {
    std::latch all_began(kLanes);
    const Executor::Body body = [&](const Task&) -> absl::StatusOr<double> {
      all_began.arrive_and_wait();
      return 0.0;
    };
    ASSERT_TRUE(executor.Run(graph, body, NoFailure, nullptr).ok());
  }
}

TEST(Executor, ALaneGoesOnWhileAnotherWaits) {
  Executor executor;
  Graph graph;
  graph.tasks.push_back(MakeTask(Lane::kInter, {}));
  graph.tasks.push_back(MakeTask(Lane::kCompute, {}));
  graph.tasks.push_back(MakeTask(Lane::kIntra, {1}));
  graph.tasks.push_back(MakeTask(Lane::kCompute, {2}));
  graph.tasks.push_back(MakeTask(Lane::kCompute, {0}));
  std::latch last_but_one(1);
  const Executor::Body body = [&](const Task& task) -> absl::StatusOr<double> {
    if (&task == &graph.tasks[0]) last_but_one.wait();  // Longer than everything that does not wait for it.
    if (&task == &graph.tasks[3]) last_but_one.count_down();
    return 0.0;
  };
  EXPECT_TRUE(executor.Run(graph, body, NoFailure, nullptr).ok());
}

TEST(Executor, NamesTheThreadsOfItsLanes) {
  Executor executor;
  Graph graph;
  graph.tasks.push_back(MakeTask(Lane::kInter, {}));
  std::string name;
  const Executor::Body body = [&](const Task&) -> absl::StatusOr<double> {
    char text[16] = "";
    pthread_getname_np(pthread_self(), text, sizeof text);
    name = text;
    return 0.0;
  };
  ASSERT_TRUE(executor.Run(graph, body, NoFailure, nullptr).ok());
  EXPECT_EQ(name, "shoal/inter");
}

TEST(Executor, AFailureOnAnyLaneEndsTheRunAndNamesTheTask) {
  Executor executor;
  for (int failing = 0; failing < kLanes; ++failing) {
    SCOPED_TRACE(std::string(Name(static_cast<Lane>(failing))));
    Graph graph;
    for (int lane = 0; lane < kLanes; ++lane) graph.tasks.push_back(MakeTask(static_cast<Lane>(lane), {}));
    for (int lane = 0; lane < kLanes; ++lane) graph.tasks.push_back(MakeTask(static_cast<Lane>(lane), {failing}));
    graph.tasks[static_cast<size_t>(failing)].layer = 7;
    std::latch others_began(kLanes - 1), told(1);
    std::atomic<int> tellings{0}, later{0};
    std::thread::id failing_thread, telling_thread;
    const Executor::Body body = [&](const Task& task) -> absl::StatusOr<double> {
      const int64_t index = &task - graph.tasks.data();
      if (index >= kLanes) ++later;
      if (index == failing) {
        others_began.wait();  // They are in the middle of something, like a collective, ...
        failing_thread = std::this_thread::get_id();
        return absl::DataLossError("rows are missing");
      }
      others_began.count_down();
      told.wait();  // ... and only on_failure gets them out of it,
      return absl::AbortedError("the group is over");  // with errors that do not count.
    };
    const auto on_failure = [&](const absl::Status& status) {
      telling_thread = std::this_thread::get_id();
      EXPECT_TRUE(absl::IsDataLoss(status));
      ++tellings;
      told.count_down();
    };
    const absl::Status status = executor.Run(graph, body, on_failure, nullptr);
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(StdSv(status.message())),
                HasSubstr(failing == 0 ? "layer 7 experts forward: rows are missing" : "layer 7 dispatch forward: rows"));
    EXPECT_EQ(tellings, 1);
    EXPECT_EQ(later, 0);
    EXPECT_EQ(telling_thread, failing_thread);

    const Graph next = RandomGraph(static_cast<uint64_t>(failing));  // It can be used again.
    Journal journal(next);
    ASSERT_TRUE(executor.Run(next, journal.Body(), NoFailure, nullptr).ok());
    journal.ExpectValid();
  }
}

TEST(Executor, AFailureOfARandomTaskEndsTheRun) {
  Executor executor;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Graph graph = RandomGraph(seed);
    const Task* failing = &graph.tasks[seed % graph.tasks.size()];
    std::atomic<int> tellings{0};
    std::vector<std::atomic<int>> runs(graph.tasks.size());
    const Executor::Body body = [&](const Task& task) -> absl::StatusOr<double> {
      for (int before : task.after) EXPECT_EQ(runs[static_cast<size_t>(before)], 2);
      std::atomic<int>& own = runs[static_cast<size_t>(&task - graph.tasks.data())];
      own = 1;
      if (&task == failing) return absl::InternalError("broken");
      own = 2;
      return 0.0;
    };
    const absl::Status status = executor.Run(graph, body, [&](const absl::Status&) { ++tellings; }, nullptr);
    EXPECT_TRUE(absl::IsInternal(status)) << status;
    EXPECT_EQ(tellings, 1);
  }
}

TEST(ExecutorDeathTest, ATaskThatWaitsForALaterOneIsABug) {
  Executor executor;
  Graph graph;
  graph.tasks.push_back(MakeTask(Lane::kCompute, {0}));
  EXPECT_DEATH((void)executor.Run(graph, nullptr, nullptr, nullptr), "task 0 waits for task 0");
}

}  // namespace
}  // namespace shoal
