#include "tests/sim/member.h"

#include <algorithm>

#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal::sim {
namespace {

uint64_t Number(Epoch epoch) { return static_cast<uint64_t>(epoch); }

}  // namespace

Member::Member(Environment* world, const MemberKnobs& knobs, uint64_t address, int wanted_rank)
    : world_(world), network_(world->network()), knobs_(knobs) {
  node_ = network_.Start(this);
  self_.pid = static_cast<int64_t>(node_);
  self_.host_name = "sim";
  self_.addresses = {std::to_string(address)};
  self_.wanted_rank = wanted_rank;
  next_coordinator_ = network_.random()() % world->coordinators();
  Rejoin();
}

// Under a new id, as a newcomer.
void Member::Rejoin() {
  self_.id = world_->NewId();
  waiting_ = "";
  joiners_ = 0;
  core_ = std::make_unique<MemberCore>(self_, knobs_.core, network_.now());
  if (world_->verbose()) world_->Log(node_, absl::StrCat("joins as ", self_.id));
  Do(core_->Ready({}, network_.now()));
}

void Member::Leave() {
  if (gone_) return;
  world_->Log(node_, "leaves");
  gone_ = true;
  Do(core_->Leave(network_.now()));
  Abandon();
  if (epoch_ != nullptr) epoch_->Leave();
  epoch_.reset();
}

std::string Member::Describe() const {
  const View& view = core_->committed();
  return absl::StrCat(
      "node ", node_, " id ", self_.id, " epoch ", Number(view.epoch), " of lineage ", view.lineage,
      epoch_ == nullptr                              ? ", waits for an epoch"
      : epoch_->state() == EpochRun::State::kRunning ? ", works"
                                                     : ", done with it",
      epoch_ == nullptr ? 0 : epoch_->completed(), " sums", attempt_ != nullptr ? ", connects" : "",
      coordinator_ == 0 ? ", no coordinator" : "", "; waits: ", waiting_);
}

// ---- The core's wishes

void Member::Do(const std::vector<MemberCore::Action>& actions) {
  for (const MemberCore::Action& action : actions) Act(action);
  SetTimer();
}

void Member::Act(const MemberCore::Action& action) {
  switch (action.type) {
    case MemberCore::Action::kDial:
      return DialCoordinator();
    case MemberCore::Action::kHangUp:
      network_.Close(node_, coordinator_);
      coordinator_ = 0;
      return;
    case MemberCore::Action::kSend: {
      const std::string bytes = Encode(action.message);
      return network_.Send(node_, coordinator_, {kMembership, 0, 0, 0, {bytes.begin(), bytes.end()}});
    }
    case MemberCore::Action::kConnect:
      return Begin(action.view);
    case MemberCore::Action::kCommit:
      return Enter(action.view);
    case MemberCore::Action::kExcluded:
      world_->Log(node_, absl::StrCat("is excluded: ", action.text));
      Abandon();
      if (epoch_ != nullptr) epoch_->Leave();
      epoch_.reset();
      // Not from within: the old core still runs.
      network_.At(network_.now() + 1, [this, node = node_] {
        if (network_.Alive(node) && !gone_) Rejoin();
      });
      return;
    case MemberCore::Action::kRefused:
      world_->Log(node_, absl::StrCat("is refused: ", action.text));
      gone_ = true;
      return;
    case MemberCore::Action::kJoiners:
      joiners_ = action.joiners;
      if (epoch_ != nullptr) epoch_->SetJoiners(joiners_);
      return;
    case MemberCore::Action::kWaiting:
      waiting_ = action.text;
      return;
    case MemberCore::Action::kLog:
      return world_->Log(node_, action.text);
  }
}

void Member::DialCoordinator() {
  for (size_t tries = 0; tries < world_->coordinators(); ++tries) {
    const Node node = world_->CoordinatorNode(next_coordinator_++ % world_->coordinators());
    if (node == 0) continue;
    coordinator_ = network_.Dial(node_, node);
    return;
  }
  network_.At(network_.now() + 1, [this, node = node_, id = self_.id] {
    if (network_.Alive(node) && self_.id == id) Do(core_->OnCoordinator(false, network_.now()));
  });
}

void Member::OnCoordinatorPacket(Packet packet) {
  const absl::StatusOr<CoordinatorMessage> message =
      DecodeCoordinatorMessage(std::string_view(packet.body.data(), packet.body.size()));
  SHOAL_CHECK_OK(message.status());
  Do(core_->OnMessage(*message, network_.now()));
}

// ---- The mesh of a proposal

void Member::Abandon() {
  if (attempt_ == nullptr) return;
  const std::unique_ptr<Attempt> old = std::move(attempt_);
  for (const auto& wires : old->wires) {
    for (const Attempt::Wire& wire : wires) network_.Close(node_, wire.link);
  }
}

void Member::Begin(const View& view) {
  if (epoch_ != nullptr) epoch_->Leave();
  epoch_.reset();
  Abandon();
  if (world_->verbose())
    world_->Log(node_, absl::StrCat("connects for epoch ", Number(view.epoch), " of ", view.members.size()));
  attempt_ = std::make_unique<Attempt>();
  attempt_->view = view;
  attempt_->rank = view.RankOf(self_.id);
  attempt_->deadline_ns = network_.now() + knobs_.connect_timeout_ns;
  for (auto& wires : attempt_->wires) wires.resize(view.members.size());
  for (auto guest = guests_.begin(); guest != guests_.end();) {
    const auto [link, greeting] = *guest;
    guest = guests_.erase(guest);
    Greet(link, greeting);
  }
  DialPeers();
  CheckAttempt();
}

// The higher rank dials.
void Member::DialPeers() {
  if (attempt_ == nullptr || attempt_->failed) return;
  for (int wire : {0, 1}) {
    for (int rank = 0; rank < attempt_->rank; ++rank) {
      Attempt::Wire& entry = attempt_->wires[wire][rank];
      if (entry.link != 0 || network_.now() < entry.retry_ns) continue;
      const Node peer = world_->MemberNode(std::stoull(attempt_->view.members[rank].addresses[0]));
      if (peer == 0) {
        entry.retry_ns = network_.now() + knobs_.retry_ns;
        continue;
      }
      entry.link = network_.Dial(node_, peer);
      network_.Send(node_, entry.link,
                    {kGreeting, Number(attempt_->view.epoch), self_.id, static_cast<uint64_t>(wire), {}});
    }
  }
}

void Member::Greet(Link link, const Guest& guest) {
  const uint64_t own = attempt_ != nullptr ? Number(attempt_->view.epoch) : Number(core_->committed().epoch);
  if (guest.epoch > own) {
    guests_[link] = guest;
    return;
  }
  const int rank = attempt_ != nullptr && guest.epoch == own ? attempt_->view.RankOf(guest.id) : -1;
  if (rank <= (attempt_ != nullptr ? attempt_->rank : -1) || attempt_->failed ||
      attempt_->wires[guest.wire][rank].up)
    return network_.Close(node_, link);
  attempt_->wires[guest.wire][rank] = {link, /*up=*/true, 0};
  network_.Send(node_, link, {kWelcome, 0, 0, 0, {}});
  CheckAttempt();
}

bool Member::Find(Link link, int* wire, int* rank) const {
  if (attempt_ == nullptr) return false;
  for (*wire = 0; *wire < 2; ++*wire) {
    const auto& wires = attempt_->wires[*wire];
    for (*rank = 0; *rank < static_cast<int>(wires.size()); ++*rank) {
      if (wires[*rank].link == link) return true;
    }
  }
  return false;
}

void Member::CheckAttempt() {
  if (attempt_ == nullptr || attempt_->confirmed || attempt_->failed) return;
  bool all = true;
  for (const auto& wires : attempt_->wires) {
    for (int rank = 0; rank < static_cast<int>(wires.size()); ++rank)
      all &= rank == attempt_->rank || wires[rank].up;
  }
  if (!all) return;
  attempt_->confirmed = true;
  Do(core_->OnConnected(attempt_->view.epoch, network_.now()));
}

// rank -1: all that are not there by now.
void Member::FailAttempt(int rank, const std::string& cause) {
  attempt_->failed = true;
  std::vector<Accusation> accusations;
  for (int peer = 0; peer < static_cast<int>(attempt_->view.members.size()); ++peer) {
    const bool up = attempt_->wires[0][peer].up && attempt_->wires[1][peer].up;
    if (peer != attempt_->rank && (peer == rank || (rank < 0 && !up)))
      accusations.push_back({attempt_->view.members[peer].id, cause});
  }
  Do(core_->OnConnectFailed(attempt_->view.epoch, std::move(accusations), network_.now()));
}

// ---- The epoch

void Member::Enter(const View& view) {
  world_->referee().OnView(view, self_.id);
  if (world_->verbose())
    world_->Log(node_, absl::StrCat("enters epoch ", Number(view.epoch), " as rank ", view.RankOf(self_.id)));
  const std::unique_ptr<Attempt> attempt = std::move(attempt_);
  waiting_ = "";
  std::vector<PeerLinks> links(view.members.size());
  std::vector<Link> lost;
  for (size_t rank = 0; rank < links.size(); ++rank) {
    links[rank] = {attempt->wires[0][rank].link, attempt->wires[1][rank].link};
    if (static_cast<int>(rank) == attempt->rank) continue;
    for (const auto& wires : attempt->wires) {
      if (!wires[rank].up) lost.push_back(wires[rank].link);
    }
  }
  epoch_ = std::make_unique<EpochRun>(view, self_.id, std::move(links), knobs_.work, &network_, node_,
                                      &world_->referee());
  epoch_->SetJoiners(joiners_);
  for (auto& [link, packet] : attempt->early) {
    if (epoch_->Has(link)) epoch_->OnPacket(link, std::move(packet));
  }
  for (Link link : lost) {
    if (epoch_->Has(link)) epoch_->OnEnd(link);
  }
  AfterEpochEvent();
}

void Member::AfterEpochEvent() {
  if (epoch_ == nullptr || epoch_->state() == EpochRun::State::kRunning) return SetTimer();
  const std::vector<Accusation> accusations = epoch_->Accusations();
  if (world_->verbose())
    world_->Log(node_, absl::StrCat("done with epoch ", Number(epoch_->view().epoch), " after ",
                                    epoch_->completed(), " sums: ", epoch_->cause()));
  epoch_->Leave();
  epoch_.reset();
  Do(core_->Ready(accusations, network_.now()));
}

// ---- Events

void Member::SetTimer() {
  int64_t due = core_->NextTimeNs();
  if (epoch_ != nullptr) due = std::min(due, epoch_->NextTimeNs());
  if (attempt_ != nullptr && !attempt_->confirmed && !attempt_->failed) {
    due = std::min(due, attempt_->deadline_ns);
    for (const auto& wires : attempt_->wires) {
      for (int rank = 0; rank < attempt_->rank; ++rank) {
        if (wires[rank].link == 0) due = std::min(due, wires[rank].retry_ns);
      }
    }
  }
  if (due != kNeverNs) network_.SetTimer(node_, std::max(due, network_.now() + 1));
}

void Member::OnTimer() {
  if (gone_) return;
  const int64_t now = network_.now();
  if (core_->NextTimeNs() <= now) Do(core_->OnTime(now));
  if (attempt_ != nullptr && !attempt_->confirmed && !attempt_->failed) {
    DialPeers();
    if (now >= attempt_->deadline_ns) FailAttempt(-1, "not connected in time");
  }
  if (epoch_ != nullptr && epoch_->NextTimeNs() <= now) {
    epoch_->OnTimer();
    AfterEpochEvent();
  }
  SetTimer();
}

void Member::OnAccepted(Link link) {
  if (gone_) return network_.Close(node_, link);
  strangers_[link] = network_.now();
}

void Member::OnOpened(Link link) {
  if (!gone_ && link == coordinator_) Do(core_->OnCoordinator(true, network_.now()));
}

void Member::OnPacket(Link link, Packet packet) {
  if (gone_) return;
  if (link == coordinator_) return OnCoordinatorPacket(std::move(packet));
  if (epoch_ != nullptr && epoch_->Has(link)) {
    epoch_->OnPacket(link, std::move(packet));
    return AfterEpochEvent();
  }
  if (strangers_.erase(link) == 1) {
    if (packet.kind != kGreeting || packet.c > 1) return network_.Close(node_, link);
    Greet(link, {packet.a, packet.b, static_cast<int>(packet.c)});
    return;
  }
  int wire, rank;
  if (!Find(link, &wire, &rank)) return;
  if (packet.kind == kWelcome) {
    attempt_->wires[wire][rank].up = true;
    CheckAttempt();
  } else {
    attempt_->early.emplace_back(link, std::move(packet));
  }
}

void Member::OnEnd(Link link) {
  network_.Close(node_, link);
  if (gone_) return;
  if (link == coordinator_) {
    coordinator_ = 0;
    return Do(core_->OnCoordinator(false, network_.now()));
  }
  if (epoch_ != nullptr && epoch_->Has(link)) {
    epoch_->OnEnd(link);
    return AfterEpochEvent();
  }
  strangers_.erase(link);
  guests_.erase(link);
  int wire, rank;
  if (!Find(link, &wire, &rank)) return;
  Attempt::Wire& entry = attempt_->wires[wire][rank];
  if (!entry.up && rank < attempt_->rank) {
    entry.link = 0;
    entry.retry_ns = network_.now() + knobs_.retry_ns;
    return SetTimer();
  }
  entry.up = false;
  if (!attempt_->failed) FailAttempt(rank, "connection closed");
}

}  // namespace shoal::sim
