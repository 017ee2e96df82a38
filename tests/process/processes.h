// What the process tests ask the kernel: a launcher's ranks, and whether processes are gone.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal::testing {

// A process that cannot be mistaken for a later one with the same number. Movable.
class ProcessHandle {
 public:
  explicit ProcessHandle(pid_t pid);  // Gone already: fine.
  ~ProcessHandle();
  ProcessHandle(ProcessHandle&& other) noexcept;
  ProcessHandle& operator=(ProcessHandle&& other) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // Blocks until the process has ended. DEADLINE_EXCEEDED: it runs on after `timeout`.
  absl::Status WaitGone(absl::Duration timeout) const;

 private:
  pid_t pid_;
  int pidfd_;
};

// Blocks until `launcher` has `count` children that know their ranks, and returns them in that order.
// DEADLINE_EXCEEDED.
absl::StatusOr<std::vector<ProcessHandle>> WaitForRanks(pid_t launcher, size_t count, absl::Duration timeout);

// All of them, within `timeout` altogether.
absl::Status WaitAllGone(const std::vector<ProcessHandle>& processes, absl::Duration timeout);

// A TCP port that was free a moment ago.
int ProbablyFreePort();

// Words separated by spaces.
std::vector<std::string> Words(const std::string& text);

}  // namespace shoal::testing
