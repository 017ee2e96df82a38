// One epoch of one process: the links to all peers, and the one verdict that ends it. A monitor thread reads
// the control links, sends heartbeats and notices dead, silent and leaving peers; it never touches data.
// Engines (see op.h) run operations on their callers' and queues' threads and ask here whether the epoch
// still lives. Thread-safe.
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
#include "collectives/engine/op.h"
#include "collectives/engine/shared_memory.h"
#include "collectives/membership/bootstrap.h"
#include "collectives/transport/control_link.h"
#include "runtime/base/mutex.h"

namespace shoal {

class TcpMesh;
class ControlSlots;

// Something with threads that sleep until a peer acts: woken when the epoch ends or a peer leaves. Wake never
// blocks.
class Sleeper {
 public:
  virtual ~Sleeper() = default;
  virtual void Wake() = 0;
};

class World {
 public:
  // Blocks; errors as ConnectWorld. size > 1.
  static absl::StatusOr<std::shared_ptr<World>> Connect(const WorldOptions& options);
  // Says goodbye, waits a moment until the peers have heard it. All groups are gone by then.
  ~World();

  const WorldOptions& options() const { return options_; }
  std::string RankName(int rank) const;                        // rank 2 (pid 71, host b)
  std::string RankNames(const std::vector<int>& ranks) const;  // rank 2 (pid 71, host b), rank 3 (...)
  bool OneHost(const std::vector<int>& ranks) const;
  int RanksOnThisHost() const;

  bool Ended() const { return ended_.load(std::memory_order_acquire); }
  absl::Status status() const;
  // Ends the epoch everywhere, unless it is over. Returns status(). Never blocks.
  absl::Status End(const std::string& cause);
  // The peer said goodbye: what it has not done by now it never will.
  bool Left(int rank) const { return peers_[rank]->left.load(std::memory_order_acquire); }

  // For diagnosis of this process by its peers.
  void NoteOperation(const Op& op);
  void AddSleeper(Sleeper* sleeper);
  void RemoveSleeper(Sleeper* sleeper);
  // `callback` runs on the monitor thread when the epoch ends. RemoveCallbacks waits until none of `owner`
  // runs.
  void AddCallback(const void* owner, std::function<void(const absl::Status&)> callback);
  void RemoveCallbacks(const void* owner);

  SharedMemory& memory() { return *memory_; }
  // The groups' counters in this rank's first segment; kControlSegment is that segment's id on every rank.
  static constexpr uint32_t kControlSegment = 1;
  ControlSlots* control_slots() const { return control_slots_.get(); }  // Null without ranks on this host.
  TcpMesh* mesh() const { return mesh_.get(); }                         // Null on one host.

 private:
  struct Peer {
    PeerLink link;
    std::unique_ptr<ControlLink> control;  // Null for this process itself.
    std::atomic<bool> left{false};
    // The monitor's own.
    bool open = true;        // It may still say something.
    bool finished = false;   // We have said all that we will.
    bool said_last = false;  // It has said goodbye or abort.
    int64_t heard_ns = 0;
    std::string last_operation;
  };

  explicit World(const WorldOptions& options);
  absl::Status Start(std::vector<PeerLink> links);
  SharedMemory::Announcer Announcer();

  void WakeMonitor();
  void WakeSleepers();
  void PushToAll(ControlType type, const std::string& body);
  // Monitor thread.
  void RunMonitor();
  void ReadPeer(int rank);
  void HandleMessage(int rank, ControlMessage message);
  void FlushPeers();
  void SendHeartbeats();
  void CheckSilence(int64_t now_ns);
  void RunCallbacks();
  bool AllClosed() const;

  const WorldOptions options_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::shared_ptr<SharedMemory> memory_;
  std::shared_ptr<Segment> control_segment_;
  std::unique_ptr<ControlSlots> control_slots_;
  std::unique_ptr<TcpMesh> mesh_;
  Fd wake_;

  std::atomic<bool> ended_{false};
  std::atomic<bool> leaving_{
      false};  // Set before goodbye is said: peers answer it by closing, which is no failure.
  mutable Mutex mutex_;
  absl::Status cause_ ABSL_GUARDED_BY(mutex_);
  std::string last_operation_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::multimap<const void*, std::function<void(const absl::Status&)>> callbacks_ ABSL_GUARDED_BY(mutex_);
  bool callbacks_run_ ABSL_GUARDED_BY(mutex_) = false;
  CondVar callbacks_done_;
  Mutex sleepers_mutex_;
  std::set<Sleeper*> sleepers_ ABSL_GUARDED_BY(sleepers_mutex_);
  std::thread monitor_;
};

}  // namespace shoal
