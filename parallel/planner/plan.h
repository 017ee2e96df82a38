// Predicts a step of a layout on a described cluster, and finds the layouts that fit its memory and take least time. Pure.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "parallel/planner/layout.h"
#include "parallel/planner/memory.h"
#include "parallel/schedule/scheduler.h"
#include "parallel/schedule/simulate.h"

namespace shoal {

struct StepEstimate {
  StepLayout layout;
  ScheduleChoice choice;
  MemoryUse memory;
  double step_ns = 0;
  // Of the rank with the most to compute.
  double exposed_ns = 0;
  std::array<double, kLanes> busy_ns = {};
  double tokens_per_s = 0;  // Of all ranks.
  double mfu = 0;           // Operations of the model, none counted twice, over the peak rate of all devices.
  // Where asked for: the graph, and when its tasks run on each class of ranks.
  Graph graph;
  std::vector<RankClass> classes;
};

absl::StatusOr<StepEstimate> EstimateStep(const ModelShape& model, const Cluster& cluster, const StepLayout& layout,
                                          const LoadSkew& skew, const SchedulerOptions& scheduler, Record record);

struct PlanOptions {
  LoadSkew skew;
  SchedulerOptions scheduler;
  int64_t memory_bytes = 0;  // 0: the cluster's.
  bool sparse = true;        // Whether layouts with moving copies are considered.
  StepLayout base;           // What is not searched: dispatch, prefetch, room for copies and how many there are.
};

struct Plan {
  std::vector<StepEstimate> ranked;  // The fastest first.
  int considered = 0;
  std::vector<std::string> excluded;  // A line each: the first limit that a layout does not meet. Nearest to the limit first.
};

// Every layout of the model on all ranks of the cluster: expert groups, dense weights, copies, recomputation, parts of the batch.
// FAILED_PRECONDITION: none fits; the message has the one that needs least memory.
absl::StatusOr<Plan> FindPlan(const ModelShape& model, const Cluster& cluster, const PlanOptions& options);

}  // namespace shoal
