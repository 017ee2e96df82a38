#include "tests/sim/coordinator.h"

#include "runtime/base/check.h"

namespace shoal::sim {

Coordinator::Coordinator(Environment* world, const CoordinatorOptions& options, bool presume_confirmed)
    : world_(world), network_(world->network()), options_(options), presume_confirmed_(presume_confirmed) {
  node_ = network_.Start(this);
}

void Coordinator::Lead(uint64_t seed) {
  core_ = std::make_unique<CoordinatorCore>(options_, seed, network_.now());
  world_->Log(node_, "leads");
  network_.SetTimer(node_, core_->NextTimeNs());
}

void Coordinator::StepDown() {
  if (!leads()) return;
  world_->Log(node_, "steps down");
  core_.reset();
  for (Link link : links_) network_.Close(node_, link);
  links_.clear();
}

void Coordinator::OnTimer() {
  if (leads()) Do(core_->OnTime(network_.now()));
}

void Coordinator::OnAccepted(Link link) {
  if (!leads()) return network_.Close(node_, link);
  links_.insert(link);
}

void Coordinator::OnPacket(Link link, Packet packet) {
  if (!leads() || !links_.contains(link)) return;
  const absl::StatusOr<MemberMessage> message =
      DecodeMemberMessage(std::string_view(packet.body.data(), packet.body.size()));
  SHOAL_CHECK_OK(message.status());
  Do(core_->OnMessage(link, *message, network_.now()));
}

void Coordinator::OnEnd(Link link) {
  network_.Close(node_, link);
  if (links_.erase(link) == 1 && leads()) Do(core_->OnClosed(link, network_.now()));
}

void Coordinator::Do(const std::vector<CoordinatorCore::Action>& actions) {
  for (const CoordinatorCore::Action& action : actions) {
    switch (action.type) {
      case CoordinatorCore::Action::kSend: {
        const std::string bytes = Encode(action.message);
        network_.Send(node_, action.connection, {kMembership, 0, 0, 0, {bytes.begin(), bytes.end()}});
        break;
      }
      case CoordinatorCore::Action::kClose:
        network_.Close(node_, action.connection);
        links_.erase(action.connection);
        break;
      case CoordinatorCore::Action::kLog:
        world_->Log(node_, action.text);
        break;
    }
  }
  if (!core_->committed().members.empty()) world_->referee().OnView(core_->committed(), 0);
  network_.SetTimer(node_, core_->NextTimeNs());
  if (!presume_confirmed_) return;
  for (const CoordinatorCore::Action& action : actions) {
    if (action.type != CoordinatorCore::Action::kSend || action.message.type != CoordinatorMessage::kPropose)
      continue;
    MemberMessage message;
    message.type = MemberMessage::kConnected;
    message.epoch = action.message.view.epoch;
    if (links_.contains(action.connection)) Do(core_->OnMessage(action.connection, message, network_.now()));
  }
}

}  // namespace shoal::sim
