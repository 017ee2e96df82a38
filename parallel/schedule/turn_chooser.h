// Chooses Schedule::turns while a step is emitted, by when its tasks would end: tasks of a lane one after the other, each as long as
// is expected. Pure.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "parallel/schedule/graph.h"
#include "parallel/schedule/step_graph.h"

namespace shoal {

class TurnChooser {
 public:
  struct Candidate {
    int wave = 0;
    const std::vector<int>* arrivals = nullptr;  // Tasks that bring what its next turn begins with; null: nothing.
  };
  // Borrows both for life.
  TurnChooser(const TurnRule& rule, const std::function<double(const Task&)>& cost_ns) : rule_(rule), cost_ns_(cost_ns) {}

  // The wave that goes on: of candidates, oldest first, at least one. `graph` is what is emitted so far; `link` the lane that carries
  // most.
  int Choose(const Graph& graph, const std::vector<Candidate>& candidates, Lane link);
  const TurnRule& rule() const { return rule_; }
  const std::vector<int>& turns() const { return turns_; }  // All choices.

 private:
  void Follow(const Graph& graph);

  const TurnRule& rule_;
  const std::function<double(const Task&)>& cost_ns_;
  std::vector<double> ends_;  // By task.
  std::array<double, kLanes> lane_ends_ = {};
  std::vector<int> turns_;
};

}  // namespace shoal
