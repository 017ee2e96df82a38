// Why a job failed: which rank to blame, and the message that says so. Pure.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"

namespace shoal {

// How one rank ended otherwise than with exit code 0.
struct RankFailure {
  enum class Kind { kExited, kKilled, kStopped };  // kStopped: the process is there and does nothing.

  int rank = 0;
  int local_rank = 0;
  int pid = 0;
  Kind kind = Kind::kExited;
  int code = 0;  // Exit code, or the signal.
  bool core_dumped = false;
  // The launcher had already sent signals: the end says nothing about the cause, unless it is a crash.
  bool after_shutdown = false;
  absl::Duration at;                    // Since the ranks were started.
  absl::Duration stopped_for;           // Of kStopped.
  std::string log_path;                 // Empty: no log file.
  std::vector<std::string> last_lines;  // Of its stderr and, but for rank 0, its stdout.
};

// "killed by signal 9 (SIGKILL)", "exited with code 3", "stopped by SIGSTOP for 3.0 s".
std::string Describe(const RankFailure& failure);

// The index of the rank to blame. The first by time; but a rank that only lost a peer (kExitPeerLost), or
// that the launcher ended, never while there is another. `failures` is not empty.
size_t ChooseCulprit(absl::Span<const RankFailure> failures);

// Several lines, the last one ended: the culprit (rank, local rank, pid, host), what happened, its last
// lines, and in one line how the others ended.
std::string Verdict(absl::Span<const RankFailure> failures, int world_size, const std::string& host);

}  // namespace shoal
