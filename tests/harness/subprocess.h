// A real process under a test's control: started with arguments, environment and folder, its output captured,
// signalled, awaited with a time limit, and never left behind: it leads its own process group, which dies
// with the Subprocess, and the kernel kills the process when the thread that started it ends (so start it
// from a thread that outlives it).
//
// Thread-safe, except that one Subprocess has one waiter.
#pragma once

#include <sys/types.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal::testing {

struct SubprocessOptions {
  std::vector<std::string> args = {};           // args[0]: a path, or a name looked up in PATH.
  std::map<std::string, std::string> env = {};  // On top of the test's own environment.
  std::vector<std::string> unset_env = {};      // Taken from the test's own environment.
  std::string cwd = {};                         // Empty: the test's own.
};

struct ProcessResult {
  int exit_code = -1;  // -1: ended by `signal`.
  int signal = 0;
  std::string out;  // All of its stdout, and of what its children wrote until now.
  std::string err;
  bool ok() const { return exit_code == 0; }
  std::string ToString() const;  // For assertion messages: how it ended and what it printed.
};

class Subprocess {
 public:
  // stdin is /dev/null; stdout and stderr are pipes. NOT_FOUND: no such command; errors name it.
  static absl::StatusOr<std::unique_ptr<Subprocess>> Start(SubprocessOptions options);
  ~Subprocess();  // SIGKILL to the whole process group; reaps the process.
  Subprocess(const Subprocess&) = delete;
  Subprocess& operator=(const Subprocess&) = delete;

  pid_t pid() const;
  // To the process alone (SIGKILL, SIGSTOP, ...). Does nothing once it was reaped.
  void Signal(int signal);
  // To the process and all in its group.
  void SignalGroup(int signal);
  // Output so far.
  std::string out() const;
  std::string err() const;
  // Blocks until stdout or stderr contains `text`. DEADLINE_EXCEEDED, or UNAVAILABLE when all output has
  // ended without it; both show the output.
  absl::Status WaitForOutput(std::string_view text, absl::Duration timeout);
  // Blocks until the process has ended; again, returns the same. DEADLINE_EXCEEDED: it runs on; the message
  // shows its output.
  absl::StatusOr<ProcessResult> Wait(absl::Duration timeout);

 private:
  struct Impl;
  explicit Subprocess(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Start and Wait; kills the process group when `timeout` has passed.
absl::StatusOr<ProcessResult> RunProcess(SubprocessOptions options, absl::Duration timeout);

// The path of `command` in PATH, or empty.
std::string FindCommand(std::string_view command);

}  // namespace shoal::testing
