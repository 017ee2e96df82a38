#include "parallel/schedule/turn_chooser.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {
namespace {
constexpr int kNone = -1;
}  // namespace

int TurnChooser::Choose(const Graph& graph, const std::vector<Candidate>& candidates, Lane link) {
  SHOAL_CHECK(!candidates.empty());
  Follow(graph);
  const double now = lane_ends_[static_cast<size_t>(Lane::kCompute)];
  int oldest = kNone, youngest = kNone, next = kNone;
  double next_at = 0;
  for (const Candidate& candidate : candidates) {
    double at = 0;
    if (candidate.arrivals != nullptr) {
      for (int task : *candidate.arrivals) at = std::max(at, ends_[static_cast<size_t>(task)]);
    }
    if (at <= now) {
      if (oldest == kNone) oldest = candidate.wave;
      youngest = candidate.wave;
    }
    if (next == kNone || at < next_at) {
      next = candidate.wave;
      next_at = at;
    }
  }
  const bool hungry = lane_ends_[static_cast<size_t>(link)] <= now + rule_.hungry_ns;
  turns_.push_back(oldest == kNone ? next : hungry ? youngest : oldest);
  return turns_.back();
}

// Up to the end of what is emitted.
void TurnChooser::Follow(const Graph& graph) {
  for (size_t i = ends_.size(); i < graph.tasks.size(); ++i) {
    const Task& task = graph.tasks[i];
    double& end = lane_ends_[static_cast<size_t>(task.lane)];
    for (int before : task.after) end = std::max(end, ends_[static_cast<size_t>(before)]);
    end += cost_ns_(task);
    ends_.push_back(end);
  }
}

}  // namespace shoal
