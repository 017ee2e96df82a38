// A connection for whole messages, in order, between a member and the coordinator. Never blocks. Belongs to one
// thread. Framing: u32 length, bytes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "collectives/transport/socket.h"

namespace shoal {

class MessageLink {
 public:
  explicit MessageLink(Fd socket) : socket_(std::move(socket)) {}

  int fd() const { return socket_.get(); }
  // Queues it and sends what the socket takes now. UNAVAILABLE: the connection is broken. RESOURCE_EXHAUSTED: the peer
  // does not read, too much is queued.
  absl::Status Send(std::string_view message);
  bool HasUnsent() const { return sent_ < outgoing_.size(); }
  absl::Status Flush();
  // What has come. The messages before an error are there as well. UNAVAILABLE: closed; DATA_LOSS: no message.
  absl::Status Read(std::vector<std::string>* messages);

 private:
  Fd socket_;
  std::string outgoing_;
  size_t sent_ = 0;
  std::string incoming_;
};

}  // namespace shoal
