// Chooses how a step is pipelined, from what its tasks are expected to take: chunks of every expert layer, forward and backward
// apart, and the pieces in which dense gradients fill the pauses of the links (FSMoE, arXiv 2501.10714, sections 4 and 5; the
// formulas of the paper are replaced by simulating the step). Pure and deterministic: ranks that pass equal arguments choose
// equal schedules.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parallel/placement/topology.h"
#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/step_graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

struct SchedulerOptions {
  std::vector<int> chunks = {1, 2, 3, 4, 6, 8};  // To choose from, ascending.
  int chunks_forward = 0, chunks_backward = 0;   // Not 0: taken, not chosen.
  std::vector<int> waves = {1};                  // To choose from; the first is where the search begins.
  bool part_waves = true;                        // Consider Schedule::turns.
  bool slice_gradients = true;                   // false: as PlainSchedule has them.
  std::vector<int> prefetch = {1};               // To choose from; the first is where the search begins.
  int64_t slice_elements_min = 1 << 14;          // Smaller slices are not worth their messages.
  int slice_trials = 24;                         // Simulations that improve the slices.
};

struct ScheduleChoice {
  Schedule schedule;
  double predicted_ns = 0;           // Of the step, on the rank with the most work of each kind.
  double plain_ns = 0;               // As predicted_ns, of PlainSchedule.
  std::vector<std::string> reasons;  // A line each, for people.
};

// Never predicted slower than PlainSchedule (unless chunks are given) or, with up to two parts, than the same number of chunks
// everywhere, of those to choose from. Some milliseconds for 32 layers, tens where there are many parts.
ScheduleChoice ChooseSchedule(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology,
                              const SchedulerOptions& options);

// Nanoseconds that a schedule is predicted to take, by the same measure as ScheduleChoice::predicted_ns.
double PredictStep(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology,
                   const Schedule& schedule);

// Whether a schedule that is predicted to take `proposed_ns` should replace one predicted to take `current_ns`. `noise` is the
// standard deviation of measured steps around their prediction, as a share of it.
bool WorthReplanning(double current_ns, double proposed_ns, double noise);

}  // namespace shoal
