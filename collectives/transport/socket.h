// Stream sockets over TCP (IPv4, IPv6) and over unix sockets in the abstract namespace ("unix:NAME"). Every
// socket is non-blocking and closed on exec. Hides address resolution, retries of interrupted calls and
// TCP_NODELAY.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

// Owns a file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void Reset();

 private:
  int fd_ = -1;
};

struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t length = 0;

  int family() const { return storage.ss_family; }
  int port() const;         // 0 for unix sockets.
  std::string Ip() const;   // Numeric; "" for unix sockets.
  bool IsAny() const;       // 0.0.0.0 or ::.
  bool IsLoopback() const;  // Unix sockets count.
  std::string ToString() const;
};

// "unix:NAME", a numeric address or a host name. UNAVAILABLE: the name cannot be resolved.
absl::StatusOr<SocketAddress> ResolveAddress(std::string_view host, int port);
// The address that means "any interface" (or the loopback one) of `family`, port chosen by the system.
SocketAddress AnyAddress(int family, bool loopback_only);

absl::StatusOr<Fd> Listen(const SocketAddress& address);
// One attempt, until `deadline_ns` (NowNs()). UNAVAILABLE: nobody listens there, or no route.
absl::StatusOr<Fd> Dial(const SocketAddress& address, int64_t deadline_ns);
// An invalid Fd when nobody waits to be accepted.
absl::StatusOr<Fd> Accept(int listener);

// From now on what is sent there overtakes the bytes of other connections where they queue: in this host, and in networks that
// honour the type of service. For small messages that somebody waits for.
void SendUrgently(int fd);

// The address of this host that a connection to `remote` would come from, port 0; no bytes travel. UNAVAILABLE: no route.
absl::StatusOr<SocketAddress> LocalAddressTowards(const SocketAddress& remote);
SocketAddress LocalAddressOf(int fd);
SocketAddress PeerAddressOf(int fd);

// Block until all bytes are through. UNAVAILABLE: the peer closed. DEADLINE_EXCEEDED.
absl::Status SendAll(int fd, const void* data, size_t bytes, int64_t deadline_ns);
absl::Status ReceiveAll(int fd, void* data, size_t bytes, int64_t deadline_ns);
// Waits for `events` (poll(2)) on one descriptor; false when the deadline passed first.
bool PollOne(int fd, short events, int64_t deadline_ns);
// The poll(2) timeout until then: rounded up, and at most a minute.
int PollTimeoutMs(int64_t deadline_ns);

}  // namespace shoal
