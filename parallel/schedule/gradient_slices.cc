#include "parallel/schedule/gradient_slices.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {
namespace {

// Slices end at multiples of this, so that vector instructions and cache lines are not shared.
constexpr int64_t kElementsStep = 64;

CostModel PerElement(const CostTable& costs, Lane lane, int64_t bytes) {
  const auto found = costs.models.find(CostKey{Op::kReduce, Phase::kBackward, lane});
  if (found == costs.models.end()) return {};
  return {found->second.fixed_ns, found->second.ns_per_unit * static_cast<double>(bytes)};
}

}  // namespace

GradientSlicer::GradientSlicer(const StepShape& shape, const Workload& workload, const CostTable& costs,
                               int64_t slice_elements_min)
    : shape_(shape),
      workload_(workload),
      lane_(shape.inter ? Lane::kInter : Lane::kIntra),
      reduce_(PerElement(costs, lane_, workload.gradient_bytes)),
      slice_elements_min_(slice_elements_min),
      pause_ns_(shape.layers.size()) {}

std::vector<GradientSlice> GradientSlicer::AtTheEnd() const {
  std::vector<GradientSlice> slices;
  for (int bucket = shape_.buckets().count() - 1; bucket >= 0; --bucket) {
    slices.push_back({bucket, 0, workload_.bucket_elements[static_cast<size_t>(bucket)], -1});
  }
  return slices;
}

void GradientSlicer::Measure(const Graph& graph, const StepRecord& record) {
  // Of the last part: when the slices of a layer can begin, and when its successor needs the lane.
  std::vector<int64_t> begin(pause_ns_.size(), -1), end(pause_ns_.size(), -1);
  int64_t backward_end = 0;
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const Task& task = graph.tasks[i];
    if (task.phase != Phase::kBackward || task.part + 1 != shape_.parts) continue;
    if (task.lane == Lane::kCompute) backward_end = std::max(backward_end, record.tasks[i].end_ns);
    if (task.layer < 0) continue;
    const size_t layer = static_cast<size_t>(task.layer);
    const bool dispatch = task.op == Op::kDispatch && task.lane == lane_;
    const bool dense = task.op == Op::kDense || (task.op == Op::kExperts && !shape_.dispatch);
    if (dispatch) begin[layer] = std::max(begin[layer], record.tasks[i].end_ns);
    if (dense && begin[layer] < 0) begin[layer] = record.tasks[i].begin_ns;
    if ((dispatch || dense) && layer + 1 < end.size() && end[layer + 1] < 0) end[layer + 1] = record.tasks[i].begin_ns;
  }
  if (!end.empty()) end[0] = backward_end;
  for (size_t layer = 0; layer < pause_ns_.size(); ++layer) {
    if (begin[layer] < 0 || end[layer] < begin[layer]) continue;
    int64_t idle = end[layer] - begin[layer];
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      if (graph.tasks[i].lane != lane_) continue;
      idle -=
          std::max<int64_t>(0, std::min(record.tasks[i].end_ns, end[layer]) - std::max(record.tasks[i].begin_ns, begin[layer]));
    }
    pause_ns_[layer] = static_cast<double>(std::max<int64_t>(0, idle));
  }
}

std::vector<GradientSlice> GradientSlicer::InPauses(const std::vector<double>& scales) const {
  std::vector<GradientSlice> slices;
  const int buckets = shape_.buckets().count();
  int bucket = buckets - 1;  // The next to send, and how much of it is sent. Buckets are complete in descending order.
  int64_t sent = 0;
  const auto take = [&](int64_t count, int layer) {
    slices.push_back({bucket, sent, count, layer});
    sent += count;
    if (sent < workload_.bucket_elements[static_cast<size_t>(bucket)]) return;
    --bucket;
    sent = 0;
  };
  for (int layer = static_cast<int>(scales.size()) - 1; layer >= 0; --layer) {
    double left_ns = scales[static_cast<size_t>(layer)] * pause_ns_[static_cast<size_t>(layer)];
    while (bucket >= 0 && CompletedBy(shape_, bucket) > layer) {
      const int64_t remaining = workload_.bucket_elements[static_cast<size_t>(bucket)] - sent;
      const double fits = reduce_.ns_per_unit > 0 ? (left_ns - reduce_.fixed_ns) / reduce_.ns_per_unit : 0;
      int64_t count = remaining;
      if (fits < static_cast<double>(remaining)) {
        count = fits <= 0 ? 0 : static_cast<int64_t>(fits) / kElementsStep * kElementsStep;
        // What would be left must be worth a message too.
        if (remaining - count < slice_elements_min_) count = (remaining - slice_elements_min_) / kElementsStep * kElementsStep;
        if (count < slice_elements_min_) break;
      }
      left_ns -= reduce_.Predict(static_cast<double>(count));
      take(count, layer);
    }
  }
  while (bucket >= 0) take(workload_.bucket_elements[static_cast<size_t>(bucket)] - sent, -1);
  return slices;
}

}  // namespace shoal
