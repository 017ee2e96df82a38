#include "parallel/schedule/executor.h"

#include <pthread.h>
#include <signal.h>

#include <array>
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "parallel/schedule/lane_order.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/base/thread.h"

namespace shoal {
namespace {

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

size_t Index(Lane lane) { return static_cast<size_t>(lane); }

}  // namespace

// One mutex guards everything that lanes tell each other. A lane that has to wait sleeps; who ends a task that it waits for wakes
// this lane and no other, after it has let the mutex go. Nobody spins: ranks share cores.
struct Executor::Impl {
  struct LaneState {
    LaneOrder order;  // Of the graph that runs. Written between runs.
    LaneOrder::Cursor cursor;
    CondVar changed;
    bool asleep = false;  // Until a task ends that the cursor awaits.
    bool working = false;  // Has tasks of the graph that runs, and is not through with them.
    std::thread thread;
  };

  Impl() = default;
  ~Impl() {
    {
      MutexLock lock(&mutex);
      closing = true;
    }
    for (LaneState& lane : lanes) lane.changed.NotifyOne();
    for (LaneState& lane : lanes) {
      if (lane.thread.joinable()) lane.thread.join();
    }
  }

  absl::Status Run(const Graph& next, const Body& next_body, const std::function<void(const absl::Status&)>& next_on_failure,
                   StepRecord* next_record) {
    Prepare(next, next_body, next_on_failure, next_record);
    if (record != nullptr) record->begin_ns = NowNs();
    StartLanes();
    RunLane(Lane::kCompute);
    absl::Status status = AwaitLanes();
    if (record != nullptr) record->end_ns = NowNs();
    graph = nullptr;
    return status;
  }

 private:
  // Between runs all threads sleep, so what they read is written under the mutex just once.
  void Prepare(const Graph& next, const Body& next_body, const std::function<void(const absl::Status&)>& next_on_failure,
               StepRecord* next_record) {
    MutexLock lock(&mutex);
    SHOAL_CHECK(graph == nullptr) << "a body, or another thread, called Run of an executor that runs";
    graph = &next;
    body = &next_body;
    on_failure = &next_on_failure;
    record = next_record;
    failure = absl::OkStatus();
    done.assign(next.tasks.size(), 0);
    if (record != nullptr) record->tasks.assign(next.tasks.size(), TaskRecord());
    alone = true;
    for (size_t i = 0; i < next.tasks.size(); ++i) {
      for (int before : next.tasks[i].after) {
        SHOAL_CHECK(before >= 0 && before < static_cast<int>(i)) << "task " << i << " waits for task " << before;
      }
      alone = alone && next.tasks[i].lane == Lane::kCompute;
    }
    for (int i = 0; i < kLanes; ++i) {
      LaneState& lane = lanes[static_cast<size_t>(i)];
      lane.order = LaneOrder(next, static_cast<Lane>(i));
      lane.cursor = LaneOrder::Cursor(lane.order);
    }
  }

  void StartLanes() {
    for (int i = 0; i < kLanes; ++i) {
      LaneState& lane = lanes[static_cast<size_t>(i)];
      if (static_cast<Lane>(i) == Lane::kCompute || lane.cursor.AllTaken()) continue;
      {
        MutexLock lock(&mutex);
        lane.working = true;
      }
      if (lane.thread.joinable()) {
        lane.changed.NotifyOne();
      } else {
        StartThread(static_cast<Lane>(i));
      }
    }
  }

  // Signals are for the threads that the program has told about them.
  void StartThread(Lane lane) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    lanes[Index(lane)].thread = std::thread([this, lane] { LaneThread(lane); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void LaneThread(Lane lane) {
    LaneState& own = lanes[Index(lane)];
    (void)pthread_setname_np(pthread_self(), absl::StrCat("shoal/", AbslSv(Name(lane))).c_str());
    AskForShortTurns();  // Only the compute lane computes.
    while (true) {
      {
        MutexLock lock(&mutex);
        while (!own.working && !closing) own.changed.Wait(&mutex);
        if (closing) return;
      }
      RunLane(lane);
      MutexLock lock(&mutex);
      own.working = false;
      all_idle.NotifyOne();
    }
  }

  absl::Status AwaitLanes() {
    if (alone) return failure;
    MutexLock lock(&mutex);
    for (const LaneState& lane : lanes) {
      while (lane.working) all_idle.Wait(&mutex);
    }
    return failure;
  }

  void RunLane(Lane lane) {
    for (int index; (index = NextOf(lane)) != LaneOrder::kNone;) {
      const Task& task = graph->tasks[static_cast<size_t>(index)];
      TaskRecord own;
      if (record != nullptr) own.begin_ns = NowNs();
      absl::StatusOr<double> units = (*body)(task);
      if (!units.ok()) return Fail(Annotate(units.status(), Name(task)));
      if (record != nullptr) {
        own.end_ns = NowNs();
        own.units = *units;
        record->tasks[static_cast<size_t>(index)] = own;
      }
      Finish(index);
    }
  }

  // The task that the lane begins now; kNone when it is through or some task failed.
  int NextOf(Lane lane) {
    LaneState& own = lanes[Index(lane)];
    if (alone) return failure.ok() ? own.cursor.Take(done) : LaneOrder::kNone;
    MutexLock lock(&mutex);
    while (failure.ok() && !own.cursor.AllTaken()) {
      const int index = own.cursor.Take(done);
      if (index != LaneOrder::kNone) return index;
      own.asleep = true;
      own.changed.Wait(&mutex);
      own.asleep = false;
    }
    return LaneOrder::kNone;
  }

  void Finish(int index) {
    if (alone) {
      done[static_cast<size_t>(index)] = 1;
      return;
    }
    std::array<bool, kLanes> wanted{};
    {
      MutexLock lock(&mutex);
      done[static_cast<size_t>(index)] = 1;
      for (size_t i = 0; i < lanes.size(); ++i) wanted[i] = lanes[i].asleep && lanes[i].cursor.Awaits(index);
    }
    for (size_t i = 0; i < lanes.size(); ++i) {
      if (wanted[i]) lanes[i].changed.NotifyOne();
    }
  }

  void Fail(const absl::Status& status) {
    {
      MutexLock lock(&mutex);
      if (!failure.ok()) return;  // What follows from the first failure says less.
      failure = status;
    }
    for (LaneState& lane : lanes) lane.changed.NotifyOne();
    if (*on_failure) (*on_failure)(status);
  }

  Mutex mutex;
  std::array<LaneState, kLanes> lanes;
  CondVar all_idle;
  bool closing = false;
  // Of the run.
  const Graph* graph = nullptr;
  const Body* body = nullptr;
  const std::function<void(const absl::Status&)>* on_failure = nullptr;
  StepRecord* record = nullptr;
  bool alone = false;  // All tasks are the caller's: nobody to tell.
  std::vector<uint8_t> done;
  absl::Status failure;
};

Executor::Executor() : impl_(std::make_unique<Impl>()) {}
Executor::~Executor() = default;

absl::Status Executor::Run(const Graph& graph, const Body& body, const std::function<void(const absl::Status&)>& on_failure,
                           StepRecord* record) {
  return impl_->Run(graph, body, on_failure, record);
}

}  // namespace shoal
