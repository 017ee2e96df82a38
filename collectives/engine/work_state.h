// The inside of a Work handle.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "collectives/communicator.h"
#include "runtime/base/mutex.h"

namespace shoal {

class OpQueue;

struct Work::State {
  // The queue that runs the operation, so that a thread which waits for it can do so instead of waking
  // another one. Weak: a handle may outlive the communicator.
  std::weak_ptr<OpQueue> queue;

  std::atomic<bool> done{false};  // Set under the mutex; `status` is final once it is true.
  Mutex mutex;
  CondVar ended;
  absl::Status status ABSL_GUARDED_BY(mutex);
  std::vector<std::function<void(const absl::Status&)>> callbacks ABSL_GUARDED_BY(mutex);

  // Ends the operation: wakes who waits and runs the callbacks on this thread.
  void Finish(const absl::Status& result);
};

// A handle of an operation that ended before it began.
Work EndedWork(const absl::Status& status);

}  // namespace shoal
