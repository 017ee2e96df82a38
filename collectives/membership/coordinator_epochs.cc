// Why there are never two views with one (lineage, epoch).
//
// One coordinator gives each number to one proposal. Two coordinators at once (an old one was paused, or cut
// off, and is back) do not use the same numbers of a lineage: whoever drew the lineage counts up by one;
// whoever took over, that is, heard a number that it had not given out itself, first skips a random 2^20 to
// 2^36, and counts up from there. So ranges of numbers belong to one coordinator each, whatever the other one
// does and whichever members each one reaches. That holds for views without a common member too, which
// promises of members alone do not keep apart.
//
// Why there is one line of views. A member confirms a proposal only on its present connection and above all
// that it was ever proposed, and a view is committed only when all of its members confirmed it. So epochs of
// a member only grow. A view of the lineage contains a member of the last view that its coordinator knows,
// which has told it all that it promised. If two coordinators still cut a job in two, each half works in
// epochs of its own, and when both halves meet at one coordinator, the higher epoch is the job; the others
// are excluded and join anew.
#include "collectives/membership/coordinator_state.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kNamesMax = 8;

uint64_t Number(Epoch epoch) { return static_cast<uint64_t>(epoch); }

}  // namespace

// Takes the next step that is due towards the next epoch, after anything has happened.
void CoordinatorCore::State::Advance() {
  next_due_ns = kNeverNs;
  waiting_stale = true;
  if (proposal == nullptr || !ProposalStands()) {
    proposal.reset();
    awaited.clear();
    if (committed.lineage == 0 ? Due(started_ns + Ns(options.settle_time)) : LineageIsOver()) {
      ProposeTo({}, FindNewcomers(), /*continues=*/false);
    } else if (const std::vector<MemberInfo> survivors = FindSurvivors(); !survivors.empty()) {
      ProposeTo(survivors, FindNewcomers(), /*continues=*/true);
    }
  }
  TellJoiners();
}

// To all that can work together, if they are enough.
void CoordinatorCore::State::ProposeTo(std::vector<MemberInfo> survivors, std::vector<MemberInfo> newcomers,
                                       bool continues) {
  const auto enough = [&] {
    return survivors.size() + newcomers.size() >= static_cast<size_t>(options.size_min);
  };
  if (!enough()) return;
  AddMutualAccusations(survivors);
  const std::vector<MemberInfo> all_survivors = survivors, all_newcomers = newcomers;
  std::vector<Dropped> dropped = DropConflicting(conflicts, &survivors, &newcomers);
  if (!enough()) {
    // Without those that did not get on with each other they are too few: another try now and then.
    if (!Due(forgiven_ns + Ns(options.heartbeat_timeout))) return;
    Log("too few processes reach each other; trying with all of them again");
    forgiven_ns = now;
    survivors = all_survivors;
    newcomers = all_newcomers;
    dropped.clear();
    conflicts.clear();
    for (const MemberInfo& survivor : survivors) {
      std::erase_if(Find(survivor.id)->accusations, [&](const auto& accusation) {
        const Process* accused = Find(accusation.first);
        return accused != nullptr && accused->connection != 0;
      });
    }
  }
  const size_t room = std::max<size_t>(options.size_max, survivors.size()) - survivors.size();
  if (newcomers.size() > room) newcomers.resize(room);
  Propose(Seat(survivors, newcomers), std::move(dropped), continues);
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
  if (failed) {
    ExcludeBlameless();
  } else {
    Commit();
  }
  return false;
}

// Members may fail to connect only because others do not reach each other: then those are to blame. When nobody blames
// anybody, another attempt may show who it is; when it does not, the fault is their own.
void CoordinatorCore::State::ExcludeBlameless() {
  std::vector<uint64_t> blameless;
  for (const auto& [pair, cause] : conflicts) {
    if (IsProposed(pair.first) && IsProposed(pair.second)) return;
  }
  if (!std::exchange(nobody_blamed, true)) return;
  for (const MemberInfo& member : proposal->view.members) {
    if (Find(member.id)->answer == Process::kFailed) blameless.push_back(member.id);
  }
  for (uint64_t id : blameless) Exclude(id, "it could not connect, and blames nobody");
}

// A request for the epoch after an older one counts from a member that has lost the committed one: it
// confirmed it and has turned to another proposal since.
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

// The members of the committed epoch that go on, by rank; none while somebody must be waited for.
std::vector<MemberInfo> CoordinatorCore::State::FindSurvivors() {
  std::set<uint64_t> accused;
  std::vector<MemberInfo> survivors;
  for (const MemberInfo& member : committed.members) {
    const Process* process = Find(member.id);
    if (process == nullptr || process->connection == 0) continue;
    if (!Asks(*process)) awaited.push_back(member.id);
    if (Asks(*process)) {
      for (const auto& [id, cause] : process->accusations) accused.insert(id);
    }
    survivors.push_back(process->info);
  }
  for (const MemberInfo& member : committed.members) {
    const Process* process = Find(member.id);
    if (process != nullptr && process->connection != 0) continue;
    if (!GivenUp(member.id, accused)) awaited.push_back(member.id);
  }
  if (!awaited.empty()) survivors.clear();
  return survivors;
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
      if (other->accusations.contains(survivor.id)) conflicts[PairOf(survivor.id, id)] = cause;
    }
  }
}

void CoordinatorCore::State::Propose(std::vector<MemberInfo> members, std::vector<Dropped> dropped,
                                     bool continues) {
  uint64_t lineage = committed.lineage;
  if (!continues) {
    do lineage = random();
    while (lineage == 0);
    counting = true;
    if (committed.lineage != 0) Log("nobody is left of the job; newcomers begin another one");
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
    process->lineage = committed.lineage;
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
  nobody_blamed = false;
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
  std::vector<std::string> names;
  if (proposal != nullptr) {
    waiting = absl::StrCat("epoch ", Number(proposal->view.epoch), " is being connected, not yet by ");
    for (const MemberInfo& member : proposal->view.members) {
      if (Find(member.id)->answer == Process::kNone) names.push_back(member.Name());
    }
  } else if (!awaited.empty()) {
    waiting = "waits for ";
    for (uint64_t id : awaited) {
      const int rank = rank_of.at(id);
      const Process* process = Find(id);
      const bool connected = process != nullptr && process->connection != 0;
      names.push_back(absl::StrCat("rank ", rank, " (", committed.members[rank].Name(), "), ",
                                   connected ? "which is busy" : "which is not connected"));
    }
  } else {
    size_t here = 0;
    for (const auto& [id, process] : processes) here += process.connection != 0 && process.ready;
    waiting = absl::StrCat(here, " of at least ", options.size_min, " processes are here");
  }
  for (size_t i = 0; i < std::min(names.size(), kNamesMax); ++i)
    absl::StrAppend(&waiting, i == 0 ? "" : "; ", names[i]);
  if (names.size() > kNamesMax) absl::StrAppend(&waiting, " and ", names.size() - kNamesMax, " more");
  return waiting;
}

}  // namespace shoal
