// The control connection to one peer: small messages in order, with descriptors where the socket can carry
// them. Data never travels here, so that a heartbeat or a verdict waits behind nothing. Push and Flush may be
// called from any thread; Read belongs to one. Framing: u32 body length, u8 type, body.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "collectives/transport/control_type.h"
#include "collectives/transport/socket.h"
#include "runtime/base/mutex.h"

namespace shoal {

struct ControlMessage {
  ControlType type = ControlType::kHeartbeat;
  std::string body;
  Fd fd;  // Carried along (unix sockets only).
};

class ControlLink {
 public:
  explicit ControlLink(Fd socket) : socket_(std::move(socket)) { SendUrgently(socket_.get()); }

  int fd() const { return socket_.get(); }
  void Push(ControlMessage message);
  bool HasUnsent() const;

  // Send what the socket takes now, receive what is there now. Never block.
  absl::Status Flush();
  // UNAVAILABLE: the peer closed or reset the connection. DATA_LOSS: bytes that are no message. RESOURCE_EXHAUSTED: a
  // descriptor was lost because this process may not have more. With all messages before that.
  absl::Status Read(std::vector<ControlMessage>* messages);
  // No more sending; the peer reads an end of file after what was flushed.
  void ShutdownWrite();

 private:
  struct Outgoing {
    std::string bytes;
    size_t sent = 0;
    Fd fd;
  };

  absl::Status Parse(std::vector<ControlMessage>* messages);

  Fd socket_;
  mutable Mutex mutex_;
  std::deque<Outgoing> outgoing_ ABSL_GUARDED_BY(mutex_);
  std::string incoming_;
  std::deque<Fd> incoming_fds_;
};

}  // namespace shoal
