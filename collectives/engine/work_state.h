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

class QueuedWork;

// Runs operations on threads that wait for them.
class WorkRunner {
 public:
  virtual ~WorkRunner() = default;
  // Runs operations on this thread until `work` is done, `deadline_ns` has passed or another thread runs them.
  virtual void Help(QueuedWork& work, int64_t deadline_ns) = 0;
};

// What a handle asks of an operation, as Work says it. Thread-safe.
struct Work::State {
  virtual ~State() = default;
  virtual bool Done() = 0;
  virtual absl::Status Await(absl::Time deadline) = 0;
  virtual void OnDone(std::function<void(const absl::Status&)> callback) = 0;
};

// An operation of a queue.
class QueuedWork final : public Work::State {
 public:
  // The queue that runs the operation, so that a thread which waits for it can do so instead of waking another one. Weak: a
  // handle may outlive the communicator.
  explicit QueuedWork(std::weak_ptr<WorkRunner> queue) : queue_(std::move(queue)) {}

  bool Done() override { return done_.load(std::memory_order_acquire); }
  absl::Status Await(absl::Time deadline) override;
  void OnDone(std::function<void(const absl::Status&)> callback) override;

  // The queue's own, set before anybody else has the handle: when the operation was issued, its slot in AwaitHabits
  // (engine/executor.h), and whether a thread is woken for it.
  int64_t issued_ns = 0;
  size_t habit = 0;
  bool wakes = false;

  // Ends the operation: wakes who waits and runs the callbacks on this thread.
  void Finish(const absl::Status& result);

 private:
  const std::weak_ptr<WorkRunner> queue_;
  std::atomic<bool> done_{false};  // Set under the mutex; status_ is final once it is true.
  Mutex mutex_;
  CondVar ended_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::function<void(const absl::Status&)>> callbacks_ ABSL_GUARDED_BY(mutex_);
};

// A handle of an operation that ended before it began.
Work EndedWork(const absl::Status& status);

}  // namespace shoal
