#include "tests/harness/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

extern char** environ;

namespace shoal::testing {
namespace {

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { Close(); }
  int get() const { return fd_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

struct Pipe {
  Fd read, write;
};

Pipe NewPipe() {
  std::array<int, 2> ends{};
  SHOAL_CHECK_EQ(pipe2(ends.data(), O_CLOEXEC), 0) << std::strerror(errno);
  return {Fd(ends[0]), Fd(ends[1])};
}

std::vector<std::string> Environment(const SubprocessOptions& options) {
  std::map<std::string, std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const size_t equals = text.find('=');
    merged[text.substr(0, equals)] = equals == std::string::npos ? "" : text.substr(equals + 1);
  }
  for (const std::string& name : options.unset_env) merged.erase(name);
  for (const auto& [name, value] : options.env) merged[name] = value;
  std::vector<std::string> lines;
  for (const auto& [name, value] : merged) lines.push_back(name + "=" + value);
  return lines;
}

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

// Everything the child needs, made before fork: between fork and exec only async-signal-safe calls are
// allowed.
struct ChildPlan {
  char* const* argv;
  char* const* envp;
  const char* cwd;  // nullptr: stay.
  int out, err, failure;
  pid_t parent;
};

[[noreturn]] void RunChild(const ChildPlan& plan) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != plan.parent) _exit(127);  // The parent died before the line above.
  setpgid(0, 0);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0 && dup2(null, 0) >= 0 && dup2(plan.out, 1) >= 0 && dup2(plan.err, 2) >= 0 &&
      (plan.cwd == nullptr || chdir(plan.cwd) == 0) &&
      syscall(SYS_close_range, 3U, ~0U, 4U /* CLOSE_RANGE_CLOEXEC */) == 0) {
    execvpe(plan.argv[0], plan.argv, plan.envp);
  }
  const int error = errno;
  if (write(plan.failure, &error, sizeof(error)) < 0) _exit(126);
  _exit(127);
}

std::string Tail(const std::string& text) {
  constexpr size_t kShown = 4000;
  return text.size() <= kShown ? text : "..." + text.substr(text.size() - kShown);
}

}  // namespace

struct Subprocess::Impl {
  std::string command;
  pid_t pid = -1;
  Fd pidfd, out_pipe, err_pipe, stop;
  std::thread reader;
  mutable Mutex mutex;
  CondVar changed;
  std::string out ABSL_GUARDED_BY(mutex);
  std::string err ABSL_GUARDED_BY(mutex);
  bool out_ended ABSL_GUARDED_BY(mutex) = false;
  bool err_ended ABSL_GUARDED_BY(mutex) = false;
  bool reaped ABSL_GUARDED_BY(mutex) = false;
  int wait_status ABSL_GUARDED_BY(mutex) = 0;

  // Takes what a pipe holds, without blocking.
  void Drain() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (!out_ended) out_ended = DrainOne(out_pipe.get(), out);
    if (!err_ended) err_ended = DrainOne(err_pipe.get(), err);
    changed.NotifyAll();
  }
  static bool DrainOne(int fd, std::string& text) {
    std::array<char, 65536> chunk;
    while (true) {
      const ssize_t got = read(fd, chunk.data(), chunk.size());
      if (got > 0) text.append(chunk.data(), static_cast<size_t>(got));
      if (got == 0) return true;
      if (got < 0 && errno != EINTR) return false;  // EAGAIN.
    }
  }
  void ReadLoop() {
    while (true) {
      std::array<pollfd, 3> polled = {pollfd{stop.get(), POLLIN, 0}, pollfd{-1, POLLIN, 0},
                                      pollfd{-1, POLLIN, 0}};
      {
        MutexLock lock(&mutex);
        if (out_ended && err_ended) return;
        if (!out_ended) polled[1].fd = out_pipe.get();
        if (!err_ended) polled[2].fd = err_pipe.get();
      }
      poll(polled.data(), polled.size(), -1);
      if (polled[0].revents != 0) return;
      MutexLock lock(&mutex);
      Drain();
    }
  }
  bool Contains(std::string_view text) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    return out.find(text) != std::string::npos || err.find(text) != std::string::npos;
  }
  std::string Shown() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    return "\n--- stdout\n" + Tail(out) + "\n--- stderr\n" + Tail(err);
  }
  void Reap() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (reaped) return;
    SHOAL_CHECK_EQ(waitpid(pid, &wait_status, 0), pid) << std::strerror(errno);
    reaped = true;
    Drain();
  }
};

std::string ProcessResult::ToString() const {
  const std::string how =
      signal != 0 ? "signal " + std::to_string(signal) : "exit code " + std::to_string(exit_code);
  return how + "\n--- stdout\n" + Tail(out) + "\n--- stderr\n" + Tail(err);
}

absl::StatusOr<std::unique_ptr<Subprocess>> Subprocess::Start(SubprocessOptions options) {
  SHOAL_CHECK(!options.args.empty());
  auto impl = std::make_unique<Impl>();
  impl->command = options.args[0];
  std::vector<std::string> environment = Environment(options);
  const std::vector<char*> argv = Pointers(options.args);
  const std::vector<char*> envp = Pointers(environment);
  Pipe out = NewPipe(), err = NewPipe(), failure = NewPipe();
  const ChildPlan plan = {
      argv.data(),     envp.data(),     options.cwd.empty() ? nullptr : options.cwd.c_str(),
      out.write.get(), err.write.get(), failure.write.get(),
      getpid()};
  impl->pid = fork();
  SHOAL_CHECK_GE(impl->pid, 0) << std::strerror(errno);
  if (impl->pid == 0) RunChild(plan);
  out.write.Close();
  err.write.Close();
  failure.write.Close();
  int error = 0;
  if (read(failure.read.get(), &error, sizeof(error)) == sizeof(error)) {
    waitpid(impl->pid, nullptr, 0);
    return ErrnoStatus(error, "starting " + impl->command);
  }
  impl->pidfd = Fd(static_cast<int>(syscall(SYS_pidfd_open, impl->pid, 0)));
  SHOAL_CHECK_GE(impl->pidfd.get(), 0) << std::strerror(errno);
  for (const Fd* end : {&out.read, &err.read}) fcntl(end->get(), F_SETFL, O_NONBLOCK);
  impl->out_pipe = std::move(out.read);
  impl->err_pipe = std::move(err.read);
  impl->stop = Fd(eventfd(0, EFD_CLOEXEC));
  impl->reader = std::thread([raw = impl.get()] { raw->ReadLoop(); });
  return std::unique_ptr<Subprocess>(new Subprocess(std::move(impl)));
}

Subprocess::Subprocess(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Subprocess::~Subprocess() {
  kill(-impl_->pid, SIGKILL);  // The group may outlive its leader.
  Signal(SIGKILL);
  {
    MutexLock lock(&impl_->mutex);
    impl_->Reap();
  }
  const uint64_t one = 1;
  SHOAL_CHECK_EQ(write(impl_->stop.get(), &one, sizeof(one)), ssize_t{sizeof(one)});
  impl_->reader.join();
}

pid_t Subprocess::pid() const { return impl_->pid; }

void Subprocess::Signal(int signal) {
  MutexLock lock(&impl_->mutex);
  if (!impl_->reaped) kill(impl_->pid, signal);
}

void Subprocess::SignalGroup(int signal) { kill(-impl_->pid, signal); }

std::string Subprocess::out() const {
  MutexLock lock(&impl_->mutex);
  return impl_->out;
}

std::string Subprocess::err() const {
  MutexLock lock(&impl_->mutex);
  return impl_->err;
}

absl::Status Subprocess::WaitForOutput(std::string_view text, absl::Duration timeout) {
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
  MutexLock lock(&impl_->mutex);
  while (!impl_->Contains(text)) {
    if (impl_->out_ended && impl_->err_ended) {
      return absl::UnavailableError(
          absl::StrCat(impl_->command, " ended without printing '", AbslSv(text), "'", impl_->Shown()));
    }
    if (!impl_->changed.WaitUntil(&impl_->mutex, deadline) && !impl_->Contains(text)) {
      return absl::DeadlineExceededError(absl::StrCat(impl_->command, " did not print '", AbslSv(text),
                                                      "' within ", absl::FormatDuration(timeout),
                                                      impl_->Shown()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ProcessResult> Subprocess::Wait(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  pollfd polled = {impl_->pidfd.get(), POLLIN, 0};
  int ready = 0;
  do {
    const int64_t left_ms = std::max<int64_t>(0, absl::ToInt64Milliseconds(deadline - absl::Now()));
    ready = poll(&polled, 1, static_cast<int>(left_ms));
  } while (ready < 0 && errno == EINTR);
  MutexLock lock(&impl_->mutex);
  if (ready == 0 && !impl_->reaped) {
    return absl::DeadlineExceededError(absl::StrCat(impl_->command, " (pid ", impl_->pid,
                                                    ") still runs after ", absl::FormatDuration(timeout),
                                                    impl_->Shown()));
  }
  impl_->Reap();
  ProcessResult result;
  if (WIFEXITED(impl_->wait_status)) result.exit_code = WEXITSTATUS(impl_->wait_status);
  if (WIFSIGNALED(impl_->wait_status)) result.signal = WTERMSIG(impl_->wait_status);
  result.out = impl_->out;
  result.err = impl_->err;
  return result;
}

absl::StatusOr<ProcessResult> RunProcess(SubprocessOptions options, absl::Duration timeout) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Subprocess> process, Subprocess::Start(std::move(options)));
  return process->Wait(timeout);
}

std::string FindCommand(std::string_view command) {
  const char* path = std::getenv("PATH");
  std::string rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const size_t colon = rest.find(':');
    const std::string candidate = rest.substr(0, colon) + "/" + std::string(command);
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  return "";
}

}  // namespace shoal::testing
