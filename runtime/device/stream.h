// Where kernels run. A stream is an order of work on one device; every kernel takes one as its last argument. The CPU
// stream runs work at once, on the calling thread and the process's OpenMP team. A kernel never returns an error: the
// first failure poisons the stream, and whoever needs the results asks status().
#pragma once

#include "absl/status/status.h"

namespace shoal {

class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void Fail(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }
  const absl::Status& status() const { return status_; }

 private:
  absl::Status status_;
};

}  // namespace shoal
