// Learns what the tasks of a step take while training, and chooses the schedule from it (parallel/schedule/scheduler.h). A thin shell:
// measurements of all ranks are brought together by two small all-reduces after each step, so that every rank decides alike.
//
// It begins with plain schedules of one chunk, of two, and of two waves, to tell fixed costs from those per row. Then it takes what
// is predicted to be fastest, but goes back to a schedule with which steps took less time if there was one; and looks again every so
// many steps, and as soon as the times of some kind of task have changed.
#pragma once

#include <map>
#include <vector>

#include "collectives/communicator.h"
#include "parallel/schedule/profiler.h"
#include "parallel/schedule/scheduler.h"

namespace shoal {

class StepTuner {
 public:
  struct Options {
    bool choose = true;   // False: only learn.
    bool replan = true;   // False: choose once.
    SchedulerOptions scheduler;
  };
  // `control` has all ranks; null when there is one. Borrowed for life. `workload` without rows: see AfterStep.
  StepTuner(const StepShape& shape, const Topology& topology, Workload workload, Communicator* control, const Options& options);

  // Where a run begins.
  const Schedule& schedule() const { return schedule_; }
  // Collective, after each training step with its graph, which was emitted from schedule(). `experts`: placement and rows of each
  // MoE layer (rows may be empty). True: schedule() is another one now.
  absl::StatusOr<bool> AfterStep(const Graph& graph, const StepRecord& record, std::vector<ExpertWork> experts);

  const Profiler& profiler() const { return profiler_; }
  Profiler& profiler() { return profiler_; }
  // Why the schedule is what it is; a line each. Empty until one is chosen.
  const std::vector<std::string>& reasons() const { return reasons_; }
  double predicted_ns() const { return predicted_ns_; }  // Of a step with schedule(), by what is known now; 0: nothing yet.

 private:
  enum class State : uint8_t { kProbing, kTrying, kSettled };
  absl::StatusOr<int64_t> Learn(const Graph& graph, const StepRecord& record);
  bool Probe();
  bool Judge();
  bool Propose(bool first);
  bool Take(Schedule schedule, std::vector<std::string> reasons, State state);
  double Median() const;  // Of the steps since the schedule was taken, without the first.

  // A schedule and what steps took with it.
  struct Tried {
    Schedule schedule;
    std::vector<std::string> reasons;
    double median_ns = 0;
  };
  void Remember();

  const StepShape shape_;
  const Topology topology_;
  Workload workload_;
  Communicator* const control_;
  const Options options_;
  Profiler profiler_;
  Schedule schedule_;
  State state_ = State::kSettled;
  std::vector<Schedule> probes_;
  std::vector<int64_t> steps_ns_;     // Of schedule_.
  std::map<uint64_t, Tried> tried_;   // By fingerprint; since the times of tasks changed last.
  int64_t jumps_ = 0;
  std::vector<std::string> reasons_;
  double predicted_ns_ = 0;
};

}  // namespace shoal
