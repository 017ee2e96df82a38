// One way to lay a model out on a cluster, and what the simulator needs to know of it. Pure.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "parallel/planner/cluster.h"
#include "parallel/planner/model_shape.h"
#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/step_graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

// The keys of a configuration's `parallel`, `schedule` and `train` that a plan can change.
struct StepLayout {
  int expert = 1;       // Ranks of an expert group; of no meaning when sparse.
  bool sparse = false;  // Copies of busy experts move from step to step (Hecate).
  DensePolicy dense = DensePolicy::kReplicated;
  ExpertPolicy experts = ExpertPolicy::kKeep;
  DispatchRule dispatch = DispatchRule::kNearest;
  bool recompute = false;
  int parts = 1;
  int prefetch = 0;  // 0: chosen where more than 1 takes no memory.
  // Sparse: others' experts that a rank has room for, in each layer; -1: what fits into three quarters of the memory that the rest
  // leaves.
  int copies = -1;
  int overlap = -1;  // Sparse: busy experts of a layer that are copied; -1: those that pay (placement/copies.h).

  bool pinned() const { return IsWhole(dispatch); }  // Numerics::kPinned.
  std::string ToString() const;                      // "expert 8, dense sharded, recompute, 2 parts"
};

// Loads of experts, which a layout does not decide.
struct LoadSkew {
  double sigma = 0;  // Of the logarithm of an expert's popularity (traces.h); 0: all alike.
  uint64_t seed = 0;
};

struct LaidOut {
  Topology topology;
  StepShape shape;
  Workload work;
  CostTable costs;
};

// INVALID_ARGUMENT: the layout does not fit the number of ranks or of experts; the message says why.
absl::StatusOr<LaidOut> LayOut(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LoadSkew& skew);

// What tasks take on the cluster: fixed costs, and operations or bytes over rates.
CostTable CostsOf(const ModelShape& model, const Cluster& cluster, const Workload& work, const Topology& topology);

}  // namespace shoal
