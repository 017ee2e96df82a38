// How long the survivors of a kill -9 are in the dark: from the kill, in the middle of an all-reduce, until it has ended
// ABORTED on every survivor and, with --membership, until it has been repeated by the survivors in the next epoch. Every
// rank has as much resident memory of 4 KiB pages as asked for, half of it private and half shared, because the kernel
// frees the memory of a dead process before it closes its sockets.
//
//   bench_kill_recovery [--ranks 4] [--resident-mib 1024] [--mib 64] [--kills 50] [--seed 1] [--transport auto] [--membership]
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collectives/communicator.h"
#include "collectives/membership/coordinator.h"
#include "collectives/membership/membership.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kRanksMax = 16;

struct Settings {
  int ranks = 4;
  int64_t resident_mib = 1024;
  int64_t mib = 64;
  int kills = 50;
  int seed = 1;
  std::string transport = "auto";
  bool membership = false;
};

// What the processes tell each other: in memory that they share from before the first fork.
struct Board {
  std::atomic<int> round;             // Of the ranks: the epoch that they form. -1: the end.
  struct Seat {
    std::atomic<int> running;         // The round in which this process reduces.
    std::atomic<int64_t> reduced;     // How many times in this round.
    std::atomic<int64_t> aborted_ns;  // When the reduction of this round ended ABORTED.
    std::atomic<int64_t> retried_ns;  // When the first reduction of the next epoch had been completed.
    char cause[200];
  } seats[kRanksMax];
};

std::string Name(const std::string& what) { return absl::StrCat("unix:kill-recovery-", getpgrp(), "-", what); }

// Resident for the rest of the process's life.
void Occupy(int64_t bytes) {
  const int fd = memfd_create("resident", MFD_CLOEXEC);
  SHOAL_CHECK(fd >= 0 && ftruncate(fd, bytes / 2) == 0);
  const int flags[] = {MAP_SHARED, MAP_PRIVATE | MAP_ANONYMOUS};
  for (int flag : flags) {
    if (bytes == 0) break;
    void* base = mmap(nullptr, bytes / 2, PROT_READ | PROT_WRITE, flag, flag == MAP_SHARED ? fd : -1, 0);
    SHOAL_CHECK(base != MAP_FAILED);
    (void)madvise(base, bytes / 2, MADV_NOHUGEPAGE);
    std::memset(base, 1, bytes / 2);
  }
}

class Rank {
 public:
  Rank(const Settings& settings, Board* board, int seat)
      : settings_(settings), board_(*board), seat_(board->seats[seat]), number_(seat) {
    options_.size = settings.ranks;
    options_.rank = seat;
    options_.transport = settings.transport;
    options_.job_id = "kill-recovery";
    options_.heartbeat_timeout = absl::Seconds(1);
  }

  // Until the board says that it is over.
  void Run() {
    Occupy(settings_.resident_mib << 20);
    if (settings_.membership) return RunMember();
    for (int round = 0; (round = AwaitRound(round)) >= 0;) {
      options_.master_host = Name(absl::StrCat(round));
      options_.epoch = Epoch{static_cast<uint64_t>(round)};
      absl::StatusOr<std::unique_ptr<Communicator>> group = ConnectWorld(options_);
      SHOAL_CHECK(group.ok()) << group.status().ToString();
      Reduce(**group, round);
    }
  }

 private:
  int AwaitRound(int last) const {
    while (board_.round.load() == last) absl::SleepFor(absl::Milliseconds(1));
    return board_.round.load();
  }

  // Of the job's tensors, which outlive epochs.
  absl::Status Allocate(Communicator& group) {
    if (!in_.empty()) return absl::OkStatus();
    const int64_t elements = (settings_.mib << 20) / 4;
    SHOAL_ASSIGN_OR_RETURN(in_, group.Allocate({elements}, DType::kF32));
    SHOAL_ASSIGN_OR_RETURN(out_, group.Allocate({elements}, DType::kF32));
    SHOAL_ASSIGN_OR_RETURN(joiners_, group.Allocate({1}, DType::kI32));
    std::fill_n(in_.data<float>(), elements, 1.0f);
    return absl::OkStatus();
  }

  // Reduces until the group ends, or, among members, until somebody wants to join. False: it ended.
  bool Reduce(Communicator& group, int round, Membership* member = nullptr) {
    absl::Status status = Allocate(group);
    for (int64_t count = 0; status.ok(); ++count) {
      if (member != nullptr) {
        *joiners_.data<int32_t>() = member->JoinersWaiting();
        status = group.AllReduce(joiners_, joiners_, ReduceOp::kMax, {}).Await();
        if (status.ok() && *joiners_.data<int32_t>() > 0) return true;
      }
      if (status.ok()) status = group.AllReduce(in_, out_, ReduceOp::kSum, {.label = "grads"}).Await();
      if (!status.ok()) break;
      if (count == 0) seat_.retried_ns.store(NowNs());
      const float* sums = out_.data<float>();
      const int64_t elements = out_.elements();
      for (int64_t i = 0; i < elements; i += 4099) SHOAL_CHECK(sums[i] == group.size());
      if (group.size() < settings_.ranks) continue;
      seat_.reduced.store(count + 1);
      seat_.running.store(round);
    }
    if (group.size() < settings_.ranks) return false;  // No kill of ours.
    std::snprintf(seat_.cause, sizeof seat_.cause, "%s", status.ToString().c_str());
    seat_.aborted_ns.store(NowNs());
    return false;
  }

  void RunMember() {
    MembershipOptions options;
    options.coordinators = {Name("coordinator")};
    options.world = options_;
    options.wanted_rank = number_;
    absl::StatusOr<std::unique_ptr<Membership>> member = Membership::Join(options);
    SHOAL_CHECK(member.ok()) << member.status().ToString();
    while (true) {
      absl::StatusOr<std::unique_ptr<Communicator>> group = (*member)->NextEpoch(absl::Now() + absl::Minutes(1));
      SHOAL_CHECK(group.ok()) << group.status().ToString();
      (void)Reduce(**group, board_.round.load(), member->get());
    }
  }

  const Settings& settings_;
  Board& board_;
  Board::Seat& seat_;
  const int number_;
  WorldOptions options_;
  Tensor in_, out_, joiners_;
};

pid_t Fork(const std::function<void()>& body) {
  const pid_t pid = fork();
  SHOAL_CHECK(pid >= 0);
  if (pid > 0) return pid;
  (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
  body();
  _exit(0);
}

void RunCoordinator(int ranks) {
  CoordinatorServerOptions options;
  options.listen = Name("coordinator");
  options.job_id = "kill-recovery";
  options.core.size_min = ranks - 1;
  auto server = CoordinatorServer::Start(options);
  SHOAL_CHECK(server.ok()) << server.status().ToString();
  while (true) pause();
}

double Percentile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[std::min(values.size() - 1, static_cast<size_t>(values.size() * p))];
}

void Print(const char* what, const std::vector<double>& ms) {
  std::printf("%-34s median %7.2f ms  p90 %7.2f ms  max %7.2f ms  (%zu)\n", what, Percentile(ms, 0.5),
              Percentile(ms, 0.9), Percentile(ms, 1), ms.size());
}

class Bench {
 public:
  explicit Bench(const Settings& settings) : settings_(settings) {
    board_ = static_cast<Board*>(
        mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    SHOAL_CHECK(board_ != MAP_FAILED);
  }

  void Run() {
    pid_t coordinator = 0;
    if (settings_.membership) coordinator = Fork([this] { RunCoordinator(settings_.ranks); });
    board_->round.store(1);
    for (int seat = 0; seat < settings_.ranks; ++seat) Start(seat);
    std::mt19937_64 random(settings_.seed);
    for (int round = 1; round <= settings_.kills; ++round) {
      Kill(round, random() % settings_.ranks, absl::Microseconds(random() % 30'000));
    }
    std::vector<pid_t> all = pids_;
    if (coordinator > 0) all.push_back(coordinator);
    for (pid_t pid : all) {
      kill(pid, SIGKILL);
      (void)waitpid(pid, nullptr, 0);
    }
    std::printf("%d ranks, %lld MiB resident each, all_reduce of %lld MiB, %s\n", settings_.ranks,
                static_cast<long long>(settings_.resident_mib), static_cast<long long>(settings_.mib),
                settings_.transport.c_str());
    Print("kill to ABORTED, each survivor", each_ms_);
    Print("kill to ABORTED, last survivor", last_ms_);
    if (settings_.membership) Print("kill to retry done, last survivor", retry_ms_);
    std::printf("a cause: %s\n", cause_.c_str());
  }

 private:
  void Start(int seat) {
    pids_.resize(settings_.ranks);
    pids_[seat] = Fork([&] { Rank(settings_, board_, seat).Run(); });
  }

  template <typename Done>
  void Await(const char* what, Done done) {
    const int64_t end_ns = NowNs() + 60'000'000'000;
    for (int seat = 0; seat < settings_.ranks; ++seat) {
      while (!done(seat)) {
        SHOAL_CHECK(NowNs() < end_ns) << what << ": rank " << seat << " did not within a minute";
        absl::SleepFor(absl::Milliseconds(1));
      }
    }
  }

  void Kill(int round, int victim, absl::Duration wait) {
    Board::Seat* seats = board_->seats;
    Await("reduce", [&](int seat) { return seats[seat].running == round && seats[seat].reduced >= 3; });
    absl::SleepFor(wait);
    for (int seat = 0; seat < settings_.ranks; ++seat) seats[seat].aborted_ns = 0;
    const int64_t killed_ns = NowNs();
    kill(pids_[victim], SIGKILL);
    Await("end", [&](int seat) { return seat == victim || seats[seat].aborted_ns != 0; });
    int64_t last_ns = 0;
    for (int seat = 0; seat < settings_.ranks; ++seat) {
      if (seat == victim) continue;
      each_ms_.push_back((seats[seat].aborted_ns - killed_ns) * 1e-6);
      last_ns = std::max<int64_t>(last_ns, seats[seat].aborted_ns);
      cause_ = seats[seat].cause;
    }
    last_ms_.push_back((last_ns - killed_ns) * 1e-6);
    if (settings_.membership) {
      Await("retry", [&](int seat) { return seat == victim || seats[seat].retried_ns > killed_ns; });
      for (int seat = 0; seat < settings_.ranks; ++seat) {
        if (seat != victim) last_ns = std::max<int64_t>(last_ns, seats[seat].retried_ns);
      }
      retry_ms_.push_back((last_ns - killed_ns) * 1e-6);
    }
    (void)waitpid(pids_[victim], nullptr, 0);
    board_->round.store(round + 1);
    Start(victim);
  }

  const Settings settings_;
  Board* board_;
  std::vector<pid_t> pids_;
  std::vector<double> each_ms_, last_ms_, retry_ms_;
  std::string cause_;
};

bool Parse(int argc, char** argv, Settings* settings) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--membership") {
      settings->membership = true;
      continue;
    }
    if (++i == argc) return false;
    if (flag == "--transport") {
      settings->transport = argv[i];
      continue;
    }
    int value = 0;
    if (!absl::SimpleAtoi(argv[i], &value) || value < 0) return false;
    if (flag == "--ranks") {
      settings->ranks = value;
    } else if (flag == "--resident-mib") {
      settings->resident_mib = value;
    } else if (flag == "--mib") {
      settings->mib = value;
    } else if (flag == "--kills") {
      settings->kills = value;
    } else if (flag == "--seed") {
      settings->seed = value;
    } else {
      return false;
    }
  }
  return settings->ranks >= 2 && settings->ranks <= kRanksMax && settings->mib > 0;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  shoal::Settings settings;
  if (!shoal::Parse(argc, argv, &settings)) {
    std::fprintf(stderr, "usage: %s [--ranks 4] [--resident-mib 1024] [--mib 64] [--kills 50] [--seed 1] [--transport auto|tcp]"
                         " [--membership]\n", argv[0]);
    return 2;
  }
  (void)setpgid(0, 0);  // Names of sockets are made of it.
  shoal::Bench(settings).Run();
  return 0;
}
