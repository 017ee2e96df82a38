// Members of one job are killed, stopped, cut off, sent away and replaced at random moments while their collectives run;
// the coordinator as well. Every result is checked by the members, every epoch by this process.
//
//   churn [--seconds N] [--seed S] [--members M] [--transport auto|tcp] [--event-ms MS]
//
// Exit code 0: every result was right, nobody died by itself, and when the churn ended all living members came together.
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/harness/elastic.h"

namespace shoal {
namespace {

struct Options {
  int64_t seconds = 10;
  int64_t seed = 1;
  int64_t members = 4;
  int64_t event_ms = 300;
  std::string transport = "auto";
};

constexpr absl::Duration kHeartbeatTimeout = absl::Milliseconds(500);
constexpr int64_t kTogetherNs = 20'000'000'000;

class Churn {
 public:
  explicit Churn(const Options& options)
      : options_(options),
        random_(options.seed),
        job_({.size_min = 1, .heartbeat_timeout = kHeartbeatTimeout, .transport = options.transport}) {}

  bool Run();

 private:
  struct Member {
    std::unique_ptr<Child> child;
    int64_t continue_ns = 0;  // Stopped until then; 0: it runs.
    bool leaves = false;
    uint64_t epoch = 0;
    int size = 0;
  };

  int64_t Random(int64_t below) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(below)); }
  void Fail(const std::string& text) {
    std::printf("FAILED: %s\n", text.c_str());
    failed_ = true;
  }
  void Start() { members_.push_back({job_.StartMember(LiveAsMember)}); }
  void Event();
  void Listen();
  void Hear(Member& member, const std::string& line);
  void Tend();
  bool Together() const;
  void Report() const;

  const Options options_;
  std::mt19937_64 random_;
  ElasticJob job_;
  std::vector<Member> members_;
  int64_t coordinator_due_ns_ = 0;       // It is dead until then; 0: it runs.
  std::vector<int64_t> arrivals_ns_;     // When processes are to be started.
  std::map<uint64_t, std::map<int, int>> epochs_;  // By number: size, and how many said so.
  std::map<std::string, int64_t> counts_;
  std::vector<double> recoveries_ms_;    // From an event to the first epoch after it.
  int64_t event_ns_ = 0;
  uint64_t last_epoch_ = 0;
  bool failed_ = false;
};

void Churn::Event() {
  // Somebody of the newest epoch lives on: a job that loses all of its members at once is another job afterwards.
  std::vector<size_t> running;
  int64_t newest = 0;
  const auto is_newest = [this](const Member& member) { return last_epoch_ != 0 && member.epoch == last_epoch_; };
  for (const Member& member : members_) {
    if (member.continue_ns == 0 && !member.leaves && is_newest(member)) ++newest;
  }
  for (size_t i = 0; i < members_.size(); ++i) {
    if (members_[i].continue_ns != 0 || members_[i].leaves) continue;
    if (newest > 1 || (newest == 1 && !is_newest(members_[i]))) running.push_back(i);
  }
  const int64_t now_ns = NowNs();
  const int64_t dice = Random(100);
  const int64_t later_ns = now_ns + Random(600) * 1'000'000;
  if (dice < 8 && coordinator_due_ns_ == 0) {
    ++counts_["coordinator killed"];
    job_.coordinator().Signal(SIGKILL);
    (void)job_.coordinator().Wait();
    coordinator_due_ns_ = later_ns;
    return;
  }
  if (dice < 16 && members_.size() < static_cast<size_t>(2 * options_.members)) {
    ++counts_["came"];
    return Start();
  }
  if (running.empty()) return;
  event_ns_ = now_ns;
  const size_t chosen = running[Random(static_cast<int64_t>(running.size()))];
  Member& member = members_[chosen];
  if (dice < 55) {
    ++counts_["killed"];
    member.child->Signal(SIGKILL);
    members_.erase(members_.begin() + static_cast<int64_t>(chosen));
    arrivals_ns_.push_back(later_ns);
  } else if (dice < 80) {
    ++counts_["stopped"];
    member.child->Signal(SIGSTOP);
    // About half of the pauses are long enough for an exclusion.
    member.continue_ns = now_ns + (100 + Random(1000)) * 1'000'000;
  } else if (dice < 90) {
    ++counts_["left"];
    member.child->Tell("leave");
    member.leaves = true;
    arrivals_ns_.push_back(later_ns);
  } else {
    ++counts_["cut"];
    member.child->Tell("cut");
  }
}

void Churn::Hear(Member& member, const std::string& line) {
  const std::vector<std::string> words = absl::StrSplit(line, ' ');
  if (absl::StartsWith(line, "epoch ") && words.size() == 8) {
    uint64_t epoch = 0;
    int size = 0;
    SHOAL_CHECK(absl::SimpleAtoi(words[1], &epoch) && absl::SimpleAtoi(words[3], &size)) << line;
    if (epoch <= member.epoch) Fail(absl::StrCat("after epoch ", member.epoch, " a member says: ", line));
    member.epoch = epoch;
    member.size = size;
    std::map<int, int>& sizes = epochs_[epoch];
    ++sizes[size];
    if (sizes.size() > 1 || sizes[size] > size) Fail(absl::StrCat("two views in one epoch: ", line));
    if (epoch > last_epoch_ && event_ns_ != 0) {
      recoveries_ms_.push_back(static_cast<double>(NowNs() - event_ns_) * 1e-6);
      event_ns_ = 0;
    }
    last_epoch_ = std::max(last_epoch_, epoch);
    ++counts_["epochs entered"];
  } else if (absl::StartsWith(line, "aborted")) {
    ++counts_["collectives aborted"];
  } else if (absl::StartsWith(line, "step")) {
    int64_t steps = 0;
    if (absl::SimpleAtoi(words.back(), &steps)) counts_["rounds of collectives (of those who lived to the end)"] += steps;
  } else if (!absl::StartsWith(line, "joined") && line != "left") {
    Fail(absl::StrCat("pid ", member.child->pid(), " says: ", line));
  }
}

void Churn::Listen() {
  for (Member& member : members_) {
    while (true) {
      const std::string line = member.child->Line(absl::ZeroDuration());
      if (line.empty()) break;
      Hear(member, line);
    }
  }
}

// What has become due, and who has ended.
void Churn::Tend() {
  const int64_t now_ns = NowNs();
  if (coordinator_due_ns_ != 0 && now_ns >= coordinator_due_ns_) {
    coordinator_due_ns_ = 0;
    job_.StartCoordinator();
  }
  if (coordinator_due_ns_ == 0 && job_.coordinator().Ended()) return Fail("the coordinator died");
  for (size_t i = 0; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (member.continue_ns != 0 && now_ns >= member.continue_ns) {
      member.child->Signal(SIGCONT);
      member.continue_ns = 0;
    }
    if (!member.child->Ended()) continue;
    const int status = member.child->Wait();
    if (!member.leaves || status != 0) {
      Fail(absl::StrCat("pid ", member.child->pid(), " ended by itself: wait status ", status));
    }
    members_.erase(members_.begin() + static_cast<int64_t>(i--));
  }
  for (size_t i = 0; i < arrivals_ns_.size(); ++i) {
    if (now_ns < arrivals_ns_[i]) continue;
    Start();
    arrivals_ns_.erase(arrivals_ns_.begin() + static_cast<int64_t>(i--));
  }
}

bool Churn::Together() const {
  if (coordinator_due_ns_ != 0 || !arrivals_ns_.empty() || members_.empty()) return false;
  return std::all_of(members_.begin(), members_.end(), [&](const Member& member) {
    return !member.leaves && member.continue_ns == 0 && member.epoch == members_[0].epoch && member.size == static_cast<int>(members_.size());
  });
}

void Churn::Report() const {
  for (const auto& [what, count] : counts_) std::printf("  %s: %lld\n", what.c_str(), static_cast<long long>(count));
  std::printf("  epochs: %zu\n", epochs_.size());
  std::vector<double> sorted = recoveries_ms_;
  std::sort(sorted.begin(), sorted.end());
  if (sorted.empty()) return;
  std::printf("  from an event to the next epoch's first collectives: median %.1f ms, 90 %% %.1f ms, worst %.1f ms\n",
              sorted[sorted.size() / 2], sorted[sorted.size() * 9 / 10], sorted.back());
}

bool Churn::Run() {
  std::printf("churn: seed %lld, %lld members, transport %s, %lld s\n", static_cast<long long>(options_.seed),
              static_cast<long long>(options_.members), options_.transport.c_str(),
              static_cast<long long>(options_.seconds));
  job_.StartCoordinator();
  for (int64_t i = 0; i < options_.members; ++i) Start();
  const int64_t end_ns = NowNs() + options_.seconds * 1'000'000'000;
  int64_t next_ns = NowNs() + 500'000'000;
  while (NowNs() < end_ns && !failed_) {
    Listen();
    Tend();
    if (NowNs() >= next_ns) {
      Event();
      next_ns = NowNs() + Random(2 * options_.event_ms) * 1'000'000;
    }
    (void)poll(nullptr, 0, 2);
  }
  const int64_t together_ns = NowNs() + kTogetherNs;
  while (!Together() && !failed_ && NowNs() < together_ns) {
    Listen();
    Tend();
    (void)poll(nullptr, 0, 2);
  }
  if (!Together() && !failed_) {
    for (const Member& member : members_) {
      std::printf("  pid %d: epoch %llu of %d members\n", member.child->pid(),
                  static_cast<unsigned long long>(member.epoch), member.size);
    }
    Fail(absl::StrCat(members_.size(), " members did not come together after the churn"));
  }
  for (Member& member : members_) {
    if (failed_) break;
    member.child->Tell("steps");
    Hear(member, member.child->LineWith("step"));
  }
  Report();
  return !failed_;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  shoal::Options options;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    std::map<std::string, int64_t*> numbers = {{"--seconds", &options.seconds},
                                               {"--seed", &options.seed},
                                               {"--members", &options.members},
                                               {"--event-ms", &options.event_ms}};
    if (name == "--transport") {
      options.transport = value;
    } else if (!numbers.contains(name) || !absl::SimpleAtoi(value, numbers[name])) {
      std::fprintf(stderr, "churn: %s %s: want --seconds, --seed, --members, --event-ms N or --transport\n",
                   name.c_str(), value.c_str());
      return 2;
    }
  }
  return shoal::Churn(options).Run() ? 0 : 1;
}
