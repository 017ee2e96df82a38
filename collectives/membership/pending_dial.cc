#include "collectives/membership/pending_dial.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "collectives/membership/frame.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kSendNs = 100'000'000;  // A fresh socket has room for a greeting.

}  // namespace

PendingDial::PendingDial(const SocketAddress& address, const Credentials& credentials, std::string greeting)
    : address_(address),
      handshake_(Handshake::Dialler(credentials, FreshNonce())),
      greeting_(std::move(greeting)) {
  Connect();
}

void PendingDial::Connect() {
  socket_ = Fd(socket(address_.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket_.valid()) {
    (void)Fail(ErrnoStatus(errno, "socket"));
    return;
  }
  const int on = 1;
  if (address_.family() != AF_UNIX)
    (void)setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  const auto* address = reinterpret_cast<const sockaddr*>(&address_.storage);
  if (connect(socket_.get(), address, address_.length) != 0 && errno != EINPROGRESS) {
    (void)Fail(absl::UnavailableError(std::strerror(errno)));
  }
}

short PendingDial::events() const {
  return stage_ == Stage::kConnecting || !output_.empty() ? POLLOUT : POLLIN;
}

PendingDial::Progress PendingDial::Fail(const absl::Status& status) {
  stage_ = Stage::kFailed;
  status_ = Annotate(status, absl::StrCat("dial ", address_.ToString()));
  socket_.Reset();
  return Progress::kFailed;
}

PendingDial::Progress PendingDial::Advance() {
  if (stage_ == Stage::kFailed) return Progress::kFailed;
  if (stage_ == Stage::kConnecting) {
    if (!PollOne(socket_.get(), POLLOUT, /*deadline_ns=*/0)) return Progress::kMore;
    int error = 0;
    socklen_t length = sizeof error;
    (void)getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return Fail(absl::UnavailableError(std::strerror(error)));
    stage_ = Stage::kProving;
  }
  return stage_ == Stage::kProving ? Prove() : Progress::kDone;
}

// Whether all that the handshake wants to say is sent.
bool PendingDial::SendOutput() {
  output_.append(handshake_.TakeOutput());
  while (!output_.empty()) {
    const ssize_t sent = send(socket_.get(), output_.data(), output_.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return errno != EAGAIN && errno != EWOULDBLOCK;  // What is broken is found out by reading.
    output_.erase(0, sent);
  }
  return true;
}

PendingDial::Progress PendingDial::Prove() {
  while (true) {
    if (!SendOutput()) return Progress::kMore;
    if (handshake_.Done()) break;
    char bytes[256];
    const ssize_t got = recv(socket_.get(), bytes, std::min(handshake_.Wanted(), sizeof bytes), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Progress::kMore;
    if (got == 0) return Fail(absl::UnavailableError("connection closed"));
    if (got < 0) return Fail(absl::UnavailableError(std::strerror(errno)));
    const absl::Status status = handshake_.Take(std::string_view(bytes, got));
    if (!status.ok()) {
      (void)SendOutput();
      return Fail(status);
    }
  }
  const absl::Status sent = SendFrame(socket_.get(), FrameType::kPeerHello, greeting_, NowNs() + kSendNs);
  if (!sent.ok()) return Fail(sent);
  stage_ = Stage::kDone;
  return Progress::kDone;
}

}  // namespace shoal
