// A job across hosts: cables are pulled and put back, hosts lose sight of each other, members and the
// coordinator are killed, stopped, cut off, sent away and replaced at random moments while collectives run.
// Every result is checked by the members, what they say by the referee.
//
//   cluster_churn [--seconds N] [--seed S] [--members M] [--transport auto|tcp] [--event-ms MS]
//   [--heartbeat-ms MS]
//                 [--hosts N] [--coordinator-host H] [--slack-ms MS] [--verbose 0|1]
//
// Exit code 0: nothing was wrong, and when the churn ended all living members came together. 1: something
// was.
#include <poll.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/cluster/cluster.h"
#include "tests/cluster/referee.h"

namespace shoal {
namespace {

using testing::NetworkHosts;

struct ChurnOptions {
  int64_t seconds = 15;
  int64_t seed = 1;
  int64_t hosts = 4;
  int64_t members = 6;
  int64_t event_ms = 300;
  int64_t heartbeat_ms = 1000;
  int64_t coordinator_host = -2;  // -1: the switch; -2: as the seed has it.
  int64_t slack_ms = 500;         // How much later than the heartbeat timeout ABORTED may come.
  int64_t verbose = 0;
  std::string transport = "auto";
};

constexpr int64_t kTogetherNs = 30'000'000'000;
constexpr int64_t kMs = 1'000'000;
// At once. More of them, or a new coordinator again and again, and epochs hardly ever form.
constexpr int kOutagesMax = 2;

class Churn {
 public:
  Churn(const ChurnOptions& options, std::unique_ptr<Cluster> cluster)
      : options_(options),
        random_(options.seed),
        cluster_(std::move(cluster)),
        referee_(cluster_->network(), (options.heartbeat_ms + options.slack_ms) * kMs) {}

  bool Run();

 private:
  struct Member {
    std::unique_ptr<Child> child;
    int host = 0;
    bool leaves = false;
    bool busy = false;  // Stopped.
  };

  int64_t Random(int64_t below) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(below)); }
  NetworkHosts& network() { return cluster_->network(); }
  void Note(const std::string& what, const std::string& detail);
  // Calls `act` in so many milliseconds, or when the churn ends.
  void Later(int64_t ms, std::function<void()> act) { due_.emplace(NowNs() + ms * kMs, std::move(act)); }
  void Start();
  Member* Choose();
  void Event();
  void KillCoordinator();
  void TakeCableDown();
  void CutPath();
  void Kill(Member& member);
  void Stop(Member& member);
  void Leave(Member& member);
  void ChangeNetwork(const std::function<absl::Status()>& change);
  void Turn();
  void Report(int64_t rounds) const;

  const ChurnOptions options_;
  std::mt19937_64 random_;
  const std::unique_ptr<Cluster> cluster_;
  Referee referee_;
  std::map<pid_t, Member> members_;
  std::multimap<int64_t, std::function<void()>> due_;
  bool coordinator_dead_ = false;
  int outages_ = 0;
  std::vector<bool> cable_out_ = std::vector<bool>(options_.hosts, false);
  int64_t begun_ns_ = NowNs(), turned_ns_ = begun_ns_;
  int64_t late_ns_ = 0;  // The longest time between two turns.
  std::map<std::string, int64_t> counts_;
};

void Churn::Note(const std::string& what, const std::string& detail) {
  ++counts_[what];
  if (options_.verbose != 0) {
    std::printf("%8.3f %s %s\n", static_cast<double>(NowNs() - begun_ns_) * 1e-9, what.c_str(),
                detail.c_str());
  }
}

void Churn::Start() {
  Member member;
  member.host = static_cast<int>(Random(options_.hosts));
  member.child = cluster_->StartMember(member.host);
  const pid_t pid = member.child->pid();
  Note("started", absl::StrCat(pid, " on host ", member.host));
  referee_.OnStart(pid, member.host);
  members_[pid] = std::move(member);
}

// One that runs. Somebody of the newest epoch is left alone: a job that loses all of its members is another
// job afterwards.
Churn::Member* Churn::Choose() {
  std::vector<Member*> running;
  int newest = 0;
  const auto is_newest = [this](pid_t pid) {
    return referee_.members().at(pid).epoch == referee_.newest_epoch();
  };
  for (const auto& [pid, member] : members_)
    newest += !member.leaves && !member.busy && is_newest(pid) ? 1 : 0;
  for (auto& [pid, member] : members_) {
    if (!member.leaves && !member.busy && (!is_newest(pid) || newest > 1)) running.push_back(&member);
  }
  return running.empty() ? nullptr : running[Random(static_cast<int64_t>(running.size()))];
}

void Churn::ChangeNetwork(const std::function<absl::Status()>& change) {
  SHOAL_CHECK_OK(change());
  referee_.OnNetworkChange();
}

void Churn::TakeCableDown() {
  const int host = static_cast<int>(Random(options_.hosts));
  const auto how = Random(2) == 0 ? NetworkHosts::Cable::kPulled : NetworkHosts::Cable::kDown;
  const int64_t ms = 200 + Random(2800);
  if (cable_out_[host]) return;
  cable_out_[host] = true;
  ++outages_;
  Note(how == NetworkHosts::Cable::kPulled ? "cable pulled" : "interface down",
       absl::StrCat(host, " for ", ms, " ms"));
  ChangeNetwork([&] { return network().SetCable(host, how); });
  Later(ms, [this, host] {
    cable_out_[host] = false;
    --outages_;
    if (options_.verbose != 0) Note("cable back", absl::StrCat(host));
    ChangeNetwork([&] { return network().SetCable(host, NetworkHosts::Cable::kUp); });
  });
}

// Two hosts do not hear each other, or only one of them the other.
void Churn::CutPath() {
  const int a = static_cast<int>(Random(options_.hosts));
  const int b = static_cast<int>((a + 1 + Random(options_.hosts - 1)) % options_.hosts);
  const bool both = Random(2) == 0;
  const int64_t ms = 200 + Random(2800);
  Note(both ? "two hosts parted" : "one host deaf to another", absl::StrCat(a, " ", b, " for ", ms, " ms"));
  const auto set = [this, a, b, both](NetworkHosts::Path path) {
    ChangeNetwork([&] {
      const absl::Status there = network().SetPath(a, b, path);
      return both && there.ok() ? network().SetPath(b, a, path) : there;
    });
  };
  set(NetworkHosts::Path::kCut);
  ++outages_;
  Later(ms, [this, set] {
    set(NetworkHosts::Path::kOpen);
    --outages_;
  });
}

void Churn::KillCoordinator() {
  if (coordinator_dead_) return;
  Note("coordinator killed", "");
  cluster_->coordinator().Signal(SIGKILL);
  (void)cluster_->coordinator().Wait();
  coordinator_dead_ = true;
  Later(Random(600), [this] {
    cluster_->StartCoordinator();
    coordinator_dead_ = false;
  });
}

void Churn::Kill(Member& member) {
  const pid_t pid = member.child->pid();
  Note("killed", absl::StrCat(pid));
  member.child->Signal(SIGKILL);
  referee_.OnGone(pid);
  members_.erase(pid);
  Later(Random(600), [this] { Start(); });
}

void Churn::Stop(Member& member) {
  const pid_t pid = member.child->pid();
  const int64_t ms = options_.heartbeat_ms / 5 + Random(2 * options_.heartbeat_ms);
  Note("stopped", absl::StrCat(pid, " for ", ms, " ms"));
  member.child->Signal(SIGSTOP);
  member.busy = true;
  referee_.OnStop(pid);
  Later(ms, [this, pid] {
    members_.at(pid).child->Signal(SIGCONT);
    members_.at(pid).busy = false;
    referee_.OnContinue(pid);
  });
}

void Churn::Leave(Member& member) {
  Note("left", absl::StrCat(member.child->pid()));
  member.child->Tell("leave");
  member.leaves = true;
  referee_.OnLeave(member.child->pid());
  Later(Random(600), [this] { Start(); });
}

void Churn::Event() {
  const int64_t dice = Random(100);
  if (dice < 30) {
    if (outages_ == kOutagesMax) return;
    return dice < 18 ? TakeCableDown() : CutPath();
  }
  if (dice < 34) return KillCoordinator();
  if (dice < 44) {
    if (static_cast<int64_t>(members_.size()) < options_.members + 2) Start();
    return;
  }
  Member* const member = Choose();
  if (member == nullptr) return;
  if (dice < 66) return Kill(*member);
  if (dice < 84) return Stop(*member);
  if (dice < 92) return Leave(*member);
  Note("cut off", absl::StrCat(member->child->pid()));
  member->child->Tell("cut");
}

// Hears everybody, and does what is due.
void Churn::Turn() {
  const int64_t now_ns = NowNs();
  late_ns_ = std::max(late_ns_, now_ns - turned_ns_);
  turned_ns_ = now_ns;
  for (auto& [pid, member] : members_) {
    while (true) {
      const std::string line = member.child->Line(absl::ZeroDuration());
      if (line.empty()) break;
      if (options_.verbose != 0) {
        std::printf("%8.3f %d %s\n", static_cast<double>(NowNs() - begun_ns_) * 1e-9, pid, line.c_str());
      }
      if (absl::StartsWith(line, "began") || line == "left") continue;
      const MemberReport report = ParseMemberReport(line);
      counts_["collectives aborted"] += report.type == MemberReport::kAborted ? 1 : 0;
      referee_.Hear(pid, report);
    }
  }
  while (!due_.empty() && due_.begin()->first <= now_ns) {
    const std::function<void()> act = std::move(due_.begin()->second);
    due_.erase(due_.begin());
    act();
  }
  SHOAL_CHECK(coordinator_dead_ || !cluster_->coordinator().Ended()) << "the coordinator died";
  for (auto at = members_.begin(); at != members_.end();) {
    Member& member = at->second;
    const bool ended = member.child->Ended();
    if (ended) {
      referee_.OnGone(at->first);
      const int status = member.child->Wait();
      if (!member.leaves || status != 0) {
        referee_.Hear(at->first,
                      ParseMemberReport(absl::StrCat("(ended by itself: wait status ", status, ")")));
      }
    }
    at = ended ? members_.erase(at) : std::next(at);
  }
  referee_.Check(late_ns_);
  (void)poll(nullptr, 0, 2);
}

void Churn::Report(int64_t rounds) const {
  for (const auto& [what, count] : counts_)
    std::printf("  %s: %lld\n", what.c_str(), static_cast<long long>(count));
  std::printf("  epochs: %zu, jobs begun anew: %zu\n", referee_.epochs(), referee_.lineages() - 1);
  std::printf("  rounds of collectives (of those who lived to the end): %lld\n",
              static_cast<long long>(rounds));
  std::printf("  longest turn of this process: %.1f ms\n", static_cast<double>(late_ns_) * 1e-6);
  std::vector<double> sorted = referee_.abort_ms();
  std::sort(sorted.begin(), sorted.end());
  if (sorted.empty()) return;
  std::printf("  from a separation to ABORTED: median %.1f ms, 90 %% %.1f ms, worst %.1f ms of %zu\n",
              sorted[sorted.size() / 2], sorted[sorted.size() * 9 / 10], sorted.back(), sorted.size());
}

bool Churn::Run() {
  cluster_->StartCoordinator();
  for (int64_t i = 0; i < options_.members; ++i) Start();
  const int64_t end_ns = begun_ns_ + options_.seconds * 1000 * kMs;
  int64_t next_ns = begun_ns_ + 1000 * kMs;
  while (NowNs() < end_ns && referee_.violations().empty()) {
    Turn();
    if (NowNs() < next_ns) continue;
    Event();
    next_ns = NowNs() + Random(2 * options_.event_ms) * kMs;
  }
  std::vector<std::function<void()>> left;
  for (auto& [at_ns, act] : due_) left.push_back(std::move(act));
  due_.clear();
  for (const auto& act : left) act();
  const int64_t whole_ns = NowNs();
  while (!referee_.Together() && referee_.violations().empty() && NowNs() < whole_ns + kTogetherNs) Turn();
  const bool together = referee_.Together();
  if (together)
    std::printf("  together again after %.1f ms\n", static_cast<double>(NowNs() - whole_ns) * 1e-6);
  int64_t rounds = 0;
  for (auto& [pid, member] : members_) {
    if (!together) break;
    member.child->Tell("rounds");
    rounds += ParseMemberReport(member.child->LineWith("rounds")).rounds;
  }
  Report(rounds);
  for (const std::string& violation : referee_.violations()) std::printf("FAILED: %s\n", violation.c_str());
  if (together || !referee_.violations().empty()) return together && referee_.violations().empty();
  std::printf("FAILED: %zu members did not come together\n", members_.size());
  for (const auto& [pid, member] : members_) {
    const Referee::Member& known = referee_.members().at(pid);
    std::printf("  pid %d on host %d: epoch %llu of %zu members, %s\n", pid, known.host,
                static_cast<unsigned long long>(known.epoch), known.pids.size(),
                known.over     ? "over"
                : known.worked ? "works"
                               : "begun");
  }
  return false;
}

absl::Status Parse(int argc, char** argv, ChurnOptions* options) {
  const std::map<std::string, int64_t*> numbers = {{"--seconds", &options->seconds},
                                                   {"--seed", &options->seed},
                                                   {"--members", &options->members},
                                                   {"--hosts", &options->hosts},
                                                   {"--event-ms", &options->event_ms},
                                                   {"--heartbeat-ms", &options->heartbeat_ms},
                                                   {"--coordinator-host", &options->coordinator_host},
                                                   {"--slack-ms", &options->slack_ms},
                                                   {"--verbose", &options->verbose}};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    const auto number = numbers.find(name);
    if (name == "--transport" && (value == "auto" || value == "tcp")) {
      options->transport = value;
    } else if (number == numbers.end() || !absl::SimpleAtoi(value, number->second)) {
      return absl::InvalidArgumentError(absl::StrCat(name, " ", value, ": see the top of cluster_churn.cc"));
    }
  }
  if (options->hosts < 2 || options->hosts > 32 || options->event_ms < 1 || options->members < 1) {
    return absl::InvalidArgumentError("want 2 to 32 hosts, a member and a millisecond at least");
  }
  if (options->coordinator_host < NetworkHosts::kSwitch || options->coordinator_host >= options->hosts) {
    options->coordinator_host =
        options->seed % 2 == 0 ? NetworkHosts::kSwitch : options->seed % options->hosts;
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  shoal::ChurnOptions options;
  if (const absl::Status status = shoal::Parse(argc, argv, &options); !status.ok()) {
    std::fprintf(stderr, "cluster_churn: %s\n", status.ToString().c_str());
    return 2;
  }
  auto cluster = shoal::Cluster::Create({.hosts = static_cast<int>(options.hosts),
                                         .coordinator_host = static_cast<int>(options.coordinator_host),
                                         .heartbeat_timeout = absl::Milliseconds(options.heartbeat_ms),
                                         .transport = options.transport});
  if (absl::IsFailedPrecondition(cluster.status())) {
    std::printf("SKIPPED: %s\n", std::string(cluster.status().message()).c_str());
    return 0;
  }
  SHOAL_CHECK_OK(cluster.status());
  std::printf(
      "cluster_churn: seed %lld, %lld members on %lld hosts, coordinator on %lld, transport %s, %lld s\n",
      static_cast<long long>(options.seed), static_cast<long long>(options.members),
      static_cast<long long>(options.hosts), static_cast<long long>(options.coordinator_host),
      options.transport.c_str(), static_cast<long long>(options.seconds));
  return shoal::Churn(options, *std::move(cluster)).Run() ? 0 : 1;
}
