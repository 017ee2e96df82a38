// Reads the rows of the next steps ahead of the training loop, on a thread of its own. Hides the thread and
// the queue. What Next() returns depends on the source and the step alone.
#pragma once

#include <cstdint>
#include <deque>
#include <thread>

#include "models/data/batches.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

struct PrefetchOptions {
  // The rows that this rank reads of every step.
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t first_step = 0;
};

class Prefetcher {
 public:
  // Starts reading first_step and the step after it.
  Prefetcher(BatchSourcePtr source, const PrefetchOptions& options);
  // Blocks until the read under way, if any, has ended.
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Rows of `step`, i32 [rows, seq + 1], or the error of BatchSource::ReadRows. Fast when `step` follows the
  // one asked for last; any other step, an earlier one too, is read afresh, and reading ahead goes on from
  // there. Blocks until the rows are there. One thread at a time.
  absl::StatusOr<Tensor> Next(int64_t step);

 private:
  struct Entry {
    int64_t step;
    absl::StatusOr<Tensor> rows;
  };
  static constexpr size_t kDepth = 2;

  void Run();

  const BatchSourcePtr source_;
  const PrefetchOptions options_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<Entry> ready_ ABSL_GUARDED_BY(mutex_);  // Consecutive steps, at most kDepth.
  int64_t next_read_ ABSL_GUARDED_BY(mutex_);        // The step to read, or being read.
  int64_t restarts_ ABSL_GUARDED_BY(mutex_) = 0;     // A read that began before a restart is dropped.
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // Last: it uses the members above.
};

}  // namespace shoal
