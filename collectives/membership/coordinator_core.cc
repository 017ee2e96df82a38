#include "collectives/membership/coordinator_core.h"

#include "collectives/membership/coordinator_state.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint64_t kEpochMax = uint64_t{1} << 62;

uint64_t Number(Epoch epoch) { return static_cast<uint64_t>(epoch); }

}  // namespace

void CoordinatorCore::State::Refuse(Connection connection, CoordinatorMessage::Type type,
                                    const std::string& cause) {
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
  process.lineage = message.committed.lineage;
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
  if (theirs.lineage != committed.lineage)
    cause = "the job of its epoch has ended, and another one has begun";
  Log(absl::StrCat(message.info.Name(), " came back and is excluded: ", cause));
  if (IsMember(message.info.id)) left.insert(message.info.id);
  Refuse(connection, CoordinatorMessage::kExcluded, cause);
  return false;
}

// A member knows an epoch that this coordinator does not: another coordinator formed it.
void CoordinatorCore::State::Adopt(const View& view) {
  Log(absl::StrCat("a member says that epoch ", Number(view.epoch), " has ", view.members.size(),
                   " members"));
  proposal.reset();
  SetCommitted(view);
  gives_way_until_ns = 0;
  std::vector<uint64_t> strangers;
  for (auto& [id, process] : processes) {
    const bool another_job = process.lineage != 0 && process.lineage != view.lineage;
    if (another_job || (!IsMember(id) && (process.lineage != 0 || process.connection == 0))) {
      strangers.push_back(id);
    } else if (IsMember(id) && process.connection != 0) {
      ResendCommit(process);
    }
  }
  for (uint64_t id : strangers)
    Exclude(id, absl::StrCat("epoch ", Number(view.epoch), " was formed without it"));
}

// It confirmed the committed view, but the word that it is committed did not reach it.
void CoordinatorCore::State::ResendCommit(Process& process) {
  if (process.committed >= committed.epoch || process.promised != committed.epoch) return;
  Log(absl::StrCat(process.info.Name(), " is told again that epoch ", Number(committed.epoch), " is formed"));
  CoordinatorMessage commit;
  commit.type = CoordinatorMessage::kCommit;
  commit.view.lineage = committed.lineage;
  commit.view.epoch = committed.epoch;
  Send(process.connection, std::move(commit));
  process.lineage = committed.lineage;
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
  for (const Accusation& accusation : message.accusations)
    process.accusations[accusation.id] = accusation.cause;
  BuryDead(MemberInfo(process.info), message.accusations);
}

// The connection of a dead process is closed only when its memory has been freed, which may take longer than forming the
// next epoch.
void CoordinatorCore::State::BuryDead(const MemberInfo& witness, const std::vector<Accusation>& accusations) {
  for (const Accusation& accusation : accusations) {
    const Process* dead = Find(accusation.id);
    const bool seen = accusation.died && !witness.boot.empty() && accusation.id != witness.id;
    if (!seen || dead == nullptr || dead->connection == 0 || dead->info.boot != witness.boot) continue;
    Log(absl::StrCat(dead->info.Name(), " is dead, says ", witness.Name()));
    Close(dead->connection, "it is dead");
    TakeFromConnection(accusation.id, /*given_up=*/true);
  }
}

void CoordinatorCore::State::OnFailed(Process& process, const MemberMessage& message) {
  const bool current = IsProposed(process.info.id) && proposal->view.epoch == message.epoch;
  if (current) process.answer = Process::kFailed;
  for (const Accusation& accusation : message.accusations) {
    if (accusation.id != process.info.id) process.accusations[accusation.id] = accusation.cause;
    if (current) conflicts[PairOf(process.info.id, accusation.id)] = accusation.cause;
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

CoordinatorCore::CoordinatorCore(CoordinatorOptions options, uint64_t seed, int64_t now_ns)
    : state_(std::make_unique<State>(options, seed, now_ns)) {}

CoordinatorCore::~CoordinatorCore() = default;

std::vector<CoordinatorCore::Action> CoordinatorCore::OnMessage(Connection connection,
                                                                const MemberMessage& message,
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
  State::Process& process = *state.Find(id);
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
      if (state.IsProposed(id) && state.proposal->view.epoch == message.epoch)
        process.answer = State::Process::kConnected;
      break;
    case MemberMessage::kFailed:
      state.OnFailed(process, message);
      break;
    case MemberMessage::kLeave:
      state.OnLeave(id);
      break;
  }
  if (const State::Process* sender = state.Find(id); sender != nullptr && sender->connection != 0)
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
