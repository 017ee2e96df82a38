// The frames of the bootstrap protocol, and the door through which strangers knock. Frame: magic, version,
// type and body length (u32 each), body.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"

namespace shoal {

constexpr uint32_t kProtocolVersion = 1;

enum class FrameType : uint32_t {
  kHello = 1,      // Rank to rank 0: who I am.
  kWaiting = 2,    // Rank 0: whom we wait for.
  kRefused = 3,    // Rank 0: not of this job. The dialler may try again.
  kFailed = 4,     // Rank 0: the job cannot form (status code, text).
  kTable = 5,      // Rank 0: all ranks.
  kHost = 6,       // Rank to rank 0: with which rank I share memory.
  kHosts = 7,      // Rank 0: all answers.
  kPeerHello = 8,  // Higher rank to lower: this connection is ours.
};

struct Frame {
  uint32_t version = kProtocolVersion;
  FrameType type = FrameType::kHello;
  std::string body;
};

absl::Status SendFrame(int fd, FrameType type, std::string_view body, int64_t deadline_ns);
// From a peer that has said who it is. DATA_LOSS: bytes that are no frame.
absl::StatusOr<Frame> ReceiveFrame(int fd, int64_t deadline_ns);

// Accepts connections and reads one frame from each, all at the same time, so that a stranger who says
// nothing holds up nobody. What does not begin like a frame is closed with a log line.
class Greeter {
 public:
  explicit Greeter(std::vector<int> listeners) : listeners_(std::move(listeners)) {}

  struct Event {
    Fd socket;  // Valid: it said `frame`.
    Frame frame;
    int readable = -1;  // Otherwise the watched descriptor that has something to read.
  };
  // Blocks. DEADLINE_EXCEEDED. `watched` are descriptors to wait for as well.
  absl::StatusOr<Event> Next(const std::vector<int>& watched, int64_t deadline_ns);

 private:
  struct Guest {
    Fd socket;
    std::string bytes;
  };
  enum class Progress { kMore, kFrame, kGone };

  absl::Status AcceptAll();
  static Progress ReadSome(Guest* guest, Frame* frame);

  std::vector<int> listeners_;
  std::deque<Guest> guests_;
};

}  // namespace shoal
