// How a step's rows and experts were spread over ranks, in a few numbers for people and metrics. Pure.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "parallel/schedule/graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

struct ExpertSummary {
  // Rows of the busiest over the mean: of experts, and of ranks that compute them. Means over layers.
  double expert_max_over_mean = 0, rank_max_over_mean = 0;
  double hottest_expert = 0;            // The largest of any layer: rows of an expert over their mean.
  double stay_rank = 0, stay_host = 0;  // Shares of rows that are computed where they come from.
  double dropped = 0;                   // Share of choices that were refused for capacity.
  double copies_per_layer = 0;          // Of experts beside their owners, on all ranks together.
  int64_t weight_bytes = 0,
          gradient_bytes = 0;  // That copies took to arrive, and to return, on all ranks together.
  int64_t owner_moves = 0;     // Experts that got another owner after the step.
};

// What can be known of layers with rows and of the graph that they ran in; `dropped` and `owner_moves` are
// the caller's. Layers without rows do not count; without any, rows are all 0.
ExpertSummary SummariseExperts(const Workload& workload, const Topology& topology, const Graph& graph);

}  // namespace shoal
