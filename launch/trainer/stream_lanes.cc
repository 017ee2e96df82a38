#include "launch/trainer/stream_lanes.h"

#include <algorithm>
#include <chrono>

#include "runtime/base/status.h"

namespace shoal {

StreamLanes::StreamLanes(const Graph& graph, Stream& compute, Stream& copy, Timing timing)
    : graph_(&graph), compute_(&compute), copy_(&copy), timing_(timing), marks_(graph.tasks.size()) {
  for (const Task& task : graph.tasks) {
    for (const int before : AwaitedBy(task)) marks_[static_cast<size_t>(before)].awaited = true;
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
  if (timing_ == Timing::kYes) marks_[IndexOf(task)].began = StreamOf(task.lane).Record(Timing::kYes);
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
  for (size_t i = 0; i < marks_.size(); ++i) {
    if (!OnStream(graph_->tasks[i].lane)) continue;
    SHOAL_ASSIGN_OR_RETURN(const double began_ms, Event::Milliseconds(start_, marks_[i].began));
    SHOAL_ASSIGN_OR_RETURN(const double ended_ms, Event::Milliseconds(start_, marks_[i].ended));
    record->tasks[i].begin_ns = start_ns_ + static_cast<int64_t>(began_ms * 1e6);
    record->tasks[i].end_ns = start_ns_ + static_cast<int64_t>(ended_ms * 1e6);
    record->end_ns = std::max(record->end_ns, record->tasks[i].end_ns);
  }
  return absl::OkStatus();
}

}  // namespace shoal
