#include "collectives/membership/message_link.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kHeaderBytes = sizeof(uint32_t);
constexpr uint32_t kMessageBytesMax = 16 << 20;  // A view of 16384 members is far smaller.
constexpr size_t kQueuedBytesMax = 64 << 20;

}  // namespace

absl::Status MessageLink::Send(std::string_view message) {
  if (outgoing_.size() - sent_ + message.size() > kQueuedBytesMax || message.size() > kMessageBytesMax) {
    return absl::ResourceExhaustedError("it does not read what it is sent");
  }
  const auto length = static_cast<uint32_t>(message.size());
  outgoing_.append(reinterpret_cast<const char*>(&length), sizeof length);
  outgoing_.append(message);
  return Flush();
}

absl::Status MessageLink::Flush() {
  while (HasUnsent()) {
    const ssize_t sent = send(socket_.get(), outgoing_.data() + sent_, outgoing_.size() - sent_, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return absl::OkStatus();
    if (sent < 0) {
      return absl::UnavailableError(errno == EPIPE || errno == ECONNRESET ? "connection closed"
                                                                          : std::strerror(errno));
    }
    sent_ += sent;
  }
  outgoing_.clear();
  sent_ = 0;
  return absl::OkStatus();
}

absl::Status MessageLink::Read(std::vector<std::string>* messages) {
  absl::Status status;
  while (status.ok()) {
    char bytes[16 * 1024];
    const ssize_t got = recv(socket_.get(), bytes, sizeof bytes, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (got <= 0) {
      status =
          absl::UnavailableError(got == 0 || errno == ECONNRESET ? "connection closed" : std::strerror(errno));
      break;
    }
    incoming_.append(bytes, got);
    uint32_t length = 0;
    size_t at = 0;
    while (incoming_.size() - at >= kHeaderBytes) {
      std::memcpy(&length, incoming_.data() + at, sizeof length);
      if (length > kMessageBytesMax) {
        status = absl::DataLossError(absl::StrCat("a message of ", length, " bytes"));
        break;
      }
      if (incoming_.size() - at - kHeaderBytes < length) break;
      messages->push_back(incoming_.substr(at + kHeaderBytes, length));
      at += kHeaderBytes + length;
    }
    incoming_.erase(0, at);
  }
  return status;
}

}  // namespace shoal
