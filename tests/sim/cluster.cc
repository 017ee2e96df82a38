#include "tests/sim/cluster.h"

#include <algorithm>
#include <cstdio>
#include <functional>

#include "runtime/base/status.h"
#include "tests/sim/coordinator.h"

namespace shoal::sim {
namespace {

constexpr int64_t kMs = 1'000'000;

// Everything that differs from seed to seed. No test depends on one value of a timeout.
struct Knobs {
  explicit Knobs(std::mt19937_64& random) : random(random) {
    const int64_t timeout_ms = Between(100, 1000);
    coordinator.size_min = static_cast<int>(Between(1, 3));
    coordinator.heartbeat_timeout = absl::Milliseconds(timeout_ms);
    coordinator.return_timeout = absl::Milliseconds(Between(1, 5) * timeout_ms);
    coordinator.settle_time = absl::Milliseconds(Between(0, 200));
    member.core.heartbeat_interval = absl::Milliseconds(timeout_ms / Between(4, 10));
    member.core.heartbeat_timeout = absl::Milliseconds(timeout_ms * Between(1, 2));
    member.core.redial_interval = absl::Milliseconds(Between(5, 100));
    member.work.heartbeat_timeout_ns = timeout_ms * Between(1, 2) * kMs;
    member.work.elements_max = Between(2, 200);
    member.work.piece_max = Chance(0.5) ? Between(2, 64) : 0;
    member.work.window = static_cast<int>(Between(1, 3));
    member.work.ops_max = static_cast<int>(Between(5, 60));
    member.work.pause_ns = Between(1, timeout_ms / 8) * kMs;
    member.work.seed = random();
    member.connect_timeout_ns = timeout_ms * Between(1, 4) * kMs;
    network.delay_ns = Between(20, 2000) * 1000;
    network.spike_ns = Between(1, timeout_ms / 4) * kMs;
    network.spikes = Chance(0.5) ? 0.01 : 0;
    network.dial_timeout_ns = timeout_ms * kMs;
    members = static_cast<int>(Between(coordinator.size_min, 8));
    members_max = Chance(0.02) ? 30 : 12;
    coordinators = Chance(0.6) ? 1 : Between(2, 3);
    zombies = Chance(0.5);
    wanted_ranks = Chance(0.2);
    timeout_ns = timeout_ms * kMs;
    chaos_ns = Between(4, 14) * timeout_ns;
    fault_gap_ns = timeout_ns * Between(1, 12) / 10;
  }

  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % (high - low + 1));
  }
  bool Chance(double p) { return static_cast<double>(random() >> 11) * 0x1p-53 < p; }

  std::mt19937_64& random;
  CoordinatorOptions coordinator;
  MemberKnobs member;
  Network::Knobs network;
  int members, members_max;
  int64_t coordinators;
  bool zombies;  // A coordinator that was replaced goes on until the faults stop.
  bool wanted_ranks;
  int64_t timeout_ns, chaos_ns, fault_gap_ns;
};

class Cluster : public Environment {
 public:
  explicit Cluster(const Options& options)
      : options_(options), random_(options.seed), knobs_(random_), network_(random_(), knobs_.network) {}

  Outcome Run();

  Network& network() override { return network_; }
  Referee& referee() override { return referee_; }
  Node CoordinatorNode(size_t index) override {
    return seats_[index].process != nullptr ? seats_[index].process->node() : 0;
  }
  size_t coordinators() const override { return seats_.size(); }
  Node MemberNode(uint64_t address) override {
    const auto found = members_.find(address);
    return found == members_.end() ? 0 : found->second->node();
  }
  uint64_t NewId() override { return ++last_id_; }
  bool verbose() const override { return options_.verbose; }
  void Log(Node node, const std::string& text) override {
    if (options_.verbose)
      std::fprintf(stderr, "%10.3f ms  node %-3u %s\n", network_.now() * 1e-6, node, text.c_str());
  }

 private:
  // Where a coordinator runs, dies and is started anew.
  struct Seat {
    std::unique_ptr<Coordinator> process;
    int64_t restart_ns = 0;
  };

  void StartCoordinator(size_t seat);
  void KillCoordinator(size_t seat);
  void Elect();
  void StartMember();
  void KillMember(uint64_t address);
  void Reap();

  void PlanFaults();
  void NextFault();
  void Fault();
  void StormOrJoin();
  void CrashMembers();
  void PauseSomebody();
  void CrashCoordinator();
  void Partition();
  void Heal();

  std::string Unsettled();
  std::string Stuck();

  uint64_t SomeMember() {
    auto at = members_.begin();
    std::advance(at, random_() % members_.size());
    return at->first;
  }
  std::vector<Node> Nodes() const;

  const Options options_;
  std::mt19937_64 random_;
  Knobs knobs_;
  Network network_;
  Referee referee_;
  std::vector<Seat> seats_;
  size_t leader_ = 0;
  int64_t lease_ns_ = 0;                                 // Until when it leads; it renews while it can.
  std::map<uint64_t, std::unique_ptr<Member>> members_;  // By address.
  std::vector<std::unique_ptr<Process>> dead_;           // Killed from within one of their own events.
  uint64_t last_address_ = 0, last_id_ = 0;
  bool healing_ = false;
  std::vector<std::function<void()>> faults_;
  std::vector<std::pair<Node, Node>> partitions_;
};

// ---- Processes

void Cluster::StartCoordinator(size_t seat) {
  seats_[seat].process = std::make_unique<Coordinator>(this, knobs_.coordinator,
                                                       options_.sabotage == Sabotage::kPresumeConfirmed);
  Log(seats_[seat].process->node(), "is a coordinator");
}

void Cluster::KillCoordinator(size_t seat) {
  if (seats_[seat].process == nullptr) return;
  Log(seats_[seat].process->node(), "dies, a coordinator");
  network_.Kill(seats_[seat].process->node());
  dead_.push_back(std::move(seats_[seat].process));
}

// One leads at a time, as long as its lease lasts; a paused one does not know that it lost it, until it is
// told.
void Cluster::Elect() {
  const int64_t now = network_.now();
  const int64_t lease_ns = knobs_.timeout_ns / 2;
  const auto fit = [&](size_t seat) {
    Coordinator* process = seats_[seat].process.get();
    return process != nullptr && !network_.Paused(process->node());
  };
  if (fit(leader_) && seats_[leader_].process->leads()) lease_ns_ = now + lease_ns;
  if (now >= lease_ns_) {
    const size_t first = random_() % seats_.size();
    for (size_t i = 0; i < seats_.size(); ++i) {
      const size_t seat = (first + i) % seats_.size();
      if (!fit(seat)) continue;
      leader_ = seat;
      lease_ns_ = now + lease_ns;
      const uint64_t seed = options_.sabotage == Sabotage::kEqualSeeds ? 1 : random_();
      if (!seats_[seat].process->leads()) seats_[seat].process->Lead(seed);
      break;
    }
  }
  for (size_t seat = 0; seat < seats_.size(); ++seat) {
    if (seat != leader_ && fit(seat) && (healing_ || !knobs_.zombies)) seats_[seat].process->StepDown();
  }
  network_.At(now + lease_ns / 4, [this] { Elect(); });
}

void Cluster::StartMember() {
  const uint64_t address = ++last_address_;
  const int wanted = knobs_.wanted_ranks && random_() % 2 == 0 ? static_cast<int>(random_() % 8) : -1;
  members_[address] = std::make_unique<Member>(this, knobs_.member, address, wanted);
  Log(members_[address]->node(), "starts");
}

void Cluster::KillMember(uint64_t address) {
  const auto found = members_.find(address);
  Log(found->second->node(), "dies");
  network_.Kill(found->second->node());
  dead_.push_back(std::move(found->second));
  members_.erase(found);
}

// Processes that have left or were refused.
void Cluster::Reap() {
  std::vector<uint64_t> gone;
  for (const auto& [address, member] : members_) {
    if (member->gone()) gone.push_back(address);
  }
  for (uint64_t address : gone) KillMember(address);
  dead_.clear();
}

std::vector<Node> Cluster::Nodes() const {
  std::vector<Node> nodes;
  for (const auto& [address, member] : members_) nodes.push_back(member->node());
  for (const Seat& seat : seats_) {
    if (seat.process != nullptr) nodes.push_back(seat.process->node());
  }
  return nodes;
}

// ---- Faults

// Every seed has some kinds of faults only, so that each kind also happens without the others.
void Cluster::PlanFaults() {
  const std::vector<std::function<void()>> all = {
      [this] { CrashMembers(); },
      [this] { PauseSomebody(); },
      [this] { StormOrJoin(); },
      [this] {
        if (!members_.empty()) members_.at(SomeMember())->Leave();
      },
      [this] { CrashCoordinator(); },
      [this] { Partition(); },
      [this] {
        const std::vector<Link> links = network_.OpenLinks();
        if (!links.empty()) network_.Reset(links[random_() % links.size()]);
      },
  };
  for (const auto& fault : all) {
    if (knobs_.Chance(0.6)) faults_.push_back(fault);
  }
  NextFault();
}

void Cluster::NextFault() {
  const int64_t gap_ns = static_cast<int64_t>(random_() % (2 * knobs_.fault_gap_ns)) + 1;
  network_.At(network_.now() + gap_ns, [this] {
    if (healing_) return;
    if (!faults_.empty()) faults_[random_() % faults_.size()]();
    // Two at the same time are a case of their own.
    if (!faults_.empty() && knobs_.Chance(0.2)) faults_[random_() % faults_.size()]();
    Reap();
    if (knobs_.Chance(0.3) && members_.size() < static_cast<size_t>(knobs_.members)) StartMember();
    NextFault();
  });
}

void Cluster::CrashMembers() {
  int count = knobs_.Chance(0.05) ? 100 : knobs_.Chance(0.2) ? 2 : 1;
  for (; count > 0 && !members_.empty(); --count) KillMember(SomeMember());
}

void Cluster::StormOrJoin() {
  int count = knobs_.Chance(0.2) ? knobs_.members_max : 1;
  for (; count > 0 && members_.size() < static_cast<size_t>(knobs_.members_max); --count) StartMember();
}

void Cluster::PauseSomebody() {
  const std::vector<Node> nodes = Nodes();
  if (nodes.empty()) return;
  const Node node = nodes[random_() % nodes.size()];
  const int64_t pause_ns = static_cast<int64_t>(random_() % (4 * knobs_.timeout_ns));
  Log(node, absl::StrCat("is stopped for ", pause_ns / kMs, " ms"));
  network_.Pause(node);
  network_.At(network_.now() + pause_ns, [this, node] {
    if (!network_.Paused(node)) return;
    Log(node, "goes on");
    network_.Resume(node);
  });
}

void Cluster::CrashCoordinator() {
  const size_t seat = random_() % seats_.size();
  KillCoordinator(seat);
  const int64_t down_ns = static_cast<int64_t>(random_() % (3 * knobs_.timeout_ns));
  network_.At(network_.now() + down_ns, [this, seat] {
    if (seats_[seat].process == nullptr) StartCoordinator(seat);
  });
}

// Cuts one process off from all, or one way between two, for a while.
void Cluster::Partition() {
  const std::vector<Node> nodes = Nodes();
  if (nodes.size() < 2) return;
  std::vector<std::pair<Node, Node>> cut;
  const Node one = nodes[random_() % nodes.size()];
  const bool both_ways = knobs_.Chance(0.6), many = knobs_.Chance(0.5);
  for (Node other : nodes) {
    if (other == one || (many ? knobs_.Chance(0.4) : other != nodes[random_() % nodes.size()])) continue;
    cut.push_back({one, other});
    if (both_ways) cut.push_back({other, one});
  }
  Log(one, absl::StrCat("is cut off, in ", cut.size(), " directions"));
  for (const auto& [from, to] : cut) {
    network_.Block(from, to);
    partitions_.push_back({from, to});
  }
  network_.At(network_.now() + static_cast<int64_t>(random_() % (5 * knobs_.timeout_ns)), [this, cut, one] {
    Log(one, "is connected again");
    for (const auto& [from, to] : cut) network_.Unblock(from, to);
  });
}

void Cluster::Heal() {
  Log(0, "faults stop");
  healing_ = true;
  for (const auto& [from, to] : partitions_) network_.Unblock(from, to);
  for (Node node : Nodes()) network_.Resume(node);
  for (size_t seat = 0; seat < seats_.size(); ++seat) {
    if (seats_[seat].process == nullptr) StartCoordinator(seat);
  }
  Reap();
  while (members_.size() < static_cast<size_t>(knobs_.coordinator.size_min)) StartMember();
}

// ---- The end

// What is missing until all live processes work in one epoch; empty: nothing.
std::string Cluster::Unsettled() {
  const View* common = nullptr;
  if (members_.size() < static_cast<size_t>(knobs_.coordinator.size_min)) return "too few processes";
  for (const auto& [address, member] : members_) {
    if (member->gone()) return "somebody is leaving";
    if (member->epoch() == nullptr || member->epoch()->completed() == 0)
      return absl::StrCat("not at work: ", member->Describe());
    const View& view = member->epoch()->view();
    if (common == nullptr) common = &view;
    if (view.lineage != common->lineage || view.epoch != common->epoch) return "two epochs at once";
  }
  if (common->members.size() != members_.size()) return "somebody is in the epoch who is not there";
  return "";
}

std::string Cluster::Stuck() {
  std::string text = absl::StrCat("stuck although all faults have ended: ", Unsettled());
  for (const auto& [address, member] : members_) absl::StrAppend(&text, "\n    ", member->Describe());
  return text;
}

Outcome Cluster::Run() {
  seats_.resize(knobs_.coordinators);
  for (size_t seat = 0; seat < seats_.size(); ++seat) StartCoordinator(seat);
  Elect();
  for (int i = 0; i < knobs_.members; ++i) StartMember();
  PlanFaults();
  while (network_.now() < knobs_.chaos_ns && referee_.ok()) network_.RunOne();
  Heal();
  const int64_t limit_ns = network_.now() + 60 * knobs_.timeout_ns +
                           10 * absl::ToInt64Nanoseconds(knobs_.coordinator.return_timeout);
  int64_t look_ns = 0;
  while (referee_.ok()) {
    network_.RunOne();
    if (network_.now() < look_ns) continue;
    look_ns = network_.now() + kMs;
    Reap();
    while (members_.size() < static_cast<size_t>(knobs_.coordinator.size_min)) StartMember();
    if (Unsettled().empty()) break;
    if (network_.now() > limit_ns) referee_.Fail(Stuck());
  }
  Outcome outcome;
  outcome.violations = referee_.violations();
  network_.Note(network_.random()() ^ random_());
  outcome.digest = network_.digest();
  outcome.events = network_.events();
  outcome.views = referee_.views();
  outcome.sums = referee_.sums();
  outcome.simulated_ns = network_.now();
  return outcome;
}

}  // namespace

Outcome Simulate(const Options& options) { return Cluster(options).Run(); }

}  // namespace shoal::sim
