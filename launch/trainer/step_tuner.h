// Learns what the tasks of a step take while training, and chooses the schedule from it (parallel/schedule/scheduler.h). A thin shell:
// measurements of all ranks are brought together by two small all-reduces after each step, so that every rank decides alike.
//
// It begins with plain schedules of one and of two chunks, to tell fixed costs from those per row. Then it takes what is predicted to
// be fastest, but keeps it only if the steps really become faster; and looks again every so many steps, and as soon as the times of
// some kind of task have changed.
#pragma once

#include <optional>
#include <set>
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
  bool Take(Schedule schedule, State state);
  double Median() const;  // Of the steps since the schedule was taken, without the first.

  const StepShape shape_;
  const Topology topology_;
  Workload workload_;
  Communicator* const control_;
  const Options options_;
  Profiler profiler_;
  Schedule schedule_, before_;
  double before_ns_ = 0;      // What steps took with before_.
  State state_ = State::kSettled;
  std::vector<Schedule> probes_;
  std::vector<int64_t> steps_ns_;
  std::set<uint64_t> rejected_;  // Fingerprints of what turned out slower.
  int64_t jumps_ = 0;
  std::vector<std::string> reasons_, reasons_before_;
  double predicted_ns_ = 0;
};

}  // namespace shoal
