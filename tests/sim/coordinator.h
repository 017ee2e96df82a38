// A simulated coordinator process.
#pragma once

#include <memory>
#include <set>

#include "collectives/membership/coordinator_core.h"
#include "tests/sim/member.h"

namespace shoal::sim {

class Coordinator : public Process {
 public:
  Coordinator(Environment* world, const CoordinatorOptions& options, bool presume_confirmed);

  Node node() const { return node_; }
  bool leads() const { return core_ != nullptr; }
  const View& committed() const { return core_->committed(); }
  void Lead(uint64_t seed);
  // Closes all connections; from now on others are refused.
  void StepDown();

  void OnTimer() override;
  void OnAccepted(Link link) override;
  void OnOpened(Link) override {}
  void OnPacket(Link link, Packet packet) override;
  void OnEnd(Link link) override;

 private:
  void Do(const std::vector<CoordinatorCore::Action>& actions);

  Environment* const world_;
  Network& network_;
  const CoordinatorOptions options_;
  const bool presume_confirmed_;
  Node node_ = 0;
  std::unique_ptr<CoordinatorCore> core_;
  std::set<Link> links_;
};

}  // namespace shoal::sim
