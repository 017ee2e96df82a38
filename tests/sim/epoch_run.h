// One epoch on one simulated process: its links, the engine's watch over its peers and a row of all_reduces.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "collectives/engine/epoch_core.h"
#include "collectives/engine/program_run.h"
#include "collectives/membership/messages.h"
#include "tests/sim/network.h"
#include "tests/sim/referee.h"
#include "tests/sim/sim_channel.h"

namespace shoal::sim {

struct PeerLinks {
  Link control = 0, data = 0;
};

struct WorkKnobs {
  uint64_t seed = 0;  // Of algorithms; equal on all processes.
  int64_t heartbeat_timeout_ns = 0;
  int64_t elements_max = 1;
  int64_t piece_max = 0;
  int window = 1;        // So many operations are in flight.
  int ops_max = 1;       // In one epoch; then everybody asks for the next one.
  int64_t pause_ns = 0;  // Between two operations, at most.
};

class EpochRun {
 public:
  enum class State {
    kRunning,
    kBoundary,  // All operations up to an agreed one are done.
    kEnded,     // The group is over.
  };

  EpochRun(View view, uint64_t self, std::vector<PeerLinks> links, const WorkKnobs& knobs, Network* network,
           Node node, Referee* referee);

  void OnPacket(Link link, Packet packet);
  void OnEnd(Link link);
  void OnTimer();
  int64_t NextTimeNs() const;
  bool Has(Link link) const { return ranks_.contains(link); }

  // How many wait for admission: a boundary is near when anybody says so.
  void SetJoiners(uint64_t joiners) { joiners_ = joiners; }
  // Says goodbye and closes the links.
  void Leave();

  State state() const { return state_; }
  const View& view() const { return view_; }
  std::string cause() const { return cause_; }
  std::vector<Accusation> Accusations() const;
  int64_t completed() const { return completed_; }

  static constexpr int kControlKind = 101;

 private:
  struct Operation {
    uint64_t number = 0;
    std::vector<float> in, out, expected;
    ProgramRun run;
  };

  void Apply(const EpochCore::Effects& effects);
  bool MayIssue() const;
  void Issue();
  std::unique_ptr<Operation> MakeOperation(uint64_t number);
  void Pump();
  bool Complete(Operation& operation);
  void CheckLeft();
  void End(const std::string& cause);

  const View view_;
  const uint64_t self_;
  const int rank_;
  const std::vector<PeerLinks> links_;
  const WorkKnobs knobs_;
  Network* const network_;
  const Node node_;
  Referee* const referee_;
  std::map<Link, int> ranks_;  // Of links that are open.
  std::unique_ptr<EpochCore> core_;
  SimChannel channel_;
  std::map<uint64_t, std::unique_ptr<Operation>> running_;
  uint64_t issued_ = 0, done_ = 0;  // done_: all up to it.
  uint64_t last_ = 0;               // 0: not yet known.
  std::set<uint64_t> done_early_;
  std::set<uint64_t> boundary_asked_;
  int64_t completed_ = 0;
  int64_t issue_ns_ = 0;
  std::set<int> left_;
  std::map<int, int64_t> data_lost_;  // Rank, and when it is given up for it.
  uint64_t joiners_ = 0;
  State state_ = State::kRunning;
  std::string cause_;
};

}  // namespace shoal::sim
