#include "launch/bench/child_process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace shoal {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(2);  // Between SIGTERM and SIGKILL.
constexpr off_t kTailBytes = 600;

absl::Status Unavailable(const char* what) {
  return absl::UnavailableError(absl::StrCat(what, " for a child process: ", strerror(errno)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(const std::function<int()>& body) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return Unavailable("pipe");
  const int errors = memfd_create("stderr", MFD_CLOEXEC);
  const pid_t parent = getpid(), pid = errors < 0 ? -1 : fork();
  if (pid == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);  // It ended before it could be tied to us.
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(null, STDIN_FILENO);
    dup2(ends[1], STDOUT_FILENO);
    dup2(errors, STDERR_FILENO);
    _exit(body());
  }
  const int error = errno;
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    if (errors >= 0) close(errors);
    errno = error;
    return Unavailable("fork");
  }
  setpgid(pid, pid);  // Both sides, so that it holds for whoever comes first.
  return std::unique_ptr<ChildProcess>(new ChildProcess(pid, ends[0], errors));
}

ChildProcess::~ChildProcess() {
  kill(-pid_, SIGTERM);
  (void)Reap(kPatience);
  kill(-pid_, SIGKILL);
  (void)Reap(absl::InfiniteDuration());
  close(stdout_fd_);
  close(stderr_fd_);
}

ChildProcess::Read ChildProcess::ReadLine(absl::Duration timeout, std::string* line) {
  const absl::Time deadline = absl::Now() + timeout;
  while (true) {
    const size_t end = pending_.find('\n');
    if (end != std::string::npos) {
      *line = pending_.substr(0, end);
      pending_.erase(0, end + 1);
      return Read::kLine;
    }
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left_ms <= 0) return Read::kTimeout;
    pollfd entry = {stdout_fd_, POLLIN, 0};
    const int ready = poll(&entry, 1, static_cast<int>(std::min<int64_t>(left_ms, 1'000'000)));
    if (ready == 0 || (ready < 0 && errno == EINTR)) continue;
    char bytes[4096];
    const ssize_t count = read(stdout_fd_, bytes, sizeof bytes);
    if (count <= 0) return Read::kEnd;
    pending_.append(bytes, count);
  }
}

std::string ChildProcess::Result() {
  (void)Reap(absl::InfiniteDuration());
  if (WIFEXITED(wait_status_) && WEXITSTATUS(wait_status_) == 0) return "";
  const std::string how = WIFSIGNALED(wait_status_)
                              ? absl::StrCat("killed by signal ", WTERMSIG(wait_status_))
                              : absl::StrCat("exit status ", WEXITSTATUS(wait_status_));
  const std::string tail = StderrTail();
  return tail.empty() ? how : absl::StrCat(how, ": ", tail);
}

bool ChildProcess::Reap(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!reaped_) {
    const bool wait = timeout == absl::InfiniteDuration();
    const pid_t ended = waitpid(pid_, &wait_status_, wait ? 0 : WNOHANG);
    reaped_ = ended == pid_ || (ended < 0 && errno != EINTR);
    if (reaped_ || absl::Now() >= deadline) break;
    if (!wait) absl::SleepFor(absl::Milliseconds(5));
  }
  return reaped_;
}

std::string ChildProcess::StderrTail() const {
  const off_t size = lseek(stderr_fd_, 0, SEEK_END);
  char bytes[kTailBytes];
  const ssize_t count = pread(stderr_fd_, bytes, kTailBytes, std::max<off_t>(0, size - kTailBytes));
  return count <= 0 ? "" : std::string(absl::StripAsciiWhitespace(absl::string_view(bytes, count)));
}

}  // namespace shoal
