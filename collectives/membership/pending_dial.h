// One attempt to connect, to prove both ends and to say a first frame, that never blocks: for who has many to make at the
// same time. Belongs to one thread.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "collectives/transport/handshake.h"
#include "collectives/transport/socket.h"

namespace shoal {

class PendingDial {
 public:
  // Begins at once. `greeting` is the body of a kPeerHello frame.
  PendingDial(const SocketAddress& address, const Credentials& credentials, std::string greeting);

  enum class Progress { kMore, kDone, kFailed };
  // Goes on as far as it can without waiting.
  Progress Advance();
  // What to wait for before the next Advance (poll(2)).
  int fd() const { return socket_.get(); }
  short events() const;
  // kDone: the connection. kFailed: why, with the address.
  Fd TakeSocket() { return std::move(socket_); }
  const absl::Status& status() const { return status_; }

 private:
  enum class Stage { kConnecting, kProving, kDone, kFailed };

  void Connect();
  Progress Fail(const absl::Status& status);
  Progress Prove();
  bool SendOutput();

  const SocketAddress address_;
  Handshake handshake_;
  const std::string greeting_;
  Stage stage_ = Stage::kConnecting;
  Fd socket_;
  std::string output_;
  absl::Status status_;
};

}  // namespace shoal
