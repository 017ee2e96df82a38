// What copies of experts save and cost, from measured times of tasks (parallel/schedule/profiler.h). Pure:
// equal tables give equal integers.
#pragma once

#include <optional>

#include "parallel/placement/copies.h"
#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/step_graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

// Rows cost what experts and dispatches took, weights what the same links take for as many bytes, and
// attention, routing and shared experts hide what they take less the dense weights and gradients that use the
// link meanwhile. None while experts or a link in use were not measured. With several hosts the link between
// them is that of a host, shared by its ranks.
std::optional<CopyCosts> MeasuredCopyCosts(const CostTable& table, const StepShape& shape,
                                           const Workload& workload, const Topology& topology);

}  // namespace shoal
