#include "launch/agent/agent.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "launch/agent/environment.h"
#include "launch/agent/exit_codes.h"
#include "launch/agent/job_coordinator.h"
#include "launch/agent/rank_output.h"
#include "launch/agent/rank_process.h"
#include "launch/agent/verdict.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kEndingSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
constexpr int kPassedSignals[] = {SIGUSR1, SIGUSR2};
// After SIGKILL. A process in an uninterruptible sleep (a dead network file system) must not hold the
// launcher.
constexpr absl::Duration kKillTime = absl::Seconds(2);

// Time since the machine started: it does not jump.
absl::Time Now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return absl::TimeFromTimespec(now);
}

std::string HostName() {
  char name[HOST_NAME_MAX + 1] = "localhost";
  gethostname(name, sizeof(name) - 1);
  return name;
}

std::string RandomId() {
  uint64_t number = 0;
  if (getrandom(&number, sizeof(number), 0) != sizeof(number)) number = static_cast<uint64_t>(getpid());
  return absl::StrFormat("%016x", number);
}

// Whole lines for the user. On a terminal rank 0's progress line may still be open.
void Say(const std::string& lines) {
  static_cast<void>(WriteFully(STDERR_FILENO, absl::StrCat(isatty(STDERR_FILENO) == 1 ? "\n" : "", lines)));
}

// The signals that the agent handles, taken from their default ways while it lives.
class SignalGuard {
 public:
  SignalGuard() {
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    signal(SIGCHLD, SIG_DFL);  // Ignored, as some parents leave it, children would vanish unseen.
    for (const int number : kEndingSignals) {
      struct sigaction action {};
      sigaction(number, nullptr, &action);
      if (action.sa_handler != SIG_IGN) sigaddset(&mask, number);  // nohup and shells mean what they ignore.
    }
    for (const int number : kPassedSignals) sigaddset(&mask, number);
    old_pipe_ = signal(SIGPIPE, SIG_IGN);
    sigprocmask(SIG_BLOCK, &mask, &old_mask_);
    fd_ = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  ~SignalGuard() {
    if (fd_ >= 0) close(fd_);
    signal(SIGPIPE, old_pipe_);
    sigprocmask(SIG_SETMASK, &old_mask_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

  int fd() const { return fd_; }
  const sigset_t& old_mask() const { return old_mask_; }

 private:
  int fd_ = -1;
  sigset_t old_mask_ = {};
  void (*old_pipe_)(int) = SIG_DFL;
};

struct Rank {
  RankEnvironment environment;
  RankProcess process;
  bool running = false;
  int restarts = 0;
  absl::Time stopped_since = absl::InfiniteFuture();
  int stop_signal = 0;
  std::string log_path;
  std::unique_ptr<RankOutput> output;
};

class Agent {
 public:
  Agent(const AgentOptions& options, absl::Span<const std::string> command)
      : options_(options), command_(command), host_(HostName()) {}

  int Run();

 private:
  // What the agent waits for, apart from the ranks.
  enum class Phase { kRunning, kSettling, kEnding, kKilling };

  absl::Status Start();
  absl::Status StartOne(Rank& rank);
  bool StartAgain(Rank& rank, const RankFailure& failure);
  absl::StatusOr<RankEnvironment> Job() const;
  std::vector<std::string> EnvironmentOf(const Rank& rank) const;

  void Wait();
  void ReadSignals();
  void ReadOutput(Rank& rank);
  void ReapRanks();
  void NoteStopOrContinue(Rank& rank, const siginfo_t& info);
  void NoteEnd(Rank& rank, const siginfo_t& info);
  void Decide();
  void DecideStopped();
  void DecideShutdown();
  void SignalAll(int signal_number);
  void EndAll(int signal_number, absl::Duration grace);
  void EndAsAsked(int signal_number, const std::string& who);
  RankFailure Failure(const Rank& rank, RankFailure::Kind kind, int code, absl::Time at) const;
  bool AnyRunning() const;
  absl::Duration UntilNextDeadline() const;
  int Finish();

  const AgentOptions& options_;
  const absl::Span<const std::string> command_;
  const std::string host_;
  SignalGuard signals_;
  JobCoordinator coordinator_;  // Of an elastic job. Its threads have our signals blocked.
  std::vector<Rank> ranks_;
  std::vector<RankFailure> failures_;
  absl::Time started_;
  Phase phase_ = Phase::kRunning;
  absl::Time phase_ends_ = absl::InfiniteFuture();
  bool asked_ = false;       // The launcher was told to end.
  int ended_by_signal_ = 0;  // That the launcher got, or a rank that ended in order.
};

absl::StatusOr<RankEnvironment> Agent::Job() const {
  RankEnvironment job;
  job.world_size = options_.nnodes_max * options_.nproc_per_node;
  job.local_world_size = options_.nproc_per_node;
  job.node_rank = options_.node_rank;
  job.nodes = options_.nnodes_max;
  const std::string random_id = RandomId();
  job.job_id = options_.rdzv_id.empty() ? random_id : options_.rdzv_id;
  // Launchers of several hosts must agree on one, so only the user can give it.
  const bool one_host = options_.nnodes_max == 1 && options_.etcd.empty();
  job.job_secret = ProcessEnv("SHOAL_JOB_SECRET").value_or(one_host ? RandomId() + RandomId() : "");
  if (options_.rdzv_endpoint.empty()) {
    job.master_host = absl::StrCat("unix:shoal-", random_id);
    return job;
  }
  SHOAL_ASSIGN_OR_RETURN(const HostPort master, ParseHostPort(options_.rdzv_endpoint, 0),
                         "rendezvous endpoint");
  job.master_host = master.host;
  job.master_port = master.port;
  return job;
}

std::vector<std::string> Agent::EnvironmentOf(const Rank& rank) const {
  const auto fixed = RankVariables(rank.environment);
  auto variables = options_.elastic ? ElasticRankVariables(rank.environment, coordinator_.address, rank.restarts,
                                                           options_.max_restarts)
                                    : fixed;
  if (options_.more_threads_than_cores && getenv("OMP_WAIT_POLICY") == nullptr &&
      getenv("GOMP_SPINCOUNT") == nullptr) {
    variables.emplace_back("OMP_WAIT_POLICY", "passive");
  }
  std::set<std::string, std::less<>> ours = {"SHOAL_COORDINATOR"};
  for (const auto& [name, unused] : fixed) ours.insert(name);  // Those of another launcher would be wrong.
  std::vector<std::string> result;
  for (const auto& [name, value] : variables) {
    ours.insert(name);
    result.push_back(absl::StrCat(name, "=", value));
  }
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (ours.find(text.substr(0, text.find('='))) == ours.end()) result.emplace_back(text);
  }
  return result;
}

absl::Status Agent::StartOne(Rank& rank) {
  int log_fd = -1;
  if (!options_.log_dir.empty()) {
    // Launchers of an elastic job need not have a number; their folders may be one.
    const std::string host = options_.elastic && options_.nnodes_max > 1 ? host_ + "-" : "";
    rank.log_path = absl::StrCat(options_.log_dir, "/", host, "rank-", rank.environment.rank, ".log");
    log_fd = open(rank.log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (log_fd < 0) return ErrnoStatus(errno, rank.log_path);
  }
  rank.output = std::make_unique<RankOutput>(rank.environment.rank, log_fd, STDERR_FILENO);
  const std::vector<std::string> environment = EnvironmentOf(rank);
  RankCommand command;
  command.argv = command_;
  command.environment = environment;
  command.inherit_stdout = options_.elastic ? rank.environment.local_rank == 0 : rank.environment.rank == 0;
  command.signal_mask = signals_.old_mask();
  SHOAL_ASSIGN_OR_RETURN(rank.process, StartRank(command));
  rank.running = true;
  if (log_fd >= 0) {
    const std::string line =
        absl::StrFormat("---- rank %d of %d, job %s, host %s, pid %d, %s\n", rank.environment.rank,
                        rank.environment.world_size, rank.environment.job_id, host_, rank.process.pid,
                        absl::FormatTime(absl::Now()));
    // A disk that is full already will say so with the first line of the rank.
    static_cast<void>(WriteFully(log_fd, line));
  }
  return absl::OkStatus();
}

// Whether it runs again.
bool Agent::StartAgain(Rank& rank, const RankFailure& failure) {
  if (phase_ != Phase::kRunning || rank.restarts >= options_.max_restarts) return false;
  ++rank.restarts;
  SHOAL_LOG(kWarning) << "rank " << rank.environment.rank << " (pid " << rank.process.pid << ") " << Describe(failure)
                      << "; it is started again, " << rank.restarts << " of " << options_.max_restarts << " times";
  for (int* const fd : {&rank.process.stdout_fd, &rank.process.stderr_fd}) {
    if (*fd >= 0) close(std::exchange(*fd, -1));
  }
  rank.stopped_since = absl::InfiniteFuture();
  const absl::Status status = StartOne(rank);
  if (!status.ok()) SHOAL_LOG(kError) << "rank " << rank.environment.rank << " cannot be started: " << status.message();
  return status.ok();
}

absl::Status Agent::Start() {
  started_ = Now();
  if (signals_.fd() < 0) return ErrnoStatus(errno, "signalfd");
  if (!options_.log_dir.empty()) {
    std::error_code error;
    std::filesystem::create_directories(options_.log_dir, error);
    if (error) return ErrnoStatus(error.value(), absl::StrCat("creating ", options_.log_dir));
  }
  SHOAL_ASSIGN_OR_RETURN(const RankEnvironment job, Job());
  if (options_.elastic) {
    SHOAL_ASSIGN_OR_RETURN(coordinator_, StartCoordinator(options_, job), "the coordinator of the job");
  }
  for (int local_rank = 0; local_rank < options_.nproc_per_node; ++local_rank) {
    Rank& rank = ranks_.emplace_back();
    rank.environment = job;
    rank.environment.local_rank = local_rank;
    rank.environment.rank = job.node_rank * job.local_world_size + local_rank;
    SHOAL_RETURN_IF_ERROR(StartOne(rank), "starting local rank ", local_rank);
  }
  if (options_.elastic) {
    SHOAL_LOG(kInfo) << ranks_.size() << " ranks of this host join the elastic job " << job.job_id << " at "
                     << coordinator_.address << (coordinator_.server ? ", which is coordinated here" : "");
  } else if (job.nodes > 1) {
    SHOAL_LOG(kInfo) << "host " << job.node_rank << " of " << job.nodes << ": ranks "
                     << ranks_.front().environment.rank << " to " << ranks_.back().environment.rank << " of "
                     << job.world_size << " meet the others at " << options_.rdzv_endpoint << ", job "
                     << job.job_id;
  }
  return absl::OkStatus();
}

bool Agent::AnyRunning() const {
  return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.running; });
}

absl::Duration Agent::UntilNextDeadline() const {
  absl::Time next = phase_ends_;
  for (const Rank& rank : ranks_) {
    if (rank.running && phase_ == Phase::kRunning)
      next = std::min(next, rank.stopped_since + options_.stopped_timeout);
  }
  return std::max(next - Now(), absl::ZeroDuration());
}

// Blocks until a rank printed or changed its state, a signal came, or a deadline passed; reads what there is.
void Agent::Wait() {
  std::vector<pollfd> polled = {{signals_.fd(), POLLIN, 0}};
  for (const Rank& rank : ranks_) {
    for (const int fd : {rank.process.stdout_fd, rank.process.stderr_fd}) {
      if (fd >= 0) polled.push_back({fd, POLLIN, 0});
    }
  }
  const absl::Duration left = UntilNextDeadline();
  const int64_t timeout_ms = left == absl::InfiniteDuration() ? -1 : absl::ToInt64Milliseconds(left) + 1;
  poll(polled.data(), polled.size(), static_cast<int>(std::min<int64_t>(timeout_ms, INT_MAX)));
  for (Rank& rank : ranks_) ReadOutput(rank);
  ReadSignals();
  ReapRanks();
}

void Agent::ReadOutput(Rank& rank) {
  const std::pair<RankStream, int*> streams[] = {{RankStream::kStdout, &rank.process.stdout_fd},
                                                 {RankStream::kStderr, &rank.process.stderr_fd}};
  char buffer[64 * 1024];
  for (const auto& [stream, fd] : streams) {
    // Bounded: a rank that prints without end must not keep the agent from the others.
    for (int round = 0; round < 16 && *fd >= 0; ++round) {
      const ssize_t bytes = read(*fd, buffer, sizeof(buffer));
      if (bytes > 0) {
        rank.output->Take(stream, {buffer, static_cast<size_t>(bytes)});
      } else if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) {
        break;
      } else {
        close(std::exchange(*fd, -1));
      }
    }
  }
}

void Agent::ReadSignals() {
  signalfd_siginfo info;
  while (read(signals_.fd(), &info, sizeof(info)) == sizeof(info)) {
    const int number = static_cast<int>(info.ssi_signo);
    if (number == SIGCHLD) continue;
    if (std::count(std::begin(kPassedSignals), std::end(kPassedSignals), number) > 0) {
      if (phase_ < Phase::kEnding) SignalAll(number);
    } else if (std::exchange(asked_, true)) {
      EndAll(SIGKILL, kKillTime);
    } else {
      EndAsAsked(number, "");
    }
  }
}

// `who`: the rank that was asked first; empty: the launcher.
void Agent::EndAsAsked(int signal_number, const std::string& who) {
  if (ended_by_signal_ == 0) ended_by_signal_ = signal_number;
  if (phase_ >= Phase::kEnding) return;
  const auto running = std::count_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.running; });
  const bool saving = signal_number == SIGTERM;
  if (running > 0) {
    Say(absl::StrCat("shoal: ", who, "SIG", sigabbrev_np(signal_number), ": ending ", running, running == 1 ? " rank" : " ranks",
                     saving && asked_ ? "; another one ends them at once\n" : "\n"));
  }
  EndAll(signal_number, saving ? options_.save_time : options_.grace_time);
}

void Agent::ReapRanks() {
  for (Rank& rank : ranks_) {
    if (!rank.running) continue;
    const id_t pid = static_cast<id_t>(rank.process.pid);
    siginfo_t info = {};
    while (waitid(P_PID, pid, &info, WSTOPPED | WCONTINUED | WNOHANG) == 0 && info.si_pid != 0) {
      NoteStopOrContinue(rank, info);
      info = {};
    }
    info = {};
    if (waitid(P_PID, pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0) NoteEnd(rank, info);
  }
}

void Agent::NoteStopOrContinue(Rank& rank, const siginfo_t& info) {
  if (info.si_code == CLD_CONTINUED) {
    rank.stopped_since = absl::InfiniteFuture();
    return;
  }
  rank.stopped_since = Now();
  rank.stop_signal = info.si_status;
  SHOAL_LOG(kWarning) << "rank " << rank.environment.rank << " (pid " << rank.process.pid
                      << ") was stopped by SIG" << sigabbrev_np(info.si_status);
  if (phase_ >= Phase::kEnding) kill(-rank.process.pid, SIGKILL);  // It cannot end by itself.
}

void Agent::NoteEnd(Rank& rank, const siginfo_t& info) {
  const absl::Time now = Now();
  // What it started and left behind. Before the rank is reaped: afterwards the number could belong to others.
  kill(-rank.process.pid, SIGKILL);
  siginfo_t reaped = {};
  waitid(P_PID, static_cast<id_t>(rank.process.pid), &reaped, WEXITED);
  rank.running = false;
  ReadOutput(rank);
  rank.output->Finish();
  if (info.si_code == CLD_EXITED && info.si_status == 0) return;
  const RankFailure::Kind kind =
      info.si_code == CLD_EXITED ? RankFailure::Kind::kExited : RankFailure::Kind::kKilled;
  RankFailure failure = Failure(rank, kind, info.si_status, now);
  failure.core_dumped = info.si_code == CLD_DUMPED;
  if (StartAgain(rank, failure)) return;
  for (const int number : kEndingSignals) {
    if (kind != RankFailure::Kind::kExited || info.si_status != kExitSignalBase + number) continue;
    if (phase_ < Phase::kEnding) EndAsAsked(number, absl::StrCat("rank ", rank.environment.rank, " ended as asked by "));
    return;
  }
  // The others wait for it in vain.
  const bool as_asked = kind == RankFailure::Kind::kKilled && info.si_status == ended_by_signal_;
  if (phase_ == Phase::kEnding && !as_asked) phase_ends_ = std::min(phase_ends_, now + options_.grace_time);
  failures_.push_back(std::move(failure));
}

RankFailure Agent::Failure(const Rank& rank, RankFailure::Kind kind, int code, absl::Time at) const {
  RankFailure failure;
  failure.rank = rank.environment.rank;
  failure.local_rank = rank.environment.local_rank;
  failure.pid = rank.process.pid;
  failure.kind = kind;
  failure.code = code;
  failure.after_shutdown = phase_ >= Phase::kEnding;
  failure.at = at - started_;
  failure.stopped_for = kind == RankFailure::Kind::kStopped ? Now() - at : absl::ZeroDuration();
  failure.log_path = rank.log_path;
  return failure;
}

// A rank that stands still for long has failed. One that has just been stopped is the cause, too, when all
// that is known otherwise is that others lost a peer.
void Agent::DecideStopped() {
  const absl::Time now = Now();
  const bool only_peers_lost =
      std::all_of(failures_.begin(), failures_.end(), [](const RankFailure& failure) {
        return failure.kind == RankFailure::Kind::kExited && failure.code == kExitPeerLost;
      });
  for (Rank& rank : ranks_) {
    if (!rank.running || rank.stopped_since == absl::InfiniteFuture()) continue;
    if (now - rank.stopped_since >= options_.stopped_timeout || (!failures_.empty() && only_peers_lost)) {
      const RankFailure failure = Failure(rank, RankFailure::Kind::kStopped, rank.stop_signal, rank.stopped_since);
      if (rank.restarts < options_.max_restarts) {
        SHOAL_LOG(kWarning) << "rank " << rank.environment.rank << " (pid " << rank.process.pid << ") "
                            << Describe(failure) << "; it is killed";
        kill(-rank.process.pid, SIGKILL);
        rank.stopped_since = absl::InfiniteFuture();
      } else {
        failures_.push_back(failure);
      }
    }
  }
}

void Agent::DecideShutdown() {
  const RankFailure& culprit = failures_[ChooseCulprit(failures_)];
  const bool cause_is_open = culprit.kind == RankFailure::Kind::kExited && culprit.code == kExitPeerLost;
  if (!cause_is_open || (phase_ == Phase::kSettling && Now() >= phase_ends_)) {
    EndAll(SIGTERM, options_.grace_time);
  } else if (phase_ == Phase::kRunning) {
    phase_ = Phase::kSettling;
    phase_ends_ = Now() + options_.settle_time;
  }
}

void Agent::Decide() {
  if (phase_ == Phase::kRunning || phase_ == Phase::kSettling) {
    DecideStopped();
    if (!failures_.empty()) DecideShutdown();
  } else if (phase_ == Phase::kEnding && Now() >= phase_ends_) {
    EndAll(SIGKILL, kKillTime);
  }
}

void Agent::EndAll(int signal_number, absl::Duration grace) {
  phase_ = signal_number == SIGKILL ? Phase::kKilling : Phase::kEnding;
  phase_ends_ = Now() + grace;
  SignalAll(signal_number);
}

void Agent::SignalAll(int signal_number) {
  for (const Rank& rank : ranks_) {
    if (!rank.running) continue;
    // A stopped process cannot answer a polite signal that ends it.
    const bool stopped = rank.stopped_since != absl::InfiniteFuture() && phase_ >= Phase::kEnding;
    kill(-rank.process.pid, stopped ? SIGKILL : signal_number);
  }
}

int Agent::Finish() {
  for (Rank& rank : ranks_) {
    if (rank.running) {
      SHOAL_LOG(kError) << "rank " << rank.environment.rank << " (pid " << rank.process.pid
                        << ") does not end, even by SIGKILL: it hangs in the kernel";
    }
    for (const int fd : {rank.process.stdout_fd, rank.process.stderr_fd}) {
      if (fd >= 0) close(fd);
    }
  }
  const bool failed = std::any_of(failures_.begin(), failures_.end(),
                                  [](const RankFailure& failure) { return !failure.after_shutdown; });
  if (failed) {
    for (RankFailure& failure : failures_) {
      failure.last_lines = ranks_[failure.rank - ranks_.front().environment.rank].output->LastLines();
    }
    Say(Verdict(failures_, ranks_.front().environment.world_size, host_));
  }
  if (ended_by_signal_ != 0) return kExitSignalBase + ended_by_signal_;
  return failed ? kExitFailure : kExitOk;
}

int Agent::Run() {
  for (const std::string& warning : options_.warnings) SHOAL_LOG(kWarning) << warning;
  if (const absl::Status status = Start(); !status.ok()) {
    Say(absl::StrCat("shoal: the job was not started: ", status.message(), "\n"));
    EndAll(SIGKILL, kKillTime);
    while (AnyRunning() && Now() < phase_ends_) Wait();
    return kExitFailure;
  }
  while (AnyRunning() && !(phase_ == Phase::kKilling && Now() >= phase_ends_)) {
    Wait();
    Decide();
  }
  return Finish();
}

}  // namespace

int RunAgent(const AgentOptions& options, absl::Span<const std::string> command) {
  Agent agent(options, command);
  return agent.Run();
}

std::string SelfExecutable() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path));
  if (length > 0 && static_cast<size_t>(length) < sizeof(path)) {
    const std::string name(path, static_cast<size_t>(length));
    if (access(name.c_str(), X_OK) == 0) return name;
  }
  return "/proc/self/exe";  // The file was replaced since; the kernel still has it.
}

}  // namespace shoal
