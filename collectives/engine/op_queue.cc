#include "collectives/engine/op_queue.h"

#include <algorithm>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {

Work OpQueue::Push(Op op) {
  auto state = std::make_shared<QueuedWork>(weak_from_this());
  op.state = state;
  bool wake = false;
  {
    MutexLock lock(&mutex_);
    op.seq = ++issued_;
    ops_.push_back(std::move(op));
    SetDeadline();
    if (!thread_.joinable()) thread_ = std::thread([this] { RunThread(); });
    wake = !running_;  // Who runs one looks for the next.
  }
  if (wake) changed_.NotifyAll();
  return Work(std::move(state));
}

void OpQueue::SetDeadline() {
  int64_t earliest = kNeverNs;
  for (const Op& op : ops_) earliest = std::min(earliest, op.deadline_ns);
  deadline_ns_.store(earliest, std::memory_order_relaxed);
}

void OpQueue::RunFront() {
  running_ = true;
  Op& op = ops_.front();  // A deque's elements stay where they are while others are pushed.
  mutex_.Unlock();
  on_start_(op);
  const absl::Status status = Annotate(engine_->Run(op, deadline_ns_), OpName(op));
  // Let go of the tensors before anybody is told, so that nobody finds them in use.
  op.in = Tensor();
  op.out = Tensor();
  std::shared_ptr<QueuedWork> state = std::move(op.state);
  mutex_.Lock();
  ops_.pop_front();
  SetDeadline();
  running_ = false;  // Callbacks may await later operations of this queue.
  ++finishing_;
  mutex_.Unlock();
  state->Finish(status);
  mutex_.Lock();
  --finishing_;
}

void OpQueue::Help(QueuedWork& state, int64_t deadline_ns) {
  if (deadline_ns != kNeverNs) return;  // An engine does not stop in the middle.
  bool wake = false;
  {
    MutexLock lock(&mutex_);
    if (running_) return;
    while (!running_ && !ops_.empty() && !state.Done()) RunFront();
    wake = !ops_.empty() || closing_;
  }
  if (wake) changed_.NotifyAll();
}

void OpQueue::RunThread() {
  MutexLock lock(&mutex_);
  while (true) {
    while (running_ || ops_.empty()) {
      if (closing_ && ops_.empty() && finishing_ == 0) return;
      changed_.Wait(&mutex_);
    }
    RunFront();
  }
}

bool OpQueue::Idle() {
  MutexLock lock(&mutex_);
  return ops_.empty();
}

void OpQueue::Close() {
  std::thread thread;
  {
    MutexLock lock(&mutex_);
    closing_ = true;
    thread = std::move(thread_);
  }
  changed_.NotifyAll();
  if (thread.joinable()) thread.join();  // It leaves when nothing is queued, running or finishing.
}

}  // namespace shoal
