// What tasks are expected to take: time = fixed + per_unit * units, per cost key. Filled by the online profiler while training
// (profiler.h), or from the rates of a cluster that is only described (planner/). Plain values.
#pragma once

#include <array>

#include "absl/container/flat_hash_map.h"
#include "parallel/schedule/graph.h"

namespace shoal {

struct CostModel {
  double fixed_ns = 0;
  double ns_per_unit = 0;
  double Predict(double units) const { return fixed_ns + ns_per_unit * units; }
};

struct CostTable {
  absl::flat_hash_map<CostKey, CostModel> models;
  // How many times longer communication takes while another lane communicates as well (>= 1).
  double interference = 1.0;
  // Share of a rank's computing rate that a communication lane takes while it is busy: a transport that runs on the processor, a
  // collective library's channels on a GPU. By lane; the profiler leaves them at 0, because what it measures of computation has
  // them in it.
  std::array<double, kLanes> compute_share = {};

  // Nanoseconds; a key without a model takes none.
  double Predict(const Task& task, double units) const {
    const auto found = models.find(KeyOf(task));
    return found == models.end() ? 0 : found->second.Predict(units);
  }
};

}  // namespace shoal
