#include "collectives/engine/work_state.h"

#include <thread>

#include "collectives/transport/clock.h"

namespace shoal {
namespace {

// Before a waiting thread goes to sleep: about as long as waking it up would take.
constexpr int64_t kSpinNs = 20'000;

}  // namespace

void QueuedWork::Finish(const absl::Status& result) {
  std::vector<std::function<void(const absl::Status&)>> to_run;
  {
    MutexLock lock(&mutex_);
    status_ = result;
    done_.store(true, std::memory_order_release);
    to_run.swap(callbacks_);
    ended_.NotifyAll();
  }
  for (const auto& callback : to_run) callback(result);
}

absl::Status QueuedWork::Await(absl::Time deadline) {
  const int64_t deadline_ns = SteadyDeadlineNs(deadline);
  if (!Done()) {
    if (std::shared_ptr<WorkRunner> queue = queue_.lock()) queue->Help(*this, deadline_ns);
  }
  for (const int64_t end = NowNs() + kSpinNs; !Done() && NowNs() < end;) std::this_thread::yield();
  MutexLock lock(&mutex_);
  while (!done_.load(std::memory_order_relaxed)) {
    if (deadline_ns == kNeverNs) {
      ended_.Wait(&mutex_);
    } else if (!ended_.WaitUntil(&mutex_, SteadyTime(deadline_ns)) && !done_.load(std::memory_order_relaxed)) {
      return absl::DeadlineExceededError("the operation goes on");
    }
  }
  return status_;
}

void QueuedWork::OnDone(std::function<void(const absl::Status&)> callback) {
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    if (!done_.load(std::memory_order_relaxed)) {
      callbacks_.push_back(std::move(callback));
      return;
    }
    status = status_;
  }
  callback(status);
}

Work EndedWork(const absl::Status& status) {
  if (status.ok()) return Work();
  auto state = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  state->Finish(status);
  return Work(std::move(state));
}

bool Work::Done() const { return state_ == nullptr || state_->Done(); }

absl::Status Work::Await(absl::Time deadline) const {
  return state_ == nullptr ? absl::OkStatus() : state_->Await(deadline);
}

void Work::OnDone(std::function<void(const absl::Status&)> callback) const {
  if (state_ == nullptr) return callback(absl::OkStatus());
  state_->OnDone(std::move(callback));
}

}  // namespace shoal
