// The frames of the bootstrap protocol, and the door through which strangers knock. Frame: magic, version,
// type and body length (u32 each), body. docs/wire.md has the whole of it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/transport/handshake.h"
#include "collectives/transport/socket.h"

namespace shoal {

enum class FrameType : uint32_t {
  kHello = 1,      // Rank to rank 0: who I am.
  kWaiting = 2,    // Rank 0: whom we wait for.
  kRefused = 3,    // Rank 0: not of this job. The dialler may try again.
  kFailed = 4,     // Rank 0: the job cannot form (status code, text).
  kTable = 5,      // Rank 0: all ranks.
  kPeerHello = 8,  // Higher rank to lower: this connection is ours (mesh.h).
  kMember = 9,     // Member to coordinator: messages follow (message_link.h).
};

struct Frame {
  uint32_t version = kProtocolVersion;
  FrameType type = FrameType::kHello;
  std::string body;
};

absl::Status SendFrame(int fd, FrameType type, std::string_view body, int64_t deadline_ns);
// From a peer that has said who it is. DATA_LOSS: bytes that are no frame.
absl::StatusOr<Frame> ReceiveFrame(int fd, int64_t deadline_ns);

// The first frame of a connection, from bytes as they come. Never reads past its end.
class FrameReader {
 public:
  explicit FrameReader(uint32_t body_bytes_max) : body_bytes_max_(body_bytes_max) {}
  // How many bytes to read next; 0 when the frame is complete.
  size_t Wanted() const;
  // Takes at most Wanted() bytes. DATA_LOSS: no frame.
  absl::Status Take(std::string_view bytes);
  Frame TakeFrame();  // Once Wanted() is 0.

 private:
  uint32_t body_bytes_max_;
  std::string bytes_;
};

// Accepts connections, has each prove that it may join (transport/handshake.h) and reads one frame from it,
// all at the same time, so that a stranger who says nothing holds up nobody. What does not prove itself
// within a few seconds is closed with a log line that names the address and the reason; floods of such lines
// are thinned. A stranger costs a descriptor and less than a kilobyte; above 1024 of them, or without
// descriptors, the one who came first goes.
class Greeter {
 public:
  Greeter(std::vector<int> listeners, const Credentials& credentials)
      : listeners_(std::move(listeners)), credentials_(credentials) {}

  struct Event {
    Fd socket;  // Valid: it said `frame`.
    Purpose purpose = Purpose::kBootstrap;
    Frame frame;
    int readable = -1;  // Otherwise the watched descriptor that has something to read.
  };
  // Blocks. DEADLINE_EXCEEDED. Without descriptors strangers wait outside. `watched` are descriptors to wait
  // for as well.
  absl::StatusOr<Event> Next(const std::vector<int>& watched, int64_t deadline_ns);
  // What kept somebody out last who had done nothing wrong; "": nothing ever did.
  const std::string& trouble() const { return trouble_; }
  // Whether nobody is let in now, for lack of descriptors.
  bool closed() const;

 private:
  struct Guest {
    Fd socket;
    SocketAddress address;
    int64_t deadline_ns = 0;
    Handshake handshake;
    FrameReader frame;
    bool spoke = false;
  };
  enum class Progress : uint8_t { kMore, kFrame, kGone };

  absl::Status AcceptAll();
  void Admit(Fd socket);
  Progress ReadSome(Guest* guest);
  absl::Status Take(Guest* guest, std::string_view bytes);
  void DropLate();
  void Log(const std::string& line);
  void Refused(const Guest& guest, std::string_view reason);

  std::vector<int> listeners_;
  Credentials credentials_;
  std::deque<std::unique_ptr<Guest>> guests_;
  // Log lines: some at once, then one per second.
  double log_budget_ = 20;
  int64_t logged_ns_ = 0;
  int64_t unlogged_ = 0;
  int64_t closed_until_ns_ = 0;  // No descriptors are left: nobody is let in before then.
  std::string trouble_;
};

}  // namespace shoal
