// Starts the process of one rank so that it can never outlive the launcher.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace shoal {

struct RankCommand {
  absl::Span<const std::string> argv;         // argv[0] is looked up in PATH if it has no '/'.
  absl::Span<const std::string> environment;  // "NAME=value", all of it.
  bool inherit_stdout = false;                // Otherwise a pipe.
  sigset_t signal_mask = {};                  // That the rank starts with.
};

struct RankProcess {
  pid_t pid = -1;
  int stdout_fd = -1;  // Read ends, non-blocking, owned by the caller; -1: inherited.
  int stderr_fd = -1;
};

// Returns when the program runs, or says why it does not (the exec's error). The rank leads its own process
// group, so that a Ctrl-C at the terminal reaches the launcher alone; its stdin is empty; and the kernel
// kills it when the calling thread ends, however that happens: call it from a thread that lives as long as
// the launcher.
absl::StatusOr<RankProcess> StartRank(const RankCommand& command);

}  // namespace shoal
