// A child of this process in a process group of its own: its standard output comes line by line, its standard
// error is kept for when it fails, and it never outlives the caller's interest. Not thread-safe; call from a
// process without other threads.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

class ChildProcess {
 public:
  // `body` runs in the child, which ends with what it returns. UNAVAILABLE: no process or no descriptor.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(const std::function<int()>& body);
  ~ChildProcess();  // Ends what is left of the group: SIGTERM, and after two seconds SIGKILL.
  ChildProcess(const ChildProcess&) = delete;

  enum class Read { kLine, kEnd, kTimeout };
  // Blocks for `timeout` at most.
  Read ReadLine(absl::Duration timeout, std::string* line);
  // After kEnd: blocks until the child has ended. "": it returned 0; otherwise how it ended and the end of
  // its stderr.
  std::string Result();

 private:
  ChildProcess(pid_t pid, int stdout_fd, int stderr_fd)
      : pid_(pid), stdout_fd_(stdout_fd), stderr_fd_(stderr_fd) {}
  bool Reap(absl::Duration timeout);
  std::string StderrTail() const;

  const pid_t pid_;
  const int stdout_fd_, stderr_fd_;
  bool reaped_ = false;
  int wait_status_ = 0;
  std::string pending_;
};

}  // namespace shoal
