#include "models/data/prefetch.h"

#include <utility>

namespace shoal {

Prefetcher::Prefetcher(BatchSourcePtr source, const PrefetchOptions& options)
    : source_(std::move(source)),
      options_(options),
      next_read_(options.first_step),
      thread_([this] { Run(); }) {}

Prefetcher::~Prefetcher() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

absl::StatusOr<Tensor> Prefetcher::Next(int64_t step) {
  MutexLock lock(&mutex_);
  const int64_t first = ready_.empty() ? next_read_ : ready_.front().step;
  if (step != first) {
    ready_.clear();
    next_read_ = step;
    ++restarts_;
    changed_.NotifyAll();
  }
  while (ready_.empty()) changed_.Wait(&mutex_);
  absl::StatusOr<Tensor> rows = std::move(ready_.front().rows);
  ready_.pop_front();
  changed_.NotifyAll();
  return rows;
}

void Prefetcher::Run() {
  while (true) {
    int64_t step, restarts;
    {
      MutexLock lock(&mutex_);
      while (!stop_ && ready_.size() >= kDepth) changed_.Wait(&mutex_);
      if (stop_) return;
      step = next_read_;
      restarts = restarts_;
    }
    Tensor rows = Empty({options_.rows, source_->seq() + 1}, DType::kI32);
    absl::Status status = source_->ReadRows(step, options_.row_begin, rows);
    MutexLock lock(&mutex_);
    if (restarts != restarts_) continue;
    ready_.push_back({step, status.ok() ? absl::StatusOr<Tensor>(std::move(rows)) : std::move(status)});
    next_read_ = step + 1;
    changed_.NotifyAll();
  }
}

}  // namespace shoal
