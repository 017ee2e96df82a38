// The bytes of one data connection: frames out, several per system call, and frames in, payloads straight to
// where they belong. Knows frames, no messages. Not thread-safe; no call blocks.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/transport/data_frame.h"
#include "collectives/transport/socket.h"

namespace shoal {

class DataFlow {
 public:
  class Sink {
   public:
    virtual ~Sink() = default;
    // Where the payload goes; null: nowhere. An error ends the connection.
    virtual absl::StatusOr<std::byte*> OnHeader(const DataHeader& header) = 0;
    virtual void OnPayload(const DataHeader& header) = 0;  // All there. Not of frames without payload.
    virtual void OnSent(void* owner, const DataHeader& header) = 0;
  };

  DataFlow(Fd socket, uint64_t epoch);

  int fd() const { return socket_.get(); }
  bool open() const { return socket_.valid(); }
  void Close();  // After reading what is there, so that the peer is not reset before it has read what we sent.
  void EndWrites() { (void)shutdown(fd(), SHUT_WR); }  // Nothing more is sent.
  // Before Close, for who can wait: nothing more is sent, and what comes is thrown away. How many of the bytes that were sent
  // the peer's system has not got yet; 0 as well when the connection is broken.
  int64_t Undelivered();

  // ---- Out. A frame's payload is borrowed until OnSent or Detach.
  struct Frame {
    DataHeader header;
    const std::byte* payload = nullptr;
    void* owner = nullptr;  // Null: nobody is told.
    std::unique_ptr<std::byte[]> kept = nullptr;
  };
  bool Full() const { return frames_.size() >= kFramesMax || queued_bytes_ >= kQueuedBytesMax; }
  bool Empty() const { return frames_.empty(); }
  void Add(Frame frame);
  // Writes what the socket takes. UNAVAILABLE: the peer is gone. `*moved` grows by the bytes.
  absl::Status Write(Sink* sink, int64_t* moved);
  bool blocked() const { return blocked_; }  // The socket took less than there was.
  bool armed = false;                        // The owner's: whether it waits for the socket to take more.

  // ---- In.
  enum class Progress : uint8_t { kNothingMore, kMore, kEnd };
  // Reads about `budget` bytes at most. kEnd: the peer closed. UNAVAILABLE: it is gone; DATA_LOSS: it sent no
  // frame.
  absl::StatusOr<Progress> Read(Sink* sink, int64_t budget, int64_t* moved);

  // Lets go of the memory of a group: what is half sent goes on from a copy, what is half received goes
  // nowhere.
  void Detach(uint64_t group);

 private:
  static constexpr size_t kFramesMax = 16;
  static constexpr int64_t kQueuedBytesMax = 128 << 10;  // What is queued has its place in the order.

  void EndFrames(Sink* sink, size_t sent);
  absl::Status Consume(Sink* sink);
  void TakePayload(Sink* sink, size_t bytes);

  Fd socket_;
  const uint64_t epoch_;
  std::deque<Frame> frames_;
  int64_t queued_bytes_ = 0;  // Of their payloads.
  size_t first_sent_ = 0;     // Of the first frame, header included.
  bool blocked_ = false;

  std::vector<std::byte> buffer_;  // Read ahead of the frame at hand.
  size_t begin_ = 0, end_ = 0;
  size_t ahead_;  // How much of it is used.
  bool in_payload_ = false;
  DataHeader in_ = {};
  std::byte* target_ = nullptr;  // Null: the payload is skipped.
  size_t payload_left_ = 0;
};

// Before they are closed: blocks until the peers' systems have all that was sent, or have taken nothing for `patience_ns`.
void AwaitDelivery(const std::vector<DataFlow*>& flows, int64_t patience_ns);

}  // namespace shoal
