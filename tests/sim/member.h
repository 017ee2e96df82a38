// A simulated process that is a member of the job: the protocol core, the mesh of a proposed view, and an
// application that reduces tensors for ever and asks for the next epoch whenever one ends.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "collectives/membership/member_core.h"
#include "tests/sim/epoch_run.h"
#include "tests/sim/network.h"
#include "tests/sim/referee.h"

namespace shoal::sim {

enum PacketKind { kMembership = 1, kGreeting = 2, kWelcome = 3 };

struct MemberKnobs {
  MemberOptions core;
  WorkKnobs work;
  int64_t connect_timeout_ns = 0;
  int64_t retry_ns = 10'000'000;  // Between two attempts to reach a peer.
};

class Environment {
 public:
  virtual ~Environment() = default;
  virtual Network& network() = 0;
  virtual Referee& referee() = 0;
  virtual Node CoordinatorNode(size_t index) = 0;  // 0: none runs there.
  virtual size_t coordinators() const = 0;
  virtual Node MemberNode(uint64_t address) = 0;
  virtual uint64_t NewId() = 0;
  virtual void Log(Node node, const std::string& text) = 0;
  virtual bool verbose() const = 0;
};

class Member : public Process {
 public:
  // `address`: of this process, for its peers.
  Member(Environment* world, const MemberKnobs& knobs, uint64_t address, int wanted_rank);

  Node node() const { return node_; }
  uint64_t id() const { return self_.id; }
  bool gone() const { return gone_; }  // Left, or was refused.
  // The epoch in which it works; null: none.
  const EpochRun* epoch() const { return epoch_.get(); }
  std::string Describe() const;
  void Leave();

  void OnTimer() override;
  void OnAccepted(Link link) override;
  void OnOpened(Link link) override;
  void OnPacket(Link link, Packet packet) override;
  void OnEnd(Link link) override;

 private:
  // The connections of a proposal.
  struct Attempt {
    struct Wire {
      Link link = 0;
      bool up = false;
      int64_t retry_ns = 0;  // link 0, this side dials: when.
    };
    View view;
    int rank = 0;
    int64_t deadline_ns = 0;
    std::vector<Wire> wires[2];  // Control, data: by rank.
    bool confirmed = false, failed = false;
    std::vector<std::pair<Link, Packet>> early;  // From peers that are in the epoch already.
  };
  struct Guest {
    uint64_t epoch = 0, id = 0;
    int wire = 0;
  };

  void Rejoin();
  void Do(const std::vector<MemberCore::Action>& actions);
  void Act(const MemberCore::Action& action);
  void DialCoordinator();
  void OnCoordinatorPacket(Packet packet);
  void Begin(const View& view);
  void Abandon();
  void DialPeers();
  void Greet(Link link, const Guest& guest);
  bool Find(Link link, int* wire, int* rank) const;
  void CheckAttempt();
  void FailAttempt(int rank, const std::string& cause);
  void Enter(const View& view);
  void AfterEpochEvent();
  void SetTimer();

  Environment* const world_;
  Network& network_;
  const MemberKnobs knobs_;
  MemberInfo self_;
  Node node_ = 0;
  std::unique_ptr<MemberCore> core_;
  Link coordinator_ = 0;
  size_t next_coordinator_ = 0;
  std::unique_ptr<Attempt> attempt_;
  std::map<Link, Guest> guests_;       // Peers whose proposal has not come here yet.
  std::map<Link, int64_t> strangers_;  // Links that have not said anything.
  std::unique_ptr<EpochRun> epoch_;
  uint64_t joiners_ = 0;
  std::string waiting_;
  bool gone_ = false;
};

}  // namespace shoal::sim
