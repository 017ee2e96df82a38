// Cuts dense gradients into slices that fit where the links pause in the backward pass (FSMoE, arXiv 2501.10714, section 5.1).
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/step_graph.h"
#include "parallel/schedule/workload.h"

namespace shoal {

class GradientSlicer {
 public:
  // Borrows shape and workload for life.
  GradientSlicer(const StepShape& shape, const Workload& workload, const CostTable& costs, int64_t slice_elements_min);

  // All gradients after the backward pass.
  std::vector<GradientSlice> AtTheEnd() const;
  // Finds the pause of each layer: how long the lane of all ranks idles between its last dispatch, where slices are sent, and
  // the next layer's first. `graph` and `record` are of a step with the gradients AtTheEnd().
  void Measure(const Graph& graph, const StepRecord& record);
  // From the last layer down, as many of the gradients that exist as take scales[layer] times its pause; the rest at the end.
  // A slice below the smallest size waits for the next layer.
  std::vector<GradientSlice> InPauses(const std::vector<double>& scales) const;

 private:
  const StepShape& shape_;
  const Workload& workload_;
  const Lane lane_;
  const CostModel reduce_;  // By element.
  const int64_t slice_elements_min_;
  std::vector<double> pause_ns_;
};

}  // namespace shoal
