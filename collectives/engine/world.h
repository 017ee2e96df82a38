// One epoch of one process: the links to all peers, and what is known of their lives. A monitor thread reads the control
// links, sends heartbeats and notices dead, silent and leaving peers; it never touches data. A watch thread notices the
// deaths of processes on this host at once. Thread-safe.
//
// Every group has its own life (engine/group_life.h):
//   - A peer that dies (its connection ends without a goodbye, it is silent for heartbeat_timeout, its process dies, or
//     another rank says so) ends exactly the groups that have it, on all of their members. When the others declare this
//     rank dead, all of its groups end.
//   - GroupLife::End ends a group and those split from it, on all members; also where they are made only later.
//   - A peer that says goodbye ends nothing: only who waits for it is told (Left).
//
// The world itself is the group of all ranks, the parent of all others: that is what its own Ended, status, End,
// sleepers and callbacks are about.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "collectives/communicator.h"
#include "collectives/engine/epoch_core.h"
#include "collectives/engine/group_life.h"
#include "collectives/engine/op.h"
#include "collectives/engine/shm/shared_memory.h"
#include "collectives/membership/bootstrap.h"
#include "collectives/transport/control_link.h"
#include "collectives/transport/death_watch.h"
#include "runtime/base/mutex.h"

namespace shoal {

class DataMesh;

class World {
 public:
  // FormMesh and Create. Blocks; errors as ConnectWorld.
  static absl::StatusOr<std::shared_ptr<World>> Connect(const WorldOptions& options);
  // On connections that are there: links[r] is about rank r, as FormMesh returns them. A world of one rank needs none, and
  // has no threads. Does not block. RESOURCE_EXHAUSTED: no descriptors left.
  static absl::StatusOr<std::shared_ptr<World>> Create(const WorldOptions& options, std::vector<PeerLink> links);
  // Says goodbye. While the world lives, waits until the peers have heard it (1 s at most) and their systems have the data
  // that was sent to them (unless they take nothing for heartbeat_timeout); once it has ended, a few milliseconds for the
  // goodbye, and 200 ms at most for the data. Never waits for dead peers. All groups are gone by then.
  ~World();

  const WorldOptions& options() const { return options_; }
  std::string RankName(int rank) const;  // rank 2 (pid 71, host b)
  // For verdicts, with what they did last: rank 2 (pid 71, host b) (last: barrier #3, ended 2.1 s ago), rank 3 (...)
  std::string RankNames(const std::vector<int>& ranks) const;
  bool OneHost(const std::vector<int>& ranks) const;
  int RanksOnThisHost() const;

  // The life of the group `key`, which is over already when one of its ranks is dead or when it, or a group it descends from,
  // was ended. `parent` null: not split from a group. Only its End needs the world: it may be destroyed later. `parent` need
  // not live.
  std::shared_ptr<GroupLife> NewGroup(uint64_t key, std::vector<int> ranks, int index, const GroupLife* parent);

  bool Ended() const { return root_->Ended(); }
  absl::Status status() const { return root_->status(); }
  // Ends all groups, on every rank; also when the world has ended because a peer died. Returns status(). Never blocks.
  absl::Status End(const std::string& cause);

  // Says goodbye to all peers: what this process has not done by now it never will. Groups without it, and operations that
  // have all they need from it, go on. Its own groups live until End or their end, but no operation is issued on them any
  // more (CheckPresent). Never blocks.
  void Leave();
  bool Leaving() const { return leaving_.load(std::memory_order_acquire); }
  // ABORTED: this process has left.
  absl::Status CheckPresent() const;

  // The peer said goodbye: what it has not done by now it never will.
  bool Left(int rank) const { return peers_[rank]->left.load(std::memory_order_acquire); }
  // The dead peers, in the order of their ranks. Outlives the world; thread-safe.
  class Deaths {
   public:
    struct Death {
      int rank = 0;
      std::string cause;  // rank 2 (pid 71, host b): connection closed
      bool died = false;  // ProcessDied.
    };
    std::vector<Death> Get() const;
    void Set(std::vector<Death> deaths);
    // Whether groups were ended because this process lacks what it takes to work with its peers (descriptors, memory): true
    // once.
    bool TakeOwnLack();
    void SetOwnLack();

   private:
    mutable Mutex mutex_;
    std::vector<Death> deaths_ ABSL_GUARDED_BY(mutex_);
    bool own_lack_ ABSL_GUARDED_BY(mutex_) = false;
  };
  // A death is there before any group has ended because of it.
  std::shared_ptr<Deaths> deaths() const { return deaths_; }
  // The kernel of this host says so (death_watch.h); see GroupLife::ProcessDied. False also where nobody can know: on other
  // hosts.
  bool ProcessDied(int rank) const { return peers_[rank]->died.load(std::memory_order_acquire); }

  // Of the group of all ranks; woken as well when any other group ends, and when any peer dies or leaves.
  void AddSleeper(Sleeper* sleeper) { root_->AddSleeper(sleeper); }
  void RemoveSleeper(Sleeper* sleeper) { root_->RemoveSleeper(sleeper); }
  void AddCallback(const void* owner, std::function<void(const absl::Status&)> callback) {
    root_->AddCallback(owner, std::move(callback));
  }
  void RemoveCallbacks(const void* owner) { root_->RemoveCallbacks(owner); }
  SharedMemory& memory() { return *memory_; }
  const std::shared_ptr<SharedMemory>& shared_memory() const { return memory_; }
  DataMesh* data_mesh() const { return mesh_.get(); }  // Null on one host.

 private:
  class Life;
  // How lives reach the world, which may be gone: a handle of an operation keeps its group's life.
  struct Anchor {
    Mutex mutex;  // Before World::mutex_.
    World* world ABSL_GUARDED_BY(mutex) = nullptr;
  };
  struct Peer {
    PeerLink link;
    std::unique_ptr<ControlLink> control;  // Null for this process itself.
    std::atomic<bool> left{false};
    std::atomic<bool> died{false};
    std::atomic<bool> closing{false};  // We have said, or queued, all that we will.
    // The monitor's own.
    bool open = true;       // It may still say something.
    bool finished = false;  // Our side of the link is shut down.
  };

  explicit World(const WorldOptions& options);
  absl::Status Start(std::vector<PeerLink> links);
  void StartWatch();
  SharedMemory::Announcer Announcer();
  bool OnThisHost(int rank) const { return peers_[rank]->link.host == peers_[options_.rank]->link.host; }

  std::shared_ptr<Life> NewLife(uint64_t key, std::vector<int> ranks, int index, std::vector<uint64_t> ancestors);
  absl::Status EndGroup(const Life& life, const std::string& cause);
  void Forget(uint64_t group);
  void OnProcessDeath(int rank);
  void Apply(const EpochCore::Effects& effects) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RunCallbacks();
  void WakeMonitor();
  // Monitor thread.
  void RunMonitor();
  void PollLinks(int64_t until_ns);
  void ReadPeer(int rank);
  void HandleMessage(int rank, ControlMessage message);
  void AddPeerSegment(int rank, ControlMessage message);
  void FlushPeers();
  EpochCore::Doing Doing(int64_t now_ns) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<int> DeadRanks() const;
  bool AllClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int64_t FarewellEndNs() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  static constexpr uint64_t kRootKey = 0;

  const WorldOptions options_;
  const std::shared_ptr<Anchor> anchor_ = std::make_shared<Anchor>();
  const std::shared_ptr<Deaths> deaths_ = std::make_shared<Deaths>();
  std::vector<std::unique_ptr<Peer>> peers_;
  std::shared_ptr<GroupLife> root_;
  std::shared_ptr<SharedMemory> memory_;
  std::unique_ptr<DataMesh> mesh_;
  Fd wake_;

  mutable Mutex mutex_;
  std::unique_ptr<EpochCore> core_ ABSL_GUARDED_BY(mutex_);
  struct LifeEntry {
    Life* raw = nullptr;  // It forgets itself here before it goes.
    std::weak_ptr<Life> shared;
  };
  std::map<uint64_t, LifeEntry> lives_ ABSL_GUARDED_BY(mutex_);  // By the core's numbers.
  std::atomic<bool> leaving_{false};
  int64_t closing_since_ns_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: the world is in use.
  std::unique_ptr<DeathWatch> watch_;
  std::thread monitor_;
};

}  // namespace shoal
