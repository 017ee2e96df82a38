#include "parallel/schedule/lane_order.h"

#include <algorithm>

namespace shoal {

LaneOrder::LaneOrder(const Graph& graph, Lane lane) : graph_(&graph) {
  const bool apart = graph.waves_apart && IsLocal(lane);
  tracks_.resize(1);
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const Task& task = graph.tasks[i];
    if (task.lane != lane) continue;
    const size_t track = apart ? static_cast<size_t>(task.wave + 1) : 0;
    if (tracks_.size() <= track) tracks_.resize(track + 1);
    tracks_[track].push_back(static_cast<int>(i));
  }
}

int LaneOrder::Cursor::Take(const std::vector<uint8_t>& done) {
  int first = kNone;
  Place* taken = nullptr;
  for (size_t track = 0; track < places_.size(); ++track) {
    Place& place = places_[track];
    const std::vector<int>& tasks = order_->tracks_[track];
    if (place.next == tasks.size()) continue;
    const int task = tasks[place.next];
    if (first != kNone && task > first) continue;
    const auto& after = order_->graph_->tasks[static_cast<size_t>(task)].after;
    while (place.waited < after.size() && done[static_cast<size_t>(after[place.waited])] != 0) ++place.waited;
    if (place.waited < after.size()) continue;
    first = task;
    taken = &place;
  }
  if (taken != nullptr) *taken = {taken->next + 1, 0};
  return first;
}

bool LaneOrder::Cursor::Awaits(int task) const {
  for (size_t track = 0; track < places_.size(); ++track) {
    const Place& place = places_[track];
    const std::vector<int>& tasks = order_->tracks_[track];
    if (place.next == tasks.size()) continue;
    const auto& after = order_->graph_->tasks[static_cast<size_t>(tasks[place.next])].after;
    if (place.waited < after.size() && after[place.waited] == task) return true;
  }
  return false;
}

bool LaneOrder::Cursor::AllTaken() const {
  for (size_t track = 0; track < places_.size(); ++track) {
    if (places_[track].next < order_->tracks_[track].size()) return false;
  }
  return true;
}

}  // namespace shoal
