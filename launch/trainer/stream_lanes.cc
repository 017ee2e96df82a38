#include "launch/trainer/stream_lanes.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "runtime/base/status.h"

namespace shoal {

StreamLanes::StreamLanes(const Graph& graph, Stream& compute, Stream& copy, Timing timing)
    : graph_(&graph), compute_(&compute), copy_(&copy), timing_(timing), marks_(graph.tasks.size()) {
  for (const Task& task : graph.tasks) {
    for (const int before : AwaitedBy(task)) marks_[static_cast<size_t>(before)].awaited = true;
    for (const int before : task.after) {
      if (graph.tasks[static_cast<size_t>(before)].lane != task.lane) marks_[IndexOf(task)].follows = false;
    }
  }
}

absl::InlinedVector<int, 2> StreamLanes::AwaitedBy(const Task& task) const {
  absl::InlinedVector<int, 2> awaited;
  for (const Lane lane : {Lane::kCompute, Lane::kCopy}) {
    int last = -1;
    for (const int before : task.after) {
      if (lane != task.lane && graph_->tasks[static_cast<size_t>(before)].lane == lane) last = std::max(last, before);
    }
    if (last >= 0) awaited.push_back(last);
  }
  return awaited;
}

void StreamLanes::Start() {
  if (timing_ == Timing::kNo) return;
  start_ = compute_->Record(Timing::kYes);
  start_ns_ = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

absl::Status StreamLanes::Begin(const Task& task) {
  for (const int before : AwaitedBy(task)) {
    const Event& done = marks_[static_cast<size_t>(before)].done;
    if (OnStream(task.lane)) {
      StreamOf(task.lane).WaitFor(done);
    } else {
      SHOAL_RETURN_IF_ERROR(done.Wait(), "after ", Name(graph_->tasks[static_cast<size_t>(before)]));
    }
  }
  if (!OnStream(task.lane)) return absl::OkStatus();
  Marks& marks = marks_[IndexOf(task)];
  if (timing_ == Timing::kYes && !marks.follows) marks.began = StreamOf(task.lane).Record(Timing::kYes);
  return StreamOf(task.lane).status();
}

absl::Status StreamLanes::End(const Task& task) {
  if (!OnStream(task.lane)) return absl::OkStatus();
  Marks& marks = marks_[IndexOf(task)];
  Stream& stream = StreamOf(task.lane);
  if (timing_ == Timing::kYes) marks.ended = stream.Record(Timing::kYes);
  if (marks.awaited) marks.done = stream.Record();
  return stream.status();
}

absl::Status StreamLanes::SetTimes(StepRecord* record) const {
  const auto ns_of = [&](const Event& event) -> absl::StatusOr<int64_t> {
    SHOAL_ASSIGN_OR_RETURN(const double ms, Event::Milliseconds(start_, event));
    return start_ns_ + static_cast<int64_t>(ms * 1e6);
  };
  record->begin_ns = std::min(record->begin_ns, start_ns_);
  std::array<int64_t, kLanes> last;
  last.fill(start_ns_);
  for (size_t i = 0; i < marks_.size(); ++i) {
    const Lane lane = graph_->tasks[i].lane;
    if (!OnStream(lane)) continue;
    TaskRecord& task = record->tasks[i];
    task.begin_ns = last[static_cast<size_t>(lane)];
    if (!marks_[i].follows) {
      SHOAL_ASSIGN_OR_RETURN(task.begin_ns, ns_of(marks_[i].began));
    }
    SHOAL_ASSIGN_OR_RETURN(task.end_ns, ns_of(marks_[i].ended));
    last[static_cast<size_t>(lane)] = task.end_ns;
    record->end_ns = std::max(record->end_ns, task.end_ns);
  }
  return absl::OkStatus();
}

}  // namespace shoal
