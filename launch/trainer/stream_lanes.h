// The lanes of a step graph on the streams of a device: a task of the compute or of the copy lane has run when its work is on its
// stream, and what must come after it waits there, not here. Where a task of another lane depends on it an event marks its end:
// the other stream waits for that event, and a lane of communication, which the host drives, blocks its thread for it. So the host runs
// ahead of the device, as far as communication and what the host reads allow.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"
#include "runtime/device/stream.h"

namespace shoal {

// Of one run after the other of a graph, which it borrows, and both streams. Begin and End are called by the lane of the task, as the
// executor calls its bodies; the others between runs.
class StreamLanes {
 public:
  // kYes: events also tell when tasks ran.
  StreamLanes(const Graph& graph, Stream& compute, Stream& copy, Timing timing);

  // Before the first task, with both streams idle: times count from now.
  void Start();
  // Around the body of a task. Failures of the streams: what the task waits for, or what its body put there.
  absl::Status Begin(const Task& task);
  absl::Status End(const Task& task);
  // When both streams have been waited for: when tasks of the streams ran, on the record's clock.
  absl::Status SetTimes(StepRecord* record) const;

 private:
  bool OnStream(Lane lane) const { return lane == Lane::kCompute || lane == Lane::kCopy; }
  Stream& StreamOf(Lane lane) { return lane == Lane::kCompute ? *compute_ : *copy_; }
  // Tasks of streams, not its own, that it depends on: of each the last, which stands for those before it.
  absl::InlinedVector<int, 2> AwaitedBy(const Task& task) const;
  size_t IndexOf(const Task& task) const { return static_cast<size_t>(&task - graph_->tasks.data()); }

  struct Marks {
    bool awaited = false;
    bool follows = true;  // It waits for its own lane alone, so begins where the task before it ends.
    Event done;
    Event began, ended;  // With times.
  };

  const Graph* graph_;
  Stream* compute_;
  Stream* copy_;
  const Timing timing_;
  std::vector<Marks> marks_;  // By task.
  Event start_;
  int64_t start_ns_ = 0;
};

}  // namespace shoal
