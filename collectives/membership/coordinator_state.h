// What the coordinator's core knows, for the two files that work on it: coordinator_core.cc (processes that
// come and go) and coordinator_epochs.cc (the next epoch).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "collectives/membership/coordinator_core.h"
#include "collectives/membership/seating.h"

namespace shoal {
namespace internal {

// A process that has registered, connected or not.
struct Process {
  MemberInfo info;
  uint64_t arrival = 0;
  CoordinatorCore::Connection connection = 0;  // 0: none.
  int64_t heard_ns = 0;
  uint64_t lineage = 0;  // Its job, 0 for a newcomer,
  Epoch committed{0};    // the last epoch that it knows in it, and the highest that it was proposed in any.
  Epoch promised{0};
  bool ready = false;  // Asked for the epoch after `ready_after`.
  Epoch ready_after{0};
  std::map<uint64_t, std::string> accusations;
  bool given_up = false;  // Silent for too long, or gone while it was proposed.
  enum Answer { kNone, kConnected, kFailed } answer = kNone;
};

struct Proposal {
  View view;
  bool broken = false;  // One of its members is gone.
  std::vector<Dropped> dropped;
};

}  // namespace internal

struct CoordinatorCore::State {
  using Process = internal::Process;
  using Proposal = internal::Proposal;

  State(CoordinatorOptions options, uint64_t seed, int64_t now_ns)
      : options(options), random(seed), started_ns(now_ns), last_call_ns(now_ns), now(now_ns) {}

  // ---- Time ----
  const CoordinatorOptions options;
  std::mt19937_64 random;
  const int64_t started_ns;
  int64_t last_call_ns;
  int64_t paused_ns = 0;  // In which nobody called: all times below are of a clock that stood still then.
  int64_t now;
  int64_t next_due_ns = 0, next_silence_ns = 0;

  // ---- What is known ----
  std::map<uint64_t, Process> processes;  // By id.
  std::map<Connection, uint64_t> connections;
  uint64_t arrivals = 0;
  View committed;
  std::unordered_map<uint64_t, int> rank_of;  // Of `committed`.
  int64_t learned_ns = 0;                     // When `committed` became known here.
  int64_t gives_way_until_ns =
      0;  // `committed` began here, in ignorance of any other job: until then one may come back.
  std::set<uint64_t> left;  // Members of `committed` that left.
  Conflicts conflicts;      // Found since `committed`.
  bool nobody_blamed = false;  // A proposal failed so since `committed`.
  std::unique_ptr<Proposal> proposal;
  std::vector<uint64_t> awaited;                                  // Members that hold up the next epoch.
  int64_t forgiven_ns = std::numeric_limits<int64_t>::min() / 2;  // When conflicts were last forgotten.
  uint64_t number = 0;                                            // The highest epoch ever used or heard of,
  bool counting = false;  // which is this coordinator's own, so the next is too.
  uint64_t joiners_told = 0;
  bool waiting_stale = true;
  std::string waiting;

  std::vector<Action> out;

  // ---- The outside ----
  int64_t Ns(absl::Duration duration) const { return absl::ToInt64Nanoseconds(duration); }
  int64_t TickNs() const { return std::max<int64_t>(Ns(options.heartbeat_timeout) / 8, 1); }

  void Begin(int64_t now_ns) {
    const int64_t passed = std::max<int64_t>(now_ns - last_call_ns, 0);
    paused_ns += std::max<int64_t>(passed - 2 * TickNs(), 0);
    last_call_ns = std::max(last_call_ns, now_ns);
    now = last_call_ns - paused_ns;
  }

  std::vector<Action> Take() {
    std::vector<Action> taken;
    taken.swap(out);
    return taken;
  }

  void Send(Connection connection, CoordinatorMessage message) {
    Action& action = out.emplace_back();
    action.connection = connection;
    action.message = std::move(message);
  }
  void Send(Connection connection, CoordinatorMessage::Type type, std::string cause = "") {
    CoordinatorMessage message;
    message.type = type;
    message.cause = std::move(cause);
    Send(connection, std::move(message));
  }
  void Close(Connection connection, std::string why) {
    Action& action = out.emplace_back();
    action.type = Action::kClose;
    action.connection = connection;
    action.text = std::move(why);
  }
  void Log(std::string text) {
    Action& action = out.emplace_back();
    action.type = Action::kLog;
    action.text = std::move(text);
  }

  // Whether `at_ns` has come; otherwise OnTime looks again then.
  bool Due(int64_t at_ns) {
    if (at_ns <= now) return true;
    next_due_ns = std::min(next_due_ns, at_ns);
    return false;
  }

  // ---- Processes that come and go ----
  Process* Find(uint64_t id) {
    const auto found = processes.find(id);
    return found == processes.end() ? nullptr : &found->second;
  }
  bool IsMember(uint64_t id) const { return rank_of.contains(id); }
  bool IsProposed(uint64_t id) const { return proposal != nullptr && proposal->view.RankOf(id) >= 0; }

  void Hello(Connection connection, const MemberMessage& message);
  bool Welcome(Connection connection, const MemberMessage& message);
  void Adopt(const View& view);
  void TakeFromConnection(uint64_t id, bool given_up);
  void Refuse(Connection connection, CoordinatorMessage::Type type, const std::string& cause);
  void Exclude(uint64_t id, const std::string& cause);
  void ResendCommit(Process& process);
  void RefuseRivals(const Process& process);
  void BuryDead(const MemberInfo& witness, const std::vector<Accusation>& accusations);
  void OnReady(Process& process, const MemberMessage& message);
  void OnFailed(Process& process, const MemberMessage& message);
  void OnLeave(uint64_t id);
  void CloseSilent();

  // ---- The next epoch ----
  void Advance();
  bool ProposalStands();
  void ExcludeBlameless();
  bool Asks(const Process& process) const;
  bool LineageIsOver();
  bool GivenUp(uint64_t id, const std::set<uint64_t>& accused);
  std::vector<MemberInfo> FindSurvivors();
  std::vector<MemberInfo> FindNewcomers() const;
  void AddMutualAccusations(const std::vector<MemberInfo>& survivors);
  void ProposeTo(std::vector<MemberInfo> survivors, std::vector<MemberInfo> newcomers, bool continues);
  void Propose(std::vector<MemberInfo> members, std::vector<Dropped> dropped, bool continues);
  void Commit();
  void SetCommitted(const View& view);
  void TellJoiners();
  const std::string& Waiting();
};

}  // namespace shoal
