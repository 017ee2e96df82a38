#include "collectives/engine/epoch_core.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "collectives/transport/wire.h"

namespace shoal {
namespace {

constexpr int kBeatsPerTimeout = 10;
constexpr uint64_t kAllGroups = 0;  // The key that stands for all groups on the wire.
// What peers can make this process remember.
constexpr size_t kEndedKeysMax = 1 << 14;
constexpr size_t kTextMax = 4096;

std::string Cut(std::string text) {
  if (text.size() > kTextMax) text.resize(kTextMax);
  return text;
}

}  // namespace

EpochCore::EpochCore(Options options, int64_t now_ns)
    : options_(std::move(options)),
      beat_ns_(std::max<int64_t>(options_.heartbeat_timeout_ns / kBeatsPerTimeout, 1'000'000)),
      peers_(options_.names.size()),
      ended_keys_(kEndedKeysMax),
      next_beat_ns_(now_ns),
      ticked_ns_(now_ns) {
  for (Peer& peer : peers_) peer.heard_ns = now_ns;
}

// ---- Groups

bool EpochCore::Has(const Group& group, int rank) {
  return std::find(group.ranks.begin(), group.ranks.end(), rank) != group.ranks.end();
}

bool EpochCore::IsOrDescendsFrom(const Group& group, uint64_t key) {
  return group.key == key ||
         std::find(group.ancestors.begin(), group.ancestors.end(), key) != group.ancestors.end();
}

uint64_t EpochCore::AddGroup(uint64_t key, std::vector<int> ranks, std::vector<uint64_t> ancestors,
                             std::string* over) {
  Group group = {key, std::move(ranks), std::move(ancestors)};
  *over = all_over_;
  const auto look = [&](uint64_t of) {
    const std::string* const ended = ended_keys_.Find(of);
    if (over->empty() && ended != nullptr) *over = *ended;
  };
  for (const uint64_t ancestor : group.ancestors) look(ancestor);
  look(key);
  for (const auto& [rank, cause] : dead_) {
    if (over->empty() && Has(group, rank)) *over = cause;
  }
  group.over = !over->empty();
  groups_.emplace(++last_group_, std::move(group));
  return last_group_;
}

void EpochCore::RemoveGroup(uint64_t group) { groups_.erase(group); }

void EpochCore::End(uint64_t group, const std::string& cause, Effects* effects) {
  const auto found = groups_.find(group);
  if (found != groups_.end() && !found->second.over) EndKey(found->second.key, Cut(cause), effects);
}

void EpochCore::EndAll(const std::string& cause, Effects* effects) { EndKey(kAllGroups, Cut(cause), effects); }

void EpochCore::EndKey(uint64_t key, const std::string& cause, Effects* effects) {
  const bool all = key == kAllGroups;
  if (all ? !all_over_.empty() : !ended_keys_.Add(key, cause)) return;
  if (all) all_over_ = cause;
  if (!all) effects->over.push_back(key);
  std::set<int> told;
  for (auto& [number, group] : groups_) {
    if (!all && !IsOrDescendsFrom(group, key)) continue;
    if (!group.over) effects->ended.push_back({number, cause});
    group.over = true;
    if (group.key == key) told.insert(group.ranks.begin(), group.ranks.end());
  }
  for (int rank = 0; rank < size(); ++rank) {
    if (all || told.contains(rank)) {
      Tell(rank, ControlType::kEnd, WireWriter().U64(key).String(cause).Take(), effects);
    }
  }
}

void EpochCore::Leave(Effects* effects) {
  judges_ = false;
  for (int rank = 0; rank < size(); ++rank) {
    Tell(rank, ControlType::kBye, "", effects);
    effects->closing.push_back(rank);
  }
}

void EpochCore::Tell(int rank, ControlType type, const std::string& body, Effects* effects) const {
  if (rank != options_.rank && Alive(rank)) effects->messages.push_back({rank, type, body});
}

// ---- Deaths

void EpochCore::OnLost(int rank, const std::string& how, Effects* effects) {
  if (judges_) Declare(rank, absl::StrCat(options_.names[rank], ": ", how), effects);
}

void EpochCore::Declare(int rank, const std::string& cause, Effects* effects) {
  if (!Alive(rank)) return;
  dead_.emplace_back(rank, cause);
  for (auto& [number, group] : groups_) {
    if (group.over || !Has(group, rank)) continue;
    group.over = true;
    effects->ended.push_back({number, cause});
  }
  effects->died.push_back(rank);
  // Everybody tells everybody, the dead one too, which may only be slow: what one rank knows all will know, whoever dies
  // while it says so.
  const std::string body = WireWriter().U64(rank).String(cause).Take();
  for (int peer = 0; peer < size(); ++peer) Tell(peer, ControlType::kDead, body, effects);
  peers_[rank].fate = Fate::kDead;
  effects->closing.push_back(rank);
}

void EpochCore::OnDead(int rank, std::string_view body, Effects* effects) {
  WireReader reader(body);
  const uint64_t dead = reader.U64();
  const std::string cause = Cut(reader.String());
  if (!reader.AtEnd() || dead >= peers_.size() || cause.empty()) {
    return OnLost(rank, "sent a verdict that makes no sense", effects);
  }
  if (dead != static_cast<uint64_t>(options_.rank)) return Declare(static_cast<int>(dead), cause, effects);
  // The others go on without this rank, and will close their links: that says nothing about them.
  judges_ = false;
  if (!all_over_.empty()) return;
  all_over_ = absl::StrCat(cause, ", says ", options_.names[rank]);
  for (auto& [number, group] : groups_) {
    if (!group.over) effects->ended.push_back({number, all_over_});
    group.over = true;
  }
}

void EpochCore::CheckSilence(int64_t now_ns, Effects* effects) {
  for (int rank = 0; rank < size() && judges_; ++rank) {
    if (rank == options_.rank || !Alive(rank)) continue;
    const int64_t silent_ns = now_ns - peers_[rank].heard_ns;
    if (silent_ns < options_.heartbeat_timeout_ns) continue;
    OnLost(rank, absl::StrFormat("silent for %.1f s (%s)", silent_ns * 1e-9, LastDid(rank, now_ns)), effects);
  }
}

// ---- Messages

void EpochCore::OnHeard(int rank, int64_t now_ns) { peers_[rank].heard_ns = now_ns; }

void EpochCore::OnMessage(int rank, ControlType type, std::string_view body, int64_t now_ns, Effects* effects) {
  OnHeard(rank, now_ns);
  if (peers_[rank].fate == Fate::kDead) return;  // It does not know that it is no longer believed.
  switch (type) {
    case ControlType::kHeartbeat:
      return OnHeartbeat(rank, body, now_ns, effects);
    case ControlType::kEnd:
      return OnEnd(rank, body, effects);
    case ControlType::kDead:
      return OnDead(rank, body, effects);
    case ControlType::kBye:
      if (!Alive(rank)) return;
      peers_[rank].fate = Fate::kLeft;
      effects->left.push_back(rank);
      effects->closing.push_back(rank);  // It waits for our end of the connection.
      return;
    case ControlType::kSegment:
    case ControlType::kFree:
    case ControlType::kWatch:
      return;
  }
}

void EpochCore::OnHeartbeat(int rank, std::string_view body, int64_t now_ns, Effects* effects) {
  WireReader reader(body);
  const bool running = reader.U64() != 0;
  const uint64_t age_ns = reader.U64();
  std::string operation = Cut(reader.String());
  if (!reader.AtEnd()) return OnLost(rank, "sent a heartbeat that makes no sense", effects);
  const int64_t since_ns = now_ns - static_cast<int64_t>(std::min<uint64_t>(age_ns, now_ns));
  peers_[rank].last = {std::move(operation), running, since_ns};
}

void EpochCore::OnEnd(int rank, std::string_view body, Effects* effects) {
  WireReader reader(body);
  const uint64_t key = reader.U64();
  const std::string cause = Cut(reader.String());
  if (!reader.AtEnd() || cause.empty()) return OnLost(rank, "sent an end that makes no sense", effects);
  EndKey(key, cause, effects);
}

// ---- Time

void EpochCore::Tick(int64_t now_ns, const Doing& doing, Effects* effects) {
  // After a pause of this process itself (a stop, a suspended machine) the silence was ours.
  if (now_ns - ticked_ns_ > beat_ns_ + options_.heartbeat_timeout_ns / 2) {
    for (Peer& peer : peers_) peer.heard_ns = now_ns;
  }
  ticked_ns_ = now_ns;
  CheckSilence(now_ns, effects);
  if (now_ns < next_beat_ns_) return;
  next_beat_ns_ = now_ns + beat_ns_;
  const uint64_t age_ns = doing.operation.empty() ? 0 : now_ns - doing.since_ns;
  const std::string body =
      WireWriter().U64(doing.running ? 1 : 0).U64(age_ns).String(Cut(doing.operation)).Take();
  for (int rank = 0; rank < size(); ++rank) Tell(rank, ControlType::kHeartbeat, body, effects);
}

int64_t EpochCore::NextTickNs() const {
  int64_t next_ns = next_beat_ns_;
  for (int rank = 0; rank < size() && judges_; ++rank) {
    if (rank != options_.rank && Alive(rank)) {
      next_ns = std::min(next_ns, peers_[rank].heard_ns + options_.heartbeat_timeout_ns);
    }
  }
  return next_ns;
}

std::string EpochCore::LastDid(int rank, int64_t now_ns) const {
  const Doing& last = peers_[rank].last;
  if (last.operation.empty()) return "no operation yet";
  return absl::StrFormat("last: %s, %s %.1f s ago", last.operation, last.running ? "started" : "ended",
                         (now_ns - last.since_ns) * 1e-9);
}

}  // namespace shoal
