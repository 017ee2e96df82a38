#include "tests/sim/epoch_run.h"

#include <algorithm>

#include "collectives/program/algorithms.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal::sim {
namespace {

constexpr uint64_t kGroupKey = 7;

uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Small integers: sums of them are exact in any order.
float Value(uint64_t member, uint64_t seed, size_t index) {
  return static_cast<float>(Mix(Mix(member, seed), index) % 1000);
}

}  // namespace

EpochRun::EpochRun(View view, uint64_t self, std::vector<PeerLinks> links, const WorkKnobs& knobs,
                   Network* network, Node node, Referee* referee)
    : view_(std::move(view)),
      self_(self),
      rank_(view_.RankOf(self)),
      links_(std::move(links)),
      knobs_(knobs),
      network_(network),
      node_(node),
      referee_(referee),
      channel_([this](int member, Packet packet) {
        network_->Send(node_, links_[member].data, std::move(packet));
      }) {
  EpochCore::Options options;
  options.rank = rank_;
  options.heartbeat_timeout_ns = knobs_.heartbeat_timeout_ns;
  for (const MemberInfo& member : view_.members) options.names.push_back(member.Name());
  std::vector<int> all;
  for (size_t rank = 0; rank < view_.members.size(); ++rank) {
    all.push_back(static_cast<int>(rank));
    if (static_cast<int>(rank) == rank_) continue;
    ranks_[links_[rank].control] = static_cast<int>(rank);
    ranks_[links_[rank].data] = static_cast<int>(rank);
  }
  core_ = std::make_unique<EpochCore>(options, network_->now());
  std::string over;
  core_->AddGroup(kGroupKey, all, {}, &over);
  issue_ns_ = network_->now();
}

void EpochRun::Apply(const EpochCore::Effects& effects) {
  for (const EpochCore::Effects::Message& message : effects.messages) {
    Packet packet = {kControlKind, static_cast<uint64_t>(message.type), 0, 0, {}};
    packet.body.assign(message.body.begin(), message.body.end());
    network_->Send(node_, links_[message.rank].control, std::move(packet));
  }
  for (int rank : effects.closing) network_->Shut(node_, links_[rank].control);
  left_.insert(effects.left.begin(), effects.left.end());
  for (const EpochCore::Effects::Ended& ended : effects.ended) End(ended.cause);
}

void EpochRun::End(const std::string& cause) {
  if (state_ != State::kRunning) return;
  state_ = State::kEnded;
  cause_ = cause;
  running_.clear();
}

void EpochRun::Leave() {
  EpochCore::Effects effects;
  core_->Leave(&effects);
  if (state_ == State::kRunning) state_ = State::kEnded;
  running_.clear();
  Apply(effects);
  for (const auto& [link, rank] : ranks_) network_->Close(node_, link);
  ranks_.clear();
}

std::vector<Accusation> EpochRun::Accusations() const {
  std::vector<Accusation> accusations;
  for (const auto& [rank, cause] : core_->dead()) accusations.push_back({view_.members[rank].id, cause});
  return accusations;
}

// ---- Events

void EpochRun::OnPacket(Link link, Packet packet) {
  const int rank = ranks_.at(link);
  if (packet.kind == SimChannel::kPacketKind) {
    channel_.OnPacket(rank, std::move(packet));
    return Pump();
  }
  EpochCore::Effects effects;
  core_->OnMessage(rank, static_cast<ControlType>(packet.a),
                   std::string_view(packet.body.data(), packet.body.size()), network_->now(), &effects);
  Apply(effects);
  CheckLeft();
}

void EpochRun::OnEnd(Link link) {
  const int rank = ranks_.at(link);
  ranks_.erase(link);
  network_->Close(node_, link);
  if (link == links_[rank].data) {
    data_lost_[rank] = network_->now() + knobs_.heartbeat_timeout_ns;
  } else if (!left_.contains(rank)) {
    EpochCore::Effects effects;
    core_->OnLost(rank, "connection closed", &effects);
    Apply(effects);
  }
  CheckLeft();
}

// Who said goodbye and closed its data connection sends nothing that is still awaited.
void EpochRun::CheckLeft() {
  if (state_ != State::kRunning || data_lost_.empty()) return;
  for (int rank : channel_.Awaited()) {
    if (!left_.contains(rank) || !data_lost_.contains(rank)) continue;
    EpochCore::Effects effects;
    core_->EndAll(absl::StrCat("rank ", rank, " left with work undone"), &effects);
    return Apply(effects);
  }
}

void EpochRun::OnTimer() {
  const int64_t now = network_->now();
  EpochCore::Effects effects;
  if (now >= core_->NextTickNs()) core_->Tick(now, {}, &effects);
  for (const auto& [rank, due_ns] : data_lost_) {
    if (now >= due_ns && !left_.contains(rank)) core_->OnLost(rank, "data connection closed", &effects);
  }
  Apply(effects);
  if (state_ == State::kRunning) Pump();
}

int64_t EpochRun::NextTimeNs() const {
  int64_t due = core_->NextTickNs();
  for (const auto& [rank, due_ns] : data_lost_) {
    if (core_->Alive(rank)) due = std::min(due, due_ns);
  }
  if (MayIssue()) due = std::min(due, issue_ns_);
  return due;
}

// ---- Work

std::unique_ptr<EpochRun::Operation> EpochRun::MakeOperation(uint64_t number) {
  auto operation = std::make_unique<Operation>();
  operation->number = number;
  const uint64_t seed = Mix(Mix(knobs_.seed, static_cast<uint64_t>(view_.epoch)), number);
  const size_t elements = 1 + seed % knobs_.elements_max;
  operation->in.resize(elements);
  operation->out.resize(elements);
  operation->expected.resize(elements);
  for (size_t i = 0; i + 1 < elements; ++i) {
    operation->in[i] = Value(self_, seed, i);
    for (const MemberInfo& member : view_.members) operation->expected[i] += Value(member.id, seed, i);
  }
  // The last element counts those that want a boundary.
  operation->in.back() = joiners_ > 0 || number >= static_cast<uint64_t>(knobs_.ops_max) ? 1 : 0;

  Problem problem;
  problem.kind = OpKind::kAllReduce;
  problem.rank = rank_;
  problem.size = static_cast<int>(view_.members.size());
  problem.elements = static_cast<int64_t>(elements);
  problem.piece = knobs_.piece_max == 0 ? 0 : static_cast<int64_t>(Mix(seed, 2) % knobs_.piece_max);
  std::vector<const Algorithm*> algorithms;
  for (const Algorithm& algorithm : Algorithms()) {
    if (algorithm.applies(problem)) algorithms.push_back(&algorithm);
  }
  SHOAL_CHECK(!algorithms.empty());
  Program program = algorithms[Mix(seed, 1) % algorithms.size()]->make(problem);
  Operands operands;
  operands.in = reinterpret_cast<const std::byte*>(operation->in.data());
  operands.out = reinterpret_cast<std::byte*>(operation->out.data());
  operands.group_size = problem.size;
  operation->run.Start(std::make_shared<PreparedProgram>(std::move(program)), operands, &channel_,
                       {.op = number, .tag = 0, .signature = 1}, number << 32);
  return operation;
}

bool EpochRun::MayIssue() const {
  return state_ == State::kRunning && issued_ < done_ + knobs_.window && (last_ == 0 || issued_ < last_);
}

void EpochRun::Issue() {
  while (MayIssue() && network_->now() >= issue_ns_) {
    ++issued_;
    running_[issued_] = MakeOperation(issued_);
    if (knobs_.pause_ns > 0)
      issue_ns_ = network_->now() + static_cast<int64_t>(network_->random()() % knobs_.pause_ns);
  }
}

// Everybody issues exactly the same operations: after the first one in which anybody wants a boundary come as
// many as may have been in flight then.
bool EpochRun::Complete(Operation& operation) {
  const float asked = operation.out.back();
  operation.expected.back() = asked;
  referee_->OnSum(view_, self_, operation.number, operation.out, operation.expected);
  ++completed_;
  if (asked > 0) boundary_asked_.insert(operation.number);
  done_early_.insert(operation.number);
  while (done_early_.contains(done_ + 1)) {
    done_early_.erase(++done_);
    if (last_ == 0 && boundary_asked_.contains(done_)) last_ = done_ + knobs_.window;
  }
  return last_ != 0 && done_ == last_;
}

void EpochRun::Pump() {
  std::vector<Channel::Event> events;
  for (bool moved = true; moved && state_ == State::kRunning;) {
    moved = false;
    Issue();
    for (auto& [number, operation] : running_) {
      while (operation->run.Step()) moved = true;
    }
    events.clear();
    if (const absl::Status status = channel_.Poll(&events); !status.ok()) {
      referee_->Fail(absl::StrCat("the channel failed: ", AbslSv(status.ToString())));
      return End(status.ToString());
    }
    for (const Channel::Event& event : events) {
      moved = true;
      running_.at(event.token >> 32)->run.OnEvent(event);
    }
    for (auto at = running_.begin(); at != running_.end();) {
      if (!at->second->run.Done()) {
        ++at;
        continue;
      }
      moved = true;
      const bool boundary = Complete(*at->second);
      at = running_.erase(at);
      if (boundary) state_ = State::kBoundary;
    }
  }
  CheckLeft();
}

}  // namespace shoal::sim
