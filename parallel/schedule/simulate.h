// Predicts when the tasks of a step run, without running them: lanes in list order (LaneOrder), a task when what it waits for is
// done, as the executor does. Communication begins when every rank that takes part has reached it and ends for all at once; it is
// slowed by CostTable::interference while the host's other communication lane is busy too; computation by
// CostTable::compute_share while its rank communicates. Pure.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "parallel/placement/topology.h"
#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

// Of one rank, in nanoseconds.
struct Prediction {
  double step_ns = 0;
  double exposed_ns = 0;  // The compute lane waits while kIntra, kInter or kControl is busy.
  std::array<double, kLanes> busy_ns = {};
  // Where asked for: when tasks ran, from 0, with the units that they were given.
  StepRecord record;
};

enum class Record : uint8_t { kNo, kYes };

// A table of costs laid out for look-up by task.
class FlatCosts {
 public:
  explicit FlatCosts(const CostTable& costs);
  double Predict(const Task& task, double units) const {
    const CostModel& model = models_[Index(KeyOf(task))];
    return model.fixed_ns + model.ns_per_unit * units;
  }
  double interference() const { return interference_; }
  // How many times longer computation takes while these lanes are busy.
  double ComputeSlowdown(const std::array<bool, kLanes>& busy) const;
  bool slows_compute() const { return slows_compute_; }

 private:
  static size_t Index(const CostKey& key) {
    return (static_cast<size_t>(key.op) * 4 + static_cast<size_t>(key.phase)) * kLanes + static_cast<size_t>(key.lane);
  }
  std::array<CostModel, static_cast<size_t>(kOps) * 4 * kLanes> models_;
  double interference_;
  std::array<double, kLanes> compute_share_;
  bool slows_compute_ = false;
};

// One rank of many that all do the same: Task::units are every rank's. About 50 ns a task.
Prediction SimulateAlike(const Graph& graph, const FlatCosts& costs, Record record);

// Ranks that do the same at the same time.
struct RankClass {
  int first_rank = 0;
  int64_t ranks = 0;
  Prediction prediction;
};
struct ClusterPrediction {
  double step_ns = 0;
  std::vector<RankClass> classes;  // By first rank.
  int64_t rank_count = 0;
  const RankClass& slowest() const;  // That with the most work of its own; the first of equal ones.
};

// All ranks of a cluster. Graph is the one that `schedule` emits for it; its units are not used. Ranks with equal work on hosts
// with equal work are simulated once, so that a balanced cluster costs as much as one rank.
ClusterPrediction SimulateCluster(const Graph& graph, const FlatCosts& costs, const Schedule& schedule, const StepUnits& units,
                                  const Topology& topology, Record record);

// For people: "1.53 s", "12.3 ms", "45.6 us".
std::string TimeText(double ns);

}  // namespace shoal
