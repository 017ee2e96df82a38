// What the monitor of an epoch decides: who is dead, which groups end, who is told. A state machine without threads,
// sockets or clocks: events and the time go in, Effects come out. World (engine/world.h, which says what it means) runs it
// on control links, tests/sim on simulated ones. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "collectives/engine/recent.h"
#include "collectives/transport/control_type.h"

namespace shoal {

class EpochCore {
 public:
  struct Options {
    int rank = 0;
    std::vector<std::string> names;  // By rank, for causes: rank 2 (pid 71, host b).
    int64_t heartbeat_timeout_ns = 0;
  };

  // What follows from an event, to be carried out in this order.
  struct Effects {
    struct Ended {
      uint64_t group;  // As AddGroup returned it.
      std::string cause;
    };
    struct Message {
      int rank;
      ControlType type;
      std::string body;
    };
    std::vector<Ended> ended;
    std::vector<uint64_t> over;  // Keys of groups that were ended by somebody; some may never have been made here.
    std::vector<int> left, died;    // Peers.
    std::vector<Message> messages;  // In order, per rank.
    // Nothing will be said to these peers any more: the sending side of their links ends behind what was said.
    std::vector<int> closing;
  };

  // What this process does, told in heartbeats.
  struct Doing {
    std::string operation;  // all_reduce "grads" #17; empty: nothing yet.
    bool running = false;
    int64_t since_ns = 0;  // When it was started, or when it ended.
  };

  EpochCore(Options options, int64_t now_ns);

  // Returns a number for the group. `ancestors`: keys of the groups that it was split from. *over: the cause, when the
  // group is over already, otherwise "". Several groups may have one key.
  uint64_t AddGroup(uint64_t key, std::vector<int> ranks, std::vector<uint64_t> ancestors, std::string* over);
  void RemoveGroup(uint64_t group);

  // Ends the group and those split from it, unless it is over.
  void End(uint64_t group, const std::string& cause, Effects* effects);
  // Ends all groups, those to come included.
  void EndAll(const std::string& cause, Effects* effects);
  // This process says goodbye: from now on nobody is declared dead for closing.
  void Leave(Effects* effects);

  // Something came from the peer; OnMessage implies it. Messages of types that the core does not know are ignored.
  void OnHeard(int rank, int64_t now_ns);
  void OnMessage(int rank, ControlType type, std::string_view body, int64_t now_ns, Effects* effects);
  // The link has ended, or the process has died: after all that the peer said has been handed over. `how`: connection closed.
  void OnLost(int rank, const std::string& how, Effects* effects);
  // Sends heartbeats and looks for silence. At NextTickNs() at the latest.
  void Tick(int64_t now_ns, const Doing& doing, Effects* effects);
  int64_t NextTickNs() const;

  // In the order in which they were noticed, with causes.
  const std::vector<std::pair<int, std::string>>& dead() const { return dead_; }
  bool Alive(int rank) const { return peers_[rank].fate == Fate::kAlive; }
  // last: all_reduce "grads" #17, started 0.4 s ago
  std::string LastDid(int rank, int64_t now_ns) const;

 private:
  enum class Fate : uint8_t { kAlive, kLeft, kDead };
  struct Peer {
    Fate fate = Fate::kAlive;
    int64_t heard_ns = 0;
    Doing last;  // Its clock is another one: since_ns is by ours.
  };
  struct Group {
    uint64_t key;
    std::vector<int> ranks;
    std::vector<uint64_t> ancestors;
    bool over = false;
  };

  int size() const { return static_cast<int>(options_.names.size()); }
  static bool Has(const Group& group, int rank);
  static bool IsOrDescendsFrom(const Group& group, uint64_t key);
  void Declare(int rank, const std::string& cause, Effects* effects);
  void OnEnd(int rank, std::string_view body, Effects* effects);
  void OnDead(int rank, std::string_view body, Effects* effects);
  void OnHeartbeat(int rank, std::string_view body, int64_t now_ns, Effects* effects);
  void EndKey(uint64_t key, const std::string& cause, Effects* effects);
  void Tell(int rank, ControlType type, const std::string& body, Effects* effects) const;
  void CheckSilence(int64_t now_ns, Effects* effects);

  const Options options_;
  const int64_t beat_ns_;
  std::vector<Peer> peers_;  // By rank; this process's own is never looked at.
  std::vector<std::pair<int, std::string>> dead_;
  std::map<uint64_t, Group> groups_;  // By number.
  uint64_t last_group_ = 0;
  // Groups that were ended, with causes; also those unknown here, which may be made here only later. The oldest are
  // forgotten when there are too many: whoever makes one of those then finds out by its deadline.
  Recent<std::string> ended_keys_;
  std::string all_over_;                        // This rank was declared dead, or EndAll: the cause. Empty: not.
  bool judges_ = true;                          // False when leaving, and when the others gave this rank up.
  int64_t next_beat_ns_;
  int64_t ticked_ns_;
};

}  // namespace shoal
