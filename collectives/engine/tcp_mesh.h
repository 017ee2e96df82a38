// Messages between this rank and its peers over one TCP connection per peer, for any number of operations at
// a time. Small messages are sent at once and kept by the receiver until they are asked for; large ones only
// when the receiver has said where they go, so that one group's data never blocks another's. Large messages
// are cut into slices which take turns. There is no thread: whoever waits for a batch moves everybody's bytes
// meanwhile. Thread-safe.
//
// Frame: the 64 bytes of Header, then `bytes` of payload. Bytes of another epoch end this one.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "collectives/engine/op.h"
#include "collectives/engine/world.h"
#include "collectives/transport/socket.h"
#include "runtime/base/mutex.h"

namespace shoal {

class TcpMesh final : public Sleeper {
 public:
  // `sockets[r]` leads to rank r; this rank's own entry is invalid. `wake`: an eventfd(2), non-blocking.
  TcpMesh(World* world, Epoch epoch, Fd wake, std::vector<Fd> sockets);
  ~TcpMesh() override;

  // Messages of one operation that are awaited together. Borrows the operation and all buffers until Wait has
  // returned.
  struct Batch {
    Batch(uint64_t group, const Op& op, int ranks) : group(group), op(op), pending_by_rank(ranks, 0) {}
    const uint64_t group;
    const Op& op;
    int pending = 0;  // Guarded by the mesh, as the next one.
    std::vector<int> pending_by_rank;
  };

  // The message `step` of the batch's operation to or from a rank. Both sides know its size. Never block.
  void Send(Batch* batch, int rank, uint32_t step, const void* data, int64_t bytes);
  void Receive(Batch* batch, int rank, uint32_t step, void* data, int64_t bytes);
  // Blocks until all messages of the batch are through. ABORTED: the epoch is over; buffers are no longer in
  // use.
  absl::Status Wait(Batch* batch, const std::atomic<int64_t>& deadline_ns);

  void Wake() override;

 private:
  using Key = std::tuple<uint64_t, uint64_t, uint32_t>;  // Group, operation, step.
  enum class Type : uint8_t { kEager = 1, kReady = 2, kBulk = 3 };
  struct Header {
    uint32_t magic;
    Type type;
    uint8_t kind;  // Of the operation, as the next one: the same on both sides.
    uint16_t unused;
    uint32_t signature;
    uint32_t step;
    uint64_t epoch, group, seq;
    uint64_t bytes;   // Payload of this frame.
    uint64_t offset;  // In the message.
    uint64_t total;   // Of the message.
  };
  static_assert(sizeof(Header) == 64);

  struct Outgoing {
    Header header = {};
    const std::byte* data = nullptr;
    int64_t sent = 0;  // Of the whole message: bytes in finished slices.
    Batch* batch = nullptr;
  };
  struct Incoming {
    std::byte* data = nullptr;
    int64_t bytes = 0;
    int64_t received = 0;
    Batch* batch = nullptr;
  };
  struct Unexpected {
    Header header;
    std::vector<std::byte> bytes;
  };
  struct Peer {
    Fd socket;
    bool open = true;
    std::deque<Outgoing> ready;  // kReady frames: before all data.
    std::deque<Outgoing> queue;
    std::map<Key, Outgoing> held;       // Until the peer is ready.
    std::map<Key, Header> early_ready;  // The peer was ready before us.
    std::map<Key, Incoming> expected;
    std::map<Key, Unexpected> unexpected;
    int64_t unexpected_bytes = 0;
    // The frame being written.
    bool writing = false;
    Outgoing out;
    size_t frame_sent = 0;  // Header and payload.
    // The frame being read, and bytes read ahead of it.
    std::vector<std::byte> buffer;
    size_t buffer_begin = 0, buffer_end = 0;
    bool in_payload = false;
    Header in = {};
    std::byte* target = nullptr;
    int64_t payload_left = 0;
  };

  Header NewHeader(const Batch& batch, Type type, uint32_t step, int64_t total) const;
  static Key KeyOf(const Header& header) { return {header.group, header.seq, header.step}; }
  void Finish(Batch* batch, int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // A message that came before it was wanted.
  void TakeUnexpected(int rank, const Header& wanted, const Incoming& in)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PumpOut(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool NextFrame(Peer* peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndFrame(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PumpIn(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Consumes what is buffered; false when more bytes are needed first.
  bool ConsumeBuffer(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status BeginPayload(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the peer means the same operation and size.
  static absl::Status Check(const Header& header, const Op& op, int64_t bytes);
  void EndBecauseOf(int rank, const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndPayload(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // One poll(2) of all sockets, without the lock, and what follows from it. False when nothing was ready.
  bool PollOnce(int timeout_ms) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckEpoch(const Batch& batch, int64_t deadline_ns) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  World* const world_;
  const uint64_t epoch_;
  Fd wake_;
  Mutex mutex_;
  CondVar changed_;
  bool polling_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::unique_ptr<Peer>> peers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
