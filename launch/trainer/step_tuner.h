// Learns what the tasks of a step take while training, and chooses the schedule from it (parallel/schedule/scheduler.h). A thin shell:
// measurements of all ranks are brought together by two small all-reduces after each step, so that every rank decides alike. The first
// step with a schedule is not learnt from.
//
// It begins with plain schedules of one chunk, of two waves and of two chunks, to tell fixed costs from those per row. Then it measures
// what is predicted to be fastest and those that are predicted to be nearly as fast, for a few steps each, and stays with the one
// that was. It looks again every so many steps, and as soon as the times of some kind of task have changed.
#pragma once

#include <deque>
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
    bool start_apart = false;  // The first schedule has Schedule::turns, as if all tasks took equally long.
    SchedulerOptions scheduler;
  };
  // `control` has all ranks; null when there is one. Borrowed for life. `workload` without rows: see AfterStep.
  StepTuner(const StepShape& shape, const Topology& topology, Workload workload, Communicator* control, const Options& options);

  // Where a run begins.
  const Schedule& schedule() const { return schedule_; }
  // Collective, after each training step with its graph, which was emitted from schedule(). `experts`: placement and rows of each
  // MoE layer (rows may be empty). `request`: anything that ranks have to agree on; request() is the highest. True: schedule() is
  // another one now.
  absl::StatusOr<bool> AfterStep(const Graph& graph, const StepRecord& record, std::vector<ExpertWork> experts, int64_t request = 0);
  int64_t request() const { return request_; }

  const Profiler& profiler() const { return profiler_; }
  Profiler& profiler() { return profiler_; }
  // Why the schedule is what it is; a line each. Empty until one is chosen.
  const std::vector<std::string>& reasons() const { return reasons_; }
  double predicted_ns() const { return predicted_ns_; }  // Of a step with schedule(), by what is known now; 0: nothing yet.

 private:
  // A schedule and what steps took with it.
  struct Tried {
    Schedule schedule;
    std::vector<std::string> reasons;
    double median_ns = 0;
  };
  absl::StatusOr<int64_t> Learn(const Graph& graph, const StepRecord& record, int64_t request);
  ScheduleChoice Choose() const;
  void AddProbe(Schedule schedule, std::vector<std::string> reasons);
  void PlanProbes(double plausible);
  bool NextProbe();
  bool Settle();
  bool Take(Tried tried);
  void Remember();
  double Median() const;  // Of the steps since the schedule was taken, without the first.

  const StepShape shape_;
  const Topology topology_;
  Workload workload_;
  Communicator* const control_;
  const Options options_;
  Profiler profiler_;
  Schedule schedule_;
  bool learning_ = false;             // Nothing is known yet of fixed costs.
  bool probing_ = false;
  std::deque<Tried> probes_;          // To be measured, after the one in use.
  std::vector<int64_t> steps_ns_;     // Of schedule_.
  std::map<uint64_t, Tried> tried_;   // By fingerprint; since the times of tasks changed last.
  int64_t jumps_ = 0;
  size_t replan_steps_ = 10;          // Until the next look.
  std::vector<std::string> reasons_;
  double predicted_ns_ = 0;
  int64_t request_ = 0;
};

}  // namespace shoal
