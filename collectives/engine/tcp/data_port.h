// One group's messages in the data mesh: who wants what, what came early, what waits for the peer. Decides
// only: frames to send go into outboxes, which the mesh empties. Not thread-safe: all under the mesh's lock.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "collectives/engine/tcp/data_flow.h"
#include "collectives/engine/tcp/data_mesh.h"
#include "collectives/transport/buffer_pool.h"
#include "runtime/base/mutex.h"

namespace shoal {

struct DataMesh::Port {
  using Key = std::pair<uint64_t, uint32_t>;  // Operation, tag.

  // A message that this rank sends.
  struct Outgoing {
    Port* port = nullptr;
    int rank = 0;
    DataHeader header = {};
    const std::byte* data = nullptr;
    uint64_t token = 0;
    int64_t cut = 0;   // Handed to flows, as slices.
    int64_t sent = 0;  // Taken by the kernel.
    std::list<Outgoing>::iterator self;
  };

  // What waits for a flow to one rank. Small frames go first. Of large messages the groups send a slice in turn, so that a
  // group with many of them does not keep another one waiting; those of a group take turns too.
  struct Outbox {
    std::deque<DataFlow::Frame> small;
    std::deque<Port*> large;
    bool listed = false;  // In `dirty`.
  };
  struct Shared {
    uint64_t epoch = 0;
    BufferPool pool{256 << 20};
    std::vector<Outbox> outboxes;  // By rank.
    std::vector<int> dirty;        // Ranks whose outboxes are to be emptied.
    std::vector<std::string> names;
  };

  Port(Shared* shared, uint64_t key) : shared(shared), key(key), sides(shared->outboxes.size()) {}
  ~Port();

  // The caller's side; see Channel.
  void Send(int rank, MessageId id, const std::byte* data, int64_t bytes, uint64_t token);
  void Receive(int rank, MessageId id, std::byte* into, int64_t bytes, uint64_t token, Into whose);
  void Release(const std::byte* view);
  void Finish(MessageId id);
  void Probe(int rank, MessageId id);
  bool Pending(int rank) const;
  bool Idle() const;  // Nothing is pending with anybody.
  uint64_t Reached(int rank) const { return sides[rank] == nullptr ? 0 : sides[rank]->reached; }

  // The network's side. An error: the rank sends what it must not.
  absl::StatusOr<std::byte*> OnHeader(int rank, const DataHeader& header);
  void OnPayload(int rank, const DataHeader& header);
  void OnSent(Outgoing* out, const DataHeader& header);
  // The next slice to `rank`, whose outbox has this port in front: its turn is over.
  DataFlow::Frame TakeSlice(int rank);

  // The end: no event comes any more. The first status stays. Flows may still point at the group's memory:
  // the mesh detaches them before it lets go of its lock.
  void Fail(const absl::Status& status);

  Shared* const shared;
  const uint64_t key;
  const GroupLife* life = nullptr;  // Null: messages came before the group was opened here.
  std::vector<Channel::Event> events;
  absl::Status failure;
  Mismatch mismatch;      // Members are ranks in here.
  bool detached = false;  // The mesh's: flows no longer use this port's memory.
  bool woken = false;
  CondVar changed;

 private:
  struct Incoming {
    std::byte* into = nullptr;  // Null until the first header of a view.
    int64_t bytes = 0;
    int64_t claimed = 0, received = 0;  // In headers, in payloads.
    uint64_t token = 0;
    uint32_t signature = 0;
    bool view = false;
    bool window = false;  // It came unasked, from the sender's window.
  };
  // Came before it was wanted: a small message, complete or not yet, or the announcement of one.
  struct Early {
    DataHeader header = {};
    std::byte* buffer = nullptr;
    bool complete = false;
    bool wanted = false;
    Incoming receiver;  // When it is wanted, but not complete.
  };
  // Between this rank and another one.
  struct Side {
    std::list<Outgoing> sends;
    std::deque<Outgoing*> large;               // Of those, what the peer is ready for.
    absl::flat_hash_map<Key, Outgoing*> held;  // Until the peer is ready.
    absl::flat_hash_map<Key, DataHeader> early_ready;
    absl::flat_hash_map<Key, Incoming> expected;
    absl::flat_hash_map<Key, Early> early;
    int64_t window_used = 0;  // Bytes of small messages that the peer has not given back.
    int64_t consumed = 0;     // Of the peer's window: not given back yet.
    int wanted_early = 0;
    uint64_t reached = 0;  // The latest collective of which something has come.
  };
  // What is known of an operation's signature, on this rank and on the wire.
  struct OpState {
    bool posted = false;
    uint32_t ours = 0;
    std::vector<std::pair<int, DataHeader>> seen;  // The first of each signature.
  };

  Side& At(int rank);
  DataHeader NewHeader(DataType type, MessageId id, int64_t total) const;
  void Post(int rank, const DataHeader& header, Outgoing* out);  // Into the outbox.
  void PostLarge(int rank, Outgoing* out);
  void List(int rank);
  void EndReceive(const Incoming& incoming);
  void TakeEarly(int rank, Early* early, const Incoming& incoming, const DataHeader& wanted);
  void Consumed(int rank, int64_t cost);
  absl::StatusOr<std::byte*> OnReady(int rank, const DataHeader& header);
  absl::StatusOr<std::byte*> OnUnasked(int rank, const DataHeader& header);
  absl::StatusOr<std::byte*> IntoExpected(int rank, const DataHeader& header, Incoming* incoming);

  // False: the two sides do not mean the same, and the port has failed.
  bool Agree(int rank, uint32_t ours, int64_t our_bytes, const DataHeader& theirs);
  bool AgreePosted(int rank, MessageId id, int64_t bytes);
  bool AgreeSeen(int rank, const DataHeader& header);
  void FailMismatch(int rank, MessageId ours, int64_t our_bytes, const DataHeader& theirs);

  std::vector<std::unique_ptr<Side>> sides;  // By rank.
  absl::flat_hash_map<uint64_t, OpState> ops;
  absl::flat_hash_set<const std::byte*> views;  // Given to the caller.
  uint64_t finished_op = 0;
};

}  // namespace shoal
