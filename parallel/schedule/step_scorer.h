// Times schedules of one step by simulation, again and again. What ranks do differs; a task counts as the largest of any rank,
// which is what ranks wait for wherever they meet.
#pragma once

#include "parallel/schedule/simulate.h"
#include "parallel/schedule/step_graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

class StepScorer {
 public:
  // Borrows shape and workload for life.
  StepScorer(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology)
      : shape_(shape), costs_(costs), units_(workload, topology) {}

  double Time(const Schedule& schedule) const { return Predict(schedule, Record::kNo, nullptr).step_ns; }
  // What `schedule` becomes when its waves part by a rule.
  Schedule WithTurns(Schedule schedule, const TurnRule& rule) const {
    schedule.turns.clear();
    schedule.turns = ChooseTurns(shape_, schedule, rule, [&](const Task& task) {
      return costs_.Predict(task, units_.Of(task, schedule, StepUnits::kEveryRank));
    });
    return schedule;
  }
  // `graph` may be null; otherwise takes the graph that was simulated.
  Prediction Predict(const Schedule& schedule, Record record, Graph* graph) const {
    Graph emitted = EmitStep(shape_, schedule);
    for (Task& task : emitted.tasks) task.units = units_.Of(task, schedule, StepUnits::kEveryRank);
    Prediction prediction = SimulateAlike(emitted, costs_, record);
    if (graph != nullptr) *graph = std::move(emitted);
    return prediction;
  }

 private:
  const StepShape& shape_;
  const FlatCosts costs_;
  const StepUnits units_;
};

}  // namespace shoal
