// The operations of one group: they run one after the other, in the order in which they were issued. They run
// on the queue's own thread (started by the first operation), or on a thread that awaits one of them: waking
// a sleeping thread costs 25 us, more than a small operation. Thread-safe.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "collectives/engine/op.h"
#include "runtime/base/mutex.h"

namespace shoal {

class OpQueue : public WorkRunner, public std::enable_shared_from_this<OpQueue> {
 public:
  // Borrows `engine` until Close(). `on_start` is called as each operation starts.
  OpQueue(Engine* engine, std::function<void(const Op&)> on_start)
      : engine_(engine), on_start_(std::move(on_start)) {}

  Work Push(Op op);
  void Help(QueuedWork& state, int64_t deadline_ns) override;
  bool Idle();
  // Waits until no operation is left, then joins the thread. Call once, when the operations are bound to end.
  void Close();

 private:
  void RunThread();
  void RunFront() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetDeadline() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Engine* const engine_;
  const std::function<void(const Op&)> on_start_;
  std::atomic<int64_t> deadline_ns_;  // The earliest in the queue.
  Mutex mutex_;
  CondVar changed_;
  std::deque<Op> ops_ ABSL_GUARDED_BY(mutex_);  // The front one may be running.
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  int finishing_ ABSL_GUARDED_BY(mutex_) = 0;  // Operations off the queue whose callbacks still run.
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t issued_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
