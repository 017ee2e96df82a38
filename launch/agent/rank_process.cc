#include "launch/agent/rank_process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <utility>
#include <vector>

#include "runtime/base/status.h"

namespace shoal {
namespace {

class Fd {
 public:
  Fd() = default;
  ~Fd() { Reset(-1); }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  void Reset(int fd) {
    if (fd_ >= 0) close(fd_);
    fd_ = fd;
  }
  int get() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

struct Pipe {
  Fd read;
  Fd write;
};

absl::Status Open(Pipe* pipe) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe of a rank");
  pipe->read.Reset(fds[0]);
  pipe->write.Reset(fds[1]);
  return absl::OkStatus();
}

std::vector<char*> Pointers(absl::Span<const std::string> texts) {
  std::vector<char*> pointers;
  for (const std::string& text : texts) pointers.push_back(const_cast<char*>(text.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

struct ChildPlan {
  char** argv;
  char** environment;
  pid_t launcher;
  int stdout_fd;  // -1: inherited.
  int stderr_fd;
  int error_fd;
  const sigset_t* signal_mask;
};

// In the child, between fork and exec.
[[noreturn]] void BecomeRank(const ChildPlan& plan) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != plan.launcher) _exit(127);  // The launcher died before the line above.
  const int null_fd = open("/dev/null", O_RDONLY);
  if (null_fd >= 0) dup2(null_fd, STDIN_FILENO);
  if (null_fd > STDERR_FILENO) close(null_fd);
  if (plan.stdout_fd >= 0) dup2(plan.stdout_fd, STDOUT_FILENO);
  dup2(plan.stderr_fd, STDERR_FILENO);
  signal(SIGPIPE, SIG_DFL);
  // As a background group, with "stty tostop", rank 0 would be stopped for writing to the terminal.
  signal(SIGTTOU, SIG_IGN);
  sigprocmask(SIG_SETMASK, plan.signal_mask, nullptr);
  execvpe(plan.argv[0], plan.argv, plan.environment);
  const int error_number = errno;
  if (write(plan.error_fd, &error_number, sizeof(error_number)) < 0) _exit(126);
  _exit(127);
}

// 0 once exec has closed the other end.
int ReadExecError(int fd) {
  int error_number = 0;
  ssize_t bytes = 0;
  do {
    bytes = read(fd, &error_number, sizeof(error_number));
  } while (bytes < 0 && errno == EINTR);
  return bytes == sizeof(error_number) ? error_number : 0;
}

}  // namespace

absl::StatusOr<RankProcess> StartRank(const RankCommand& command) {
  Pipe out;
  Pipe err;
  Pipe error;
  if (!command.inherit_stdout) SHOAL_RETURN_IF_ERROR(Open(&out));
  SHOAL_RETURN_IF_ERROR(Open(&err));
  SHOAL_RETURN_IF_ERROR(Open(&error));
  std::vector<char*> argv = Pointers(command.argv);
  std::vector<char*> environment = Pointers(command.environment);
  const ChildPlan plan = {argv.data(),       environment.data(),  getpid(), out.write.get(), err.write.get(),
                          error.write.get(), &command.signal_mask};
  const pid_t pid = fork();
  if (pid < 0) return ErrnoStatus(errno, "starting a process");
  if (pid == 0) BecomeRank(plan);
  setpgid(pid, pid);  // Also here: whoever comes first.
  error.write.Reset(-1);
  if (const int error_number = ReadExecError(error.read.get()); error_number != 0) {
    waitpid(pid, nullptr, 0);
    return ErrnoStatus(error_number, absl::StrCat("cannot execute ", command.argv[0]));
  }
  RankProcess process;
  process.pid = pid;
  process.stdout_fd = out.read.Release();
  process.stderr_fd = err.read.Release();
  for (const int fd : {process.stdout_fd, process.stderr_fd}) {
    if (fd >= 0) fcntl(fd, F_SETFL, O_NONBLOCK);
  }
  return process;
}

}  // namespace shoal
