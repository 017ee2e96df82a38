// Why there are never two views with one (lineage, epoch).
//
// One coordinator gives each number to one proposal. Two coordinators at once (an old one was paused, or cut off, and is
// back) do not use the same numbers of a lineage: whoever drew the lineage counts up by one; whoever took over, that is,
// heard a number that it had not given out itself, first skips a random 2^20 to 2^36, and counts up from there. So ranges
// of numbers belong to one coordinator each, whatever the other one does and whichever members each one reaches. That
// holds for views without a common member too, which promises of members alone do not keep apart.
//
// Why there is one line of views. A member confirms a proposal only on its present connection and above all that it was
// ever proposed, and a view is committed only when all of its members confirmed it. So epochs of a member only grow. A
// view of the lineage contains a member of the last view that its coordinator knows, which has told it all that it
// promised. If two coordinators still cut a job in two, each half works in epochs of its own, and when both halves meet at
// one coordinator, the higher epoch is the job; the others are excluded and join anew.
#include "collectives/membership/coordinator_core.h"

#include <algorithm>
#include <limits>
#include <random>
#include <set>
#include <unordered_map>

#include "collectives/membership/seating.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint64_t kEpochMax = uint64_t{1} << 62;
constexpr size_t kNamesMax = 8;

uint64_t Number(Epoch epoch) { return static_cast<uint64_t>(epoch); }

std::pair<uint64_t, uint64_t> Pair(uint64_t a, uint64_t b) { return {std::min(a, b), std::max(a, b)}; }

// A process that has registered, connected or not.
struct Process {
  MemberInfo info;
  uint64_t arrival = 0;
  CoordinatorCore::Connection connection = 0;  // 0: none.
  int64_t heard_ns = 0;
  Epoch committed{0};  // The last epoch that it knows, and the highest that it was proposed.
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

}  // namespace

struct CoordinatorCore::State {
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
  int64_t gives_way_until_ns = 0;  // `committed` began here, in ignorance of any other job: until then one may come back.
  std::set<uint64_t> left;                    // Members of `committed` that left.
  Conflicts conflicts;                        // Found since `committed`.
  std::unique_ptr<Proposal> proposal;
  uint64_t number = 0;  // The highest epoch ever used or heard of,
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
  void OnReady(Process& process, const MemberMessage& message);
  void OnFailed(Process& process, const MemberMessage& message);
  void OnLeave(uint64_t id);
  void CloseSilent();

  // ---- The next epoch ----
  void Advance();
  bool ProposalStands();
  bool Asks(const Process& process) const;
  bool LineageIsOver();
  bool GivenUp(uint64_t id, const std::set<uint64_t>& accused);
  bool FindSurvivors(std::vector<MemberInfo>* survivors);
  std::vector<MemberInfo> FindNewcomers() const;
  void AddMutualAccusations(const std::vector<MemberInfo>& survivors);
  void Propose(std::vector<MemberInfo> members, std::vector<Dropped> dropped, bool continues);
  void Commit();
  void SetCommitted(const View& view);
  void TellJoiners();
  const std::string& Waiting();
  std::string WaitingForMembers();
};

void CoordinatorCore::State::Refuse(Connection connection, CoordinatorMessage::Type type, const std::string& cause) {
  Send(connection, type, cause);
  Close(connection, cause);
}

// The process is no longer one of this job, though it answers: it is told so, and forgotten.
void CoordinatorCore::State::Exclude(uint64_t id, const std::string& cause) {
  Process* process = Find(id);
  if (process == nullptr) return;
  if (process->connection != 0) {
    Log(absl::StrCat(process->info.Name(), " is excluded: ", cause));
    connections.erase(process->connection);
    Refuse(process->connection, CoordinatorMessage::kExcluded, cause);
  }
  if (IsProposed(id)) proposal->broken = true;
  if (IsMember(id)) left.insert(id);
  processes.erase(id);
}

// The connection of a process is gone. Members stay known, others do not.
void CoordinatorCore::State::TakeFromConnection(uint64_t id, bool given_up) {
  Process* process = Find(id);
  connections.erase(process->connection);
  process->connection = 0;
  process->given_up = given_up;
  if (IsProposed(id)) {
    proposal->broken = true;
    process->given_up = true;
  }
  if (!IsMember(id) || left.contains(id)) processes.erase(id);
}

void CoordinatorCore::State::Hello(Connection connection, const MemberMessage& message) {
  if (Number(message.promised) > kEpochMax || Number(message.committed.epoch) > Number(message.promised))
    return Close(connection, "its epoch is impossible");
  if (Process* known = Find(message.info.id)) {
    if (known->connection != 0) {
      Close(known->connection, "replaced by a newer connection");
      TakeFromConnection(message.info.id, /*given_up=*/false);
    }
  }
  if (Number(message.promised) > number) {
    number = Number(message.promised);
    counting = false;
  }
  if (!Welcome(connection, message)) return;

  Process& process = processes[message.info.id];
  process = Process();
  process.info = message.info;
  process.arrival = ++arrivals;
  process.connection = connection;
  process.heard_ns = now;
  process.committed = message.committed.epoch;
  process.promised = message.promised;
  connections[connection] = message.info.id;
  next_silence_ns = std::min(next_silence_ns, now + Ns(options.heartbeat_timeout));
  Send(connection, CoordinatorMessage::kHeartbeat);
  if (!IsMember(message.info.id)) return;
  ResendCommit(process);
  if (joiners_told != 0) {
    CoordinatorMessage joiners;
    joiners.type = CoordinatorMessage::kJoiners;
    joiners.joiners = joiners_told;
    Send(connection, std::move(joiners));
  }
  // A job that was given up has a member again.
  if (proposal != nullptr && proposal->view.lineage != committed.lineage) proposal->broken = true;
}

// Whether the process may stay: as a member of the job that is known here, or as a newcomer.
bool CoordinatorCore::State::Welcome(Connection connection, const MemberMessage& message) {
  const View& theirs = message.committed;
  if (theirs.lineage == 0) return true;
  const bool unknown = committed.lineage == 0;
  const bool newer = theirs.lineage == committed.lineage && theirs.epoch > committed.epoch;
  const bool older_job = theirs.lineage != committed.lineage && now < gives_way_until_ns;
  if (theirs.RankOf(message.info.id) >= 0 && (unknown || newer || older_job)) Adopt(theirs);
  if (IsMember(message.info.id) && theirs.lineage == committed.lineage) return true;
  std::string cause = absl::StrCat("epoch ", Number(committed.epoch), " was formed without it");
  if (theirs.lineage != committed.lineage) cause = "the job of its epoch has ended, and another one has begun";
  Log(absl::StrCat(message.info.Name(), " came back and is excluded: ", cause));
  Refuse(connection, CoordinatorMessage::kExcluded, cause);
  return false;
}

// A member knows an epoch that this coordinator does not: another coordinator formed it.
void CoordinatorCore::State::Adopt(const View& view) {
  Log(absl::StrCat("a member says that epoch ", Number(view.epoch), " has ", view.members.size(), " members"));
  proposal.reset();
  SetCommitted(view);
  gives_way_until_ns = 0;
  std::vector<uint64_t> gone, strangers;
  for (auto& [id, process] : processes) {
    if (IsMember(id)) {
      if (process.connection != 0) ResendCommit(process);
    } else if (process.connection == 0) {
      gone.push_back(id);
    } else if (process.committed != Epoch{0}) {
      strangers.push_back(id);
    }
  }
  for (uint64_t id : gone) processes.erase(id);
  for (uint64_t id : strangers)
    Exclude(id, absl::StrCat("epoch ", Number(view.epoch), " was formed without it"));
}

// It confirmed the committed view, but the word that it is committed did not reach it.
void CoordinatorCore::State::ResendCommit(Process& process) {
  if (process.committed >= committed.epoch || process.promised != committed.epoch) return;
  CoordinatorMessage commit;
  commit.type = CoordinatorMessage::kCommit;
  commit.view.lineage = committed.lineage;
  commit.view.epoch = committed.epoch;
  Send(process.connection, std::move(commit));
  process.committed = committed.epoch;
}

// Newcomers that want the rank of a process that was here before them and, as its message shows, still is.
void CoordinatorCore::State::RefuseRivals(const Process& process) {
  const int wanted = process.info.wanted_rank;
  if (wanted < 0) return;
  std::vector<uint64_t> rivals;
  for (const auto& [id, other] : processes) {
    if (other.info.wanted_rank != wanted || other.connection == 0 || IsMember(id) || IsProposed(id)) continue;
    if (IsMember(process.info.id) || other.arrival > process.arrival) rivals.push_back(id);
  }
  std::erase(rivals, process.info.id);
  for (uint64_t id : rivals) {
    const Connection connection = Find(id)->connection;
    const std::string cause = absl::StrCat("rank ", wanted, " is taken by ", process.info.Name());
    Log(absl::StrCat(Find(id)->info.Name(), " is refused: ", cause));
    TakeFromConnection(id, /*given_up=*/true);
    Refuse(connection, CoordinatorMessage::kRefused, cause);
  }
}

void CoordinatorCore::State::OnReady(Process& process, const MemberMessage& message) {
  process.ready = true;
  process.ready_after = message.epoch;
  process.accusations.clear();
  for (const Accusation& accusation : message.accusations) process.accusations[accusation.id] = accusation.cause;
}

void CoordinatorCore::State::OnFailed(Process& process, const MemberMessage& message) {
  const bool current = IsProposed(process.info.id) && proposal->view.epoch == message.epoch;
  if (current && message.accusations.empty())
    return Exclude(process.info.id, "it could not connect, and blames nobody");
  if (current) process.answer = Process::kFailed;
  for (const Accusation& accusation : message.accusations) {
    if (accusation.id == process.info.id) continue;
    process.accusations[accusation.id] = accusation.cause;
    if (current) conflicts[Pair(process.info.id, accusation.id)] = accusation.cause;
  }
}

void CoordinatorCore::State::OnLeave(uint64_t id) {
  const Process& process = *Find(id);
  Log(absl::StrCat(process.info.Name(), " leaves"));
  Close(process.connection, "it leaves");
  if (IsMember(id)) left.insert(id);
  TakeFromConnection(id, /*given_up=*/true);
}

void CoordinatorCore::State::CloseSilent() {
  if (now < next_silence_ns) return;
  const int64_t timeout_ns = Ns(options.heartbeat_timeout);
  next_silence_ns = kNeverNs;
  std::vector<uint64_t> silent;
  for (const auto& [connection, id] : connections) {
    const int64_t at_ns = Find(id)->heard_ns + timeout_ns;
    if (at_ns <= now) {
      silent.push_back(id);
    } else {
      next_silence_ns = std::min(next_silence_ns, at_ns);
    }
  }
  for (uint64_t id : silent) {
    const std::string why = absl::StrCat("silent for ", absl::FormatDuration(options.heartbeat_timeout));
    Log(absl::StrCat(Find(id)->info.Name(), " is ", why));
    Close(Find(id)->connection, why);
    TakeFromConnection(id, /*given_up=*/true);
  }
}

// Takes the next step that is due towards the next epoch, after anything has happened.
void CoordinatorCore::State::Advance() {
  next_due_ns = kNeverNs;
  waiting_stale = true;
  if (proposal != nullptr && ProposalStands()) return TellJoiners();
  proposal.reset();

  std::vector<MemberInfo> survivors;
  const bool over = committed.lineage == 0 ? Due(started_ns + Ns(options.settle_time)) : LineageIsOver();
  if (over || (FindSurvivors(&survivors) && !survivors.empty())) {
    std::vector<MemberInfo> newcomers = FindNewcomers();
    AddMutualAccusations(survivors);
    std::vector<Dropped> dropped = DropConflicting(conflicts, &survivors, &newcomers);
    const size_t room = std::max<size_t>(options.size_max, survivors.size()) - survivors.size();
    if (newcomers.size() > room) newcomers.resize(room);
    const size_t size = survivors.size() + newcomers.size();
    if (size >= static_cast<size_t>(std::max(options.size_min, 1)))
      Propose(Seat(survivors, newcomers), std::move(dropped), /*continues=*/!over);
  }
  TellJoiners();
}

// Whether the proposal under way goes on; commits it when all have confirmed it.
bool CoordinatorCore::State::ProposalStands() {
  if (proposal->broken) return false;
  bool failed = false;
  for (const MemberInfo& member : proposal->view.members) {
    const Process::Answer answer = Find(member.id)->answer;
    if (answer == Process::kNone) return true;
    failed |= answer == Process::kFailed;
  }
  if (!failed) Commit();
  return false;
}

// A request for the epoch after an older one counts from a member that has lost the committed one: it confirmed it and has
// turned to another proposal since.
bool CoordinatorCore::State::Asks(const Process& process) const {
  if (!process.ready) return false;
  if (!IsMember(process.info.id)) return true;
  return process.ready_after == committed.epoch || process.committed < committed.epoch;
}

// Whether nobody is left to continue the job.
bool CoordinatorCore::State::LineageIsOver() {
  const int64_t timeout_ns = Ns(options.return_timeout);
  for (const MemberInfo& member : committed.members) {
    if (left.contains(member.id)) continue;
    const Process* process = Find(member.id);
    if (process != nullptr && process->connection != 0) return false;
    if (!Due((process != nullptr ? process->heard_ns : learned_ns) + timeout_ns)) return false;
  }
  return true;
}

// Whether the next epoch is formed without a member of the committed one that is not connected.
bool CoordinatorCore::State::GivenUp(uint64_t id, const std::set<uint64_t>& accused) {
  if (left.contains(id)) return true;
  const Process* process = Find(id);
  const int64_t heartbeat_ns = Ns(options.heartbeat_timeout);
  if (process == nullptr)
    return Due(learned_ns + (accused.contains(id) ? heartbeat_ns : Ns(options.return_timeout)));
  return process->given_up || accused.contains(id) || Due(process->heard_ns + heartbeat_ns);
}

// False: somebody must be waited for.
bool CoordinatorCore::State::FindSurvivors(std::vector<MemberInfo>* survivors) {
  std::set<uint64_t> accused;
  for (const MemberInfo& member : committed.members) {
    const Process* process = Find(member.id);
    if (process == nullptr || process->connection == 0) continue;
    if (!Asks(*process)) return false;
    for (const auto& [id, cause] : process->accusations) accused.insert(id);
    survivors->push_back(process->info);
  }
  bool wait = false;
  for (const MemberInfo& member : committed.members) {
    const Process* process = Find(member.id);
    if (process != nullptr && process->connection != 0) continue;
    wait |= !GivenUp(member.id, accused);
  }
  return !wait;
}

// In the order of their arrival.
std::vector<MemberInfo> CoordinatorCore::State::FindNewcomers() const {
  std::map<uint64_t, const Process*> by_arrival;
  std::map<int, const Process*> by_wanted;
  for (const auto& [id, process] : processes) {
    if (process.connection == 0) continue;
    if (process.info.wanted_rank >= 0) {
      const Process*& holder = by_wanted[process.info.wanted_rank];
      const bool first = holder == nullptr || process.arrival < holder->arrival;
      if (IsMember(id) || (first && (holder == nullptr || !IsMember(holder->info.id)))) holder = &process;
    }
    if (!IsMember(id) && process.ready) by_arrival[process.arrival] = &process;
  }
  std::vector<MemberInfo> newcomers;
  for (const auto& [arrival, process] : by_arrival) {
    const int wanted = process->info.wanted_rank;
    if (wanted < 0 || by_wanted[wanted] == process) newcomers.push_back(process->info);
  }
  return newcomers;
}

void CoordinatorCore::State::AddMutualAccusations(const std::vector<MemberInfo>& survivors) {
  for (const MemberInfo& survivor : survivors) {
    for (const auto& [id, cause] : Find(survivor.id)->accusations) {
      const Process* other = Find(id);
      if (other == nullptr || other->connection == 0) continue;
      if (other->accusations.contains(survivor.id)) conflicts[Pair(survivor.id, id)] = cause;
    }
  }
}

void CoordinatorCore::State::Propose(std::vector<MemberInfo> members, std::vector<Dropped> dropped, bool continues) {
  uint64_t lineage = committed.lineage;
  if (!continues) {
    do lineage = random();
    while (lineage == 0);
    counting = true;
  }
  number += 1;
  if (!counting) number += (uint64_t{1} << 20) + random() % (uint64_t{1} << 36);
  counting = true;
  proposal = std::make_unique<Proposal>();
  proposal->view = {.lineage = lineage, .epoch = Epoch{number}, .members = std::move(members)};
  proposal->dropped = std::move(dropped);
  CoordinatorMessage message;
  message.type = CoordinatorMessage::kPropose;
  message.view = proposal->view;
  for (const MemberInfo& member : proposal->view.members) {
    Process* process = Find(member.id);
    process->answer = Process::kNone;
    process->promised = proposal->view.epoch;
    Send(process->connection, message);
  }
}

void CoordinatorCore::State::Commit() {
  const std::unique_ptr<Proposal> done = std::move(proposal);
  const View old = committed;
  Log(absl::StrCat("epoch ", number, ": ", done->view.members.size(), " members"));
  SetCommitted(done->view);
  if (old.lineage == 0) {
    gives_way_until_ns = now + Ns(options.return_timeout);
  } else if (old.lineage != committed.lineage) {
    gives_way_until_ns = 0;
  }
  CoordinatorMessage commit;
  commit.type = CoordinatorMessage::kCommit;
  commit.view.lineage = committed.lineage;
  commit.view.epoch = committed.epoch;
  for (const MemberInfo& member : committed.members) {
    Process* process = Find(member.id);
    process->committed = committed.epoch;
    process->ready = false;
    process->accusations.clear();
    Send(process->connection, commit);
  }
  for (const Dropped& dropped : done->dropped) {
    if (!IsMember(dropped.id)) Exclude(dropped.id, dropped.cause);
  }
  for (const MemberInfo& member : old.members) {
    if (!IsMember(member.id))
      Exclude(member.id, absl::StrCat("epoch ", Number(committed.epoch), " was formed without it"));
  }
}

void CoordinatorCore::State::SetCommitted(const View& view) {
  committed = view;
  rank_of.clear();
  for (size_t rank = 0; rank < view.members.size(); ++rank)
    rank_of[view.members[rank].id] = static_cast<int>(rank);
  learned_ns = now;
  left.clear();
  conflicts.clear();
  joiners_told = 0;
}

void CoordinatorCore::State::TellJoiners() {
  uint64_t joiners = 0;
  for (const auto& [id, process] : processes)
    joiners += process.connection != 0 && process.ready && !IsMember(id) && !IsProposed(id);
  if (joiners == joiners_told) return;
  joiners_told = joiners;
  CoordinatorMessage message;
  message.type = CoordinatorMessage::kJoiners;
  message.joiners = joiners;
  for (const auto& [id, process] : processes) {
    if (process.connection != 0 && IsMember(id)) Send(process.connection, message);
  }
}

// For whom those wait that have asked for the next epoch.
const std::string& CoordinatorCore::State::Waiting() {
  if (!waiting_stale) return waiting;
  waiting_stale = false;
  if (proposal != nullptr) {
    std::vector<std::string> names;
    for (const MemberInfo& member : proposal->view.members) {
      if (Find(member.id)->answer == Process::kNone) names.push_back(member.Name());
    }
    waiting = absl::StrCat("epoch ", Number(proposal->view.epoch), " is being connected, not yet by ");
    for (size_t i = 0; i < std::min(names.size(), kNamesMax); ++i)
      absl::StrAppend(&waiting, i == 0 ? "" : "; ", names[i]);
    if (names.size() > kNamesMax) absl::StrAppend(&waiting, " and ", names.size() - kNamesMax, " more");
    return waiting;
  }
  waiting = WaitingForMembers();
  if (waiting.empty()) {
    size_t here = 0;
    for (const auto& [id, process] : processes) here += process.connection != 0 && process.ready;
    waiting = absl::StrCat(here, " of at least ", options.size_min, " processes are here");
  }
  return waiting;
}

std::string CoordinatorCore::State::WaitingForMembers() {
  std::string text;
  size_t count = 0;
  for (const MemberInfo& member : committed.members) {
    const Process* process = Find(member.id);
    const bool connected = process != nullptr && process->connection != 0;
    if ((connected && Asks(*process)) || left.contains(member.id)) continue;
    if (process != nullptr && process->given_up) continue;
    if (++count > kNamesMax) continue;
    absl::StrAppend(&text, count == 1 ? "waits for " : "; ", "rank ", rank_of.at(member.id), " (", member.Name(), "), ",
                    connected ? "which is busy" : "which is not connected");
  }
  if (count > kNamesMax) absl::StrAppend(&text, " and ", count - kNamesMax, " more");
  return text;
}

CoordinatorCore::CoordinatorCore(CoordinatorOptions options, uint64_t seed, int64_t now_ns)
    : state_(std::make_unique<State>(options, seed, now_ns)) {}

CoordinatorCore::~CoordinatorCore() = default;

std::vector<CoordinatorCore::Action> CoordinatorCore::OnMessage(Connection connection, const MemberMessage& message,
                                                                int64_t now_ns) {
  State& state = *state_;
  state.Begin(now_ns);
  const auto known = state.connections.find(connection);
  if (known == state.connections.end()) {
    if (message.type == MemberMessage::kHello) {
      state.Hello(connection, message);
    } else {
      state.Close(connection, "it speaks before it says who it is");
    }
    state.Advance();
    return state.Take();
  }
  const uint64_t id = known->second;
  Process& process = *state.Find(id);
  process.heard_ns = state.now;
  switch (message.type) {
    case MemberMessage::kHello:
      state.Close(connection, "it says twice who it is");
      state.TakeFromConnection(id, /*given_up=*/false);
      break;
    case MemberMessage::kHeartbeat:
      if (process.ready && state.Asks(process)) {
        state.Send(connection, CoordinatorMessage::kWaiting, state.Waiting());
      } else {
        state.Send(connection, CoordinatorMessage::kHeartbeat);
      }
      break;
    case MemberMessage::kReady:
      state.OnReady(process, message);
      break;
    case MemberMessage::kConnected:
      if (state.IsProposed(id) && state.proposal->view.epoch == message.epoch) process.answer = Process::kConnected;
      break;
    case MemberMessage::kFailed:
      state.OnFailed(process, message);
      break;
    case MemberMessage::kLeave:
      state.OnLeave(id);
      break;
  }
  if (const Process* sender = state.Find(id); sender != nullptr && sender->connection != 0)
    state.RefuseRivals(*sender);
  if (message.type != MemberMessage::kHeartbeat) state.Advance();
  return state.Take();
}

std::vector<CoordinatorCore::Action> CoordinatorCore::OnClosed(Connection connection, int64_t now_ns) {
  state_->Begin(now_ns);
  const auto known = state_->connections.find(connection);
  if (known == state_->connections.end()) return state_->Take();
  state_->TakeFromConnection(known->second, /*given_up=*/false);
  state_->Advance();
  return state_->Take();
}

std::vector<CoordinatorCore::Action> CoordinatorCore::OnTime(int64_t now_ns) {
  state_->Begin(now_ns);
  state_->CloseSilent();
  state_->Advance();
  return state_->Take();
}

int64_t CoordinatorCore::NextTimeNs() const {
  const int64_t due = std::min(state_->next_due_ns, state_->next_silence_ns);
  const int64_t tick = state_->now + state_->TickNs();
  return std::max(std::min(due, tick), state_->now) + state_->paused_ns;
}

const View& CoordinatorCore::committed() const { return state_->committed; }

}  // namespace shoal
