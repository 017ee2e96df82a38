#include "collectives/engine/work_state.h"

#include "collectives/engine/op_queue.h"
#include "collectives/transport/clock.h"

namespace shoal {
namespace {

// Before a waiting thread goes to sleep: about as long as waking it up would take.
constexpr int64_t kSpinNs = 20'000;

}  // namespace

void Work::State::Finish(const absl::Status& result) {
  std::vector<std::function<void(const absl::Status&)>> to_run;
  {
    MutexLock lock(&mutex);
    status = result;
    done.store(true, std::memory_order_release);
    to_run.swap(callbacks);
    ended.NotifyAll();
  }
  for (const auto& callback : to_run) callback(result);
}

Work EndedWork(const absl::Status& status) {
  if (status.ok()) return Work();
  auto state = std::make_shared<Work::State>();
  state->Finish(status);
  return Work(std::move(state));
}

bool Work::Done() const { return state_ == nullptr || state_->done.load(std::memory_order_acquire); }

absl::Status Work::Await(absl::Time deadline) const {
  if (state_ == nullptr) return absl::OkStatus();
  const int64_t deadline_ns = SteadyDeadlineNs(deadline);
  // A thread that helps may stay until the operation ends, so only one without a deadline of its own does.
  if (!Done() && deadline_ns == kNeverNs) {
    if (std::shared_ptr<OpQueue> queue = state_->queue.lock()) queue->Help(*state_);
  }
  for (const int64_t end = NowNs() + kSpinNs; !Done() && NowNs() < end;) std::this_thread::yield();
  MutexLock lock(&state_->mutex);
  while (!state_->done.load(std::memory_order_relaxed)) {
    if (deadline_ns == kNeverNs) {
      state_->ended.Wait(&state_->mutex);
    } else if (!state_->ended.WaitUntil(&state_->mutex, SteadyTime(deadline_ns)) &&
               !state_->done.load(std::memory_order_relaxed)) {
      return absl::DeadlineExceededError("the operation goes on");
    }
  }
  return state_->status;
}

void Work::OnDone(std::function<void(const absl::Status&)> callback) const {
  absl::Status status;
  if (state_ != nullptr) {
    MutexLock lock(&state_->mutex);
    if (!state_->done.load(std::memory_order_relaxed)) {
      state_->callbacks.push_back(std::move(callback));
      return;
    }
    status = state_->status;
  }
  callback(status);
}

}  // namespace shoal
