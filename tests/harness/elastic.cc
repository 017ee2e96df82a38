#include "tests/harness/elastic.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

constexpr int64_t kElementsMax = 300'000;
constexpr int64_t kElements[] = {1, 1000, 20'000, kElementsMax};  // In turn.

// One line of what can be read from `fd` until `deadline_ns`, or "".
std::string ReadLine(int fd, std::string* bytes, int64_t deadline_ns) {
  while (true) {
    const size_t end = bytes->find('\n');
    if (end != std::string::npos) {
      std::string line = bytes->substr(0, end);
      bytes->erase(0, end + 1);
      return line;
    }
    const int64_t left_ns = std::max<int64_t>(deadline_ns - NowNs(), 0);
    pollfd entry = {fd, POLLIN, 0};
    const int ready = poll(&entry, 1, static_cast<int>((left_ns + 999'999) / 1'000'000));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return "";
    char more[4096];
    const ssize_t got = read(fd, more, sizeof more);
    if (got <= 0) return "";
    bytes->append(more, got);
  }
}

}  // namespace

void Child::Parent::Say(const std::string& line) const {
  const std::string bytes = line + "\n";
  if (write(out_, bytes.data(), bytes.size()) < 0) _exit(3);  // The parent has gone.
}

std::string Child::Parent::Hear(absl::Duration timeout) {
  return ReadLine(in_, &bytes_, NowNs() + absl::ToInt64Nanoseconds(timeout));
}

Child::Child(const std::function<void(Parent&)>& body) {
  int down[2], up[2];
  SHOAL_CHECK(pipe2(down, O_CLOEXEC) == 0 && pipe2(up, O_CLOEXEC) == 0);
  const pid_t parent_pid = getpid();
  pid_ = fork();
  SHOAL_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent_pid) _exit(3);
    close(down[1]);
    close(up[0]);
    SetLogIdentity(absl::StrCat("pid ", getpid()));
    Parent parent(down[0], up[1]);
    body(parent);
    _exit(0);
  }
  close(down[0]);
  close(up[1]);
  in_ = up[0];
  out_ = down[1];
}

Child::~Child() {
  if (!reaped_) {
    (void)kill(pid_, SIGKILL);
    (void)waitpid(pid_, nullptr, 0);
  }
  close(in_);
  close(out_);
}

void Child::Signal(int signal_number) const { SHOAL_CHECK(kill(pid_, signal_number) == 0); }

void Child::Tell(const std::string& line) const {
  const std::string bytes = line + "\n";
  (void)!write(out_, bytes.data(), bytes.size());
}

std::string Child::Line(absl::Duration timeout) {
  return ReadLine(in_, &bytes_, NowNs() + absl::ToInt64Nanoseconds(timeout));
}

std::string Child::LineWith(const std::string& prefix, absl::Duration timeout) {
  const int64_t deadline_ns = NowNs() + absl::ToInt64Nanoseconds(timeout);
  while (true) {
    const std::string line = ReadLine(in_, &bytes_, deadline_ns);
    if (line.empty() || absl::StartsWith(line, prefix)) return line;
    if (absl::StartsWith(line, "wrong")) return line;
  }
}

bool Child::Ended() const {
  if (!reaped_ && waitpid(pid_, &status_, WNOHANG) == pid_) reaped_ = true;
  return reaped_;
}

int Child::Wait() {
  const int64_t deadline_ns = NowNs() + 30'000'000'000;
  while (!Ended() && NowNs() < deadline_ns) (void)poll(nullptr, 0, 1);
  return reaped_ ? status_ : -1;
}

ElasticJob::ElasticJob(const Options& options)
    : options_(options), address_(options.coordinator.empty() ? UniqueRendezvous() : options.coordinator) {}

void ElasticJob::StartCoordinator() {
  coordinator_.reset();
  coordinator_ = std::make_unique<Child>([this](Child::Parent& parent) {
    CoordinatorServerOptions options;
    options.core.size_min = options_.size_min;
    options.core.size_max = options_.size_max;
    options.core.heartbeat_timeout = options_.heartbeat_timeout;
    options.listen = address_;
    options.job_id = "test";
    options.secret = options_.secret;
    absl::StatusOr<std::unique_ptr<CoordinatorServer>> server = CoordinatorServer::Start(options);
    SHOAL_CHECK(server.ok()) << server.status().ToString();
    parent.Say("listens");
    while (parent.Hear(absl::Hours(1)).empty()) pause();
  });
  SHOAL_CHECK(coordinator_->Line() == "listens");
}

MembershipOptions ElasticJob::member_options() const {
  MembershipOptions options;
  options.coordinators = {address_};
  options.heartbeat_interval = std::min(absl::Milliseconds(100), options_.heartbeat_timeout / 5);
  options.world.job_id = "test";
  options.world.secret = options_.secret;
  options.world.transport = options_.transport;
  options.world.heartbeat_timeout = options_.heartbeat_timeout;
  options.world.timeout = absl::Seconds(60);
  return options;
}

std::unique_ptr<Child> ElasticJob::StartMember(
    const std::function<void(Membership&, Child::Parent&)>& body) const {
  return std::make_unique<Child>([this, body](Child::Parent& parent) {
    const int64_t begun_ns = NowNs();
    absl::StatusOr<std::unique_ptr<Membership>> membership = Membership::Join(member_options());
    if (!membership.ok()) return parent.Say(membership.status().ToString());
    parent.Say(absl::StrCat("joined at ", begun_ns));
    body(**membership, parent);
    membership->reset();
    parent.Say("left");
  });
}

namespace {

// Shuts every connected socket of this process down, as a cut cable would.
void CutConnections() {
  DIR* folder = opendir("/proc/self/fd");
  SHOAL_CHECK(folder != nullptr);
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    sockaddr_storage peer;
    socklen_t length = sizeof peer;
    if (fd > 2 && getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) == 0) {
      (void)shutdown(fd, SHUT_RDWR);
    }
  }
  closedir(folder);
}

class Life {
 public:
  Life(Membership& membership, Child::Parent& parent) : membership_(membership), parent_(parent) {}

  void Run() {
    while (!over_) {
      absl::StatusOr<std::unique_ptr<Communicator>> group =
          membership_.NextEpoch(absl::Now() + absl::Seconds(60));
      if (!group.ok()) return parent_.Say(absl::StrCat("no epoch: ", group.status().ToString()));
      const absl::Status status = RunEpoch(**group);
      if (absl::IsAborted(status)) {
        parent_.Say(absl::StrCat("aborted at ", NowNs(), ": ", status.message()));
      } else if (!status.ok()) {
        return parent_.Say(absl::StrCat("wrong: ", status.ToString()));
      }
      group_ = *std::move(group);  // The one before ends here: after NextEpoch, which is as good as before.
    }
  }

 private:
  struct Sum {
    Tensor memory;  // Of all sizes.
    Tensor tensor;
    Work work;
    float expected = 0;
  };

  // Every rank gives (rank of the world + 1) * step to the sum.
  absl::Status Begin(Communicator& group, const std::vector<int>& ranks, int own_rank, int64_t step, Sum* sum) {
    const float factor = static_cast<float>(step % 97 + 1);
    sum->expected = 0;
    for (int rank : ranks) sum->expected += static_cast<float>(rank + 1) * factor;
    const int64_t elements = kElements[step % 4];
    float* data = sum->memory.data<float>();
    sum->tensor = Tensor(data, {elements}, DType::kF32, nullptr);
    std::fill(data, data + elements, static_cast<float>(own_rank + 1) * factor);
    sum->work = group.AllReduce(sum->tensor, sum->tensor, ReduceOp::kSum, {.label = "churn"});
    return absl::OkStatus();
  }

  static absl::Status Check(const Sum& sum, const char* name) {
    const absl::Status status = sum.work.Await(absl::Now() + absl::Seconds(60));
    if (!status.ok()) return status;
    const float* data = sum.tensor.data<float>();
    for (int64_t i = 0; i < sum.tensor.elements(); ++i) {
      if (data[i] == sum.expected) continue;
      return absl::DataLossError(absl::StrCat(name, ": element ", i, " is ", data[i], ", want ", sum.expected));
    }
    return absl::OkStatus();
  }

  absl::Status RunEpoch(Communicator& world) {
    std::vector<int> all, own;
    for (int rank = 0; rank < world.size(); ++rank) {
      all.push_back(rank);
      if (rank % 2 == world.index() % 2) own.push_back(rank);
    }
    absl::StatusOr<std::unique_ptr<Communicator>> half = world.Split(own);
    if (!half.ok()) return half.status();
    absl::StatusOr<std::unique_ptr<Communicator>> second = world.Split(all);
    if (!second.ok()) return second.status();
    Sum sums[3];
    for (Sum& sum : sums) {
      absl::StatusOr<Tensor> tensor = world.Allocate({kElementsMax}, DType::kF32);
      if (!tensor.ok()) return tensor.status();
      sum.memory = *std::move(tensor);
    }
    for (int64_t step = 0; !over_; ++step, ++steps_) {
      Obey();
      if (over_) return absl::OkStatus();
      absl::Status status = Begin(world, all, world.index(), step, &sums[0]);
      if (status.ok()) status = Begin(**half, own, world.index(), step + 1, &sums[1]);
      if (status.ok()) status = Begin(**second, all, world.index(), step + 2, &sums[2]);
      const char* names[] = {"all", "half", "second"};
      for (int i = 0; i < 3; ++i) {
        const absl::Status checked = Check(sums[i], names[i]);
        if (status.ok()) status = checked;
        if (!checked.ok() && !absl::IsAborted(checked)) return checked;
      }
      if (!status.ok()) return status;
      if (step == 0) {
        parent_.Say(absl::StrCat("epoch ", static_cast<uint64_t>(world.epoch()), " size ", world.size(), " rank ",
                                 world.index(), " at ", NowNs()));
      }
      Tensor joiners = Zeros({1}, DType::kI64);
      joiners.data<int64_t>()[0] = membership_.JoinersWaiting();
      status = world.AllReduce(joiners, joiners, ReduceOp::kMax, {.label = "joiners"})
                   .Await(absl::Now() + absl::Seconds(60));
      if (!status.ok()) return status;
      if (joiners.data<int64_t>()[0] > 0) return absl::OkStatus();
    }
    return absl::OkStatus();
  }

  void Obey() {
    const std::string order = parent_.Hear(absl::ZeroDuration());
    if (order == "steps") parent_.Say(absl::StrCat("step ", steps_));
    if (order == "leave") over_ = true;
    if (order == "cut") CutConnections();
  }

  Membership& membership_;
  Child::Parent& parent_;
  std::unique_ptr<Communicator> group_;
  int64_t steps_ = 0;
  bool over_ = false;
};

}  // namespace

void LiveAsMember(Membership& membership, Child::Parent& parent) { Life(membership, parent).Run(); }

}  // namespace shoal
