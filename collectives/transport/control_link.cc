#include "collectives/transport/control_link.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kBodyMax = 64 * 1024;
constexpr size_t kHeaderBytes = 5;
constexpr int kFdsPerRead = 16;

// One sendmsg(2), with `fd` attached to the first byte when it is valid.
ssize_t SendSome(int socket, const char* data, size_t bytes, int fd) {
  iovec part = {const_cast<char*>(data), bytes};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* attached = CMSG_FIRSTHDR(&header);
    attached->cmsg_level = SOL_SOCKET;
    attached->cmsg_type = SCM_RIGHTS;
    attached->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(attached), &fd, sizeof fd);
  }
  return sendmsg(socket, &header, MSG_NOSIGNAL);
}

void TakeFds(msghdr& header, std::deque<Fd>* fds) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof fd);
      fds->emplace_back(fd);
    }
  }
}

}  // namespace

void ControlLink::Push(ControlMessage message) {
  if (message.body.size() > kBodyMax) message.body.resize(kBodyMax);
  const uint32_t length = message.body.size();
  Outgoing out;
  out.bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
  out.bytes.push_back(static_cast<char>(message.type));
  out.bytes.append(message.body);
  out.fd = std::move(message.fd);
  MutexLock lock(&mutex_);
  outgoing_.push_back(std::move(out));
}

bool ControlLink::HasUnsent() const {
  MutexLock lock(&mutex_);
  return !outgoing_.empty();
}

absl::Status ControlLink::Flush() {
  MutexLock lock(&mutex_);
  while (!outgoing_.empty()) {
    Outgoing& out = outgoing_.front();
    const ssize_t sent =
        SendSome(socket_.get(), out.bytes.data() + out.sent, out.bytes.size() - out.sent, out.fd.get());
    if (sent < 0) {
      if (errno == EINTR) continue;
      // Too many descriptors in flight: they drain as peers read, like a full buffer.
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ETOOMANYREFS) return absl::OkStatus();
      return absl::UnavailableError(errno == EPIPE ? "connection closed" : std::strerror(errno));
    }
    out.fd.Reset();
    out.sent += sent;
    if (out.sent == out.bytes.size()) outgoing_.pop_front();
  }
  return absl::OkStatus();
}

absl::Status ControlLink::Read(std::vector<ControlMessage>* messages) {
  while (true) {
    char bytes[16 * 1024];
    alignas(cmsghdr) char control[CMSG_SPACE(kFdsPerRead * sizeof(int))];
    iovec part = {bytes, sizeof bytes};
    msghdr header = {};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    const ssize_t got = recvmsg(socket_.get(), &header, MSG_CMSG_CLOEXEC);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return absl::OkStatus();
      return absl::UnavailableError(errno == ECONNRESET ? "connection closed" : std::strerror(errno));
    }
    TakeFds(header, &incoming_fds_);
    if ((header.msg_flags & MSG_CTRUNC) != 0) return absl::ResourceExhaustedError("no descriptors are left");
    if (got == 0) return absl::UnavailableError("connection closed");
    incoming_.append(bytes, got);
    SHOAL_RETURN_IF_ERROR(Parse(messages));
  }
}

absl::Status ControlLink::Parse(std::vector<ControlMessage>* messages) {
  size_t at = 0;
  while (incoming_.size() - at >= kHeaderBytes) {
    uint32_t length = 0;
    std::memcpy(&length, incoming_.data() + at, sizeof length);
    const auto type = static_cast<uint8_t>(incoming_[at + 4]);
    if (length > kBodyMax || type < 1 || type > static_cast<uint8_t>(ControlType::kWatch)) {
      return absl::DataLossError("a control message makes no sense");
    }
    if (incoming_.size() - at < kHeaderBytes + length) break;
    ControlMessage message;
    message.type = static_cast<ControlType>(type);
    message.body = incoming_.substr(at + kHeaderBytes, length);
    if (CarriesDescriptor(message.type)) {
      // Descriptors arrive with the first byte of their message, so in the order of the messages.
      if (incoming_fds_.empty()) return absl::DataLossError("a descriptor is missing");
      message.fd = std::move(incoming_fds_.front());
      incoming_fds_.pop_front();
    }
    messages->push_back(std::move(message));
    at += kHeaderBytes + length;
  }
  incoming_.erase(0, at);
  return absl::OkStatus();
}

void ControlLink::ShutdownWrite() { (void)shutdown(socket_.get(), SHUT_WR); }

}  // namespace shoal
