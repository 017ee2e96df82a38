#include "collectives/transport/socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr std::string_view kUnixPrefix = "unix:";

void SetOptions(int fd, int family) {
  if (family == AF_UNIX) return;
  const int on = 1;
  (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

absl::StatusOr<Fd> NewSocket(int family) {
  Fd fd(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  SetOptions(fd.get(), family);
  return fd;
}

absl::Status Closed() { return absl::UnavailableError("connection closed"); }

}  // namespace

void Fd::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

int SocketAddress::port() const {
  if (family() == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
  if (family() == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  return 0;
}

std::string SocketAddress::Ip() const {
  char text[NI_MAXHOST] = "";
  if (family() == AF_UNIX) return "";
  (void)getnameinfo(reinterpret_cast<const sockaddr*>(&storage), length, text, sizeof text, nullptr, 0,
                    NI_NUMERICHOST);
  return text;
}

bool SocketAddress::IsAny() const {
  if (family() == AF_INET) return reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr.s_addr == INADDR_ANY;
  return family() == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr);
}

bool SocketAddress::IsLoopback() const {
  if (family() == AF_UNIX) return true;
  if (family() == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr.s_addr) >> 24) == 127;
  }
  const in6_addr& address = reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&address) || (IN6_IS_ADDR_V4MAPPED(&address) && address.s6_addr[12] == 127);
}

std::string SocketAddress::ToString() const {
  if (family() == AF_UNIX) {
    const auto* address = reinterpret_cast<const sockaddr_un*>(&storage);
    const size_t skip = offsetof(sockaddr_un, sun_path) + 1;
    return length <= skip ? "unix:"
                          : absl::StrCat("unix:", std::string(address->sun_path + 1, length - skip));
  }
  return family() == AF_INET6 ? absl::StrCat("[", Ip(), "]:", port()) : absl::StrCat(Ip(), ":", port());
}

absl::StatusOr<SocketAddress> ResolveAddress(std::string_view host, int port) {
  SocketAddress result;
  if (host.substr(0, kUnixPrefix.size()) == kUnixPrefix) {
    const std::string_view name = host.substr(kUnixPrefix.size());
    auto* address = reinterpret_cast<sockaddr_un*>(&result.storage);
    if (name.empty() || name.size() + 1 > sizeof address->sun_path) {
      return absl::InvalidArgumentError(absl::StrCat("unix socket name of ", name.size(), " bytes"));
    }
    address->sun_family = AF_UNIX;
    std::memcpy(address->sun_path + 1, name.data(), name.size());
    result.length = offsetof(sockaddr_un, sun_path) + 1 + name.size();
    return result;
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(std::string(host).c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0 || found == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot resolve ", AbslSv(host), ": ", gai_strerror(error)));
  }
  std::memcpy(&result.storage, found->ai_addr, found->ai_addrlen);
  result.length = found->ai_addrlen;
  freeaddrinfo(found);
  return result;
}

SocketAddress AnyAddress(int family, bool loopback_only) {
  SocketAddress result;
  if (family == AF_INET6) {
    auto* address = reinterpret_cast<sockaddr_in6*>(&result.storage);
    address->sin6_family = AF_INET6;
    address->sin6_addr = loopback_only ? in6addr_loopback : in6addr_any;
    result.length = sizeof *address;
  } else {
    auto* address = reinterpret_cast<sockaddr_in*>(&result.storage);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(loopback_only ? INADDR_LOOPBACK : INADDR_ANY);
    result.length = sizeof *address;
  }
  return result;
}

absl::StatusOr<Fd> Listen(const SocketAddress& address) {
  SHOAL_ASSIGN_OR_RETURN(Fd fd, NewSocket(address.family()));
  const int on = 1;
  (void)setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 ||
      listen(fd.get(), SOMAXCONN) != 0) {
    return ErrnoStatus(errno, absl::StrCat("listen on ", address.ToString()));
  }
  return fd;
}

absl::StatusOr<Fd> Dial(const SocketAddress& address, int64_t deadline_ns) {
  SHOAL_ASSIGN_OR_RETURN(Fd fd, NewSocket(address.family()));
  int error = 0;
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0)
    error = errno;
  if (error == EINPROGRESS) {
    if (!PollOne(fd.get(), POLLOUT, deadline_ns)) {
      return absl::DeadlineExceededError(absl::StrCat("dial ", address.ToString(), ": no answer"));
    }
    socklen_t length = sizeof error;
    (void)getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  }
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat("dial ", address.ToString(), ": ", std::strerror(error)));
  }
  return fd;
}

absl::StatusOr<Fd> Accept(int listener) {
  while (true) {
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.valid()) {
      SetOptions(fd.get(), LocalAddressOf(fd.get()).family());
      return fd;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return Fd();
    // The other end may have given up already; the listener is still good.
    if (errno != EINTR && errno != ECONNABORTED) return ErrnoStatus(errno, "accept");
  }
}

void SendUrgently(int fd) {
  // linux/pkt_sched.h: TC_PRIO_INTERACTIVE, the highest that needs no privilege. The type of service may set it, too.
  const int type_of_service = IPTOS_LOWDELAY, priority = 6;
  (void)setsockopt(fd, IPPROTO_IP, IP_TOS, &type_of_service, sizeof type_of_service);
  (void)setsockopt(fd, IPPROTO_IPV6, IPV6_TCLASS, &type_of_service, sizeof type_of_service);
  (void)setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &priority, sizeof priority);
}

absl::StatusOr<SocketAddress> LocalAddressTowards(const SocketAddress& remote) {
  const Fd fd(socket(remote.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&remote.storage), remote.length) != 0) {
    return absl::UnavailableError(absl::StrCat("no route to ", remote.ToString(), ": ", std::strerror(errno)));
  }
  return ResolveAddress(LocalAddressOf(fd.get()).Ip(), 0);
}

SocketAddress LocalAddressOf(int fd) {
  SocketAddress address;
  address.length = sizeof address.storage;
  (void)getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address;
}

SocketAddress PeerAddressOf(int fd) {
  SocketAddress address;
  address.length = sizeof address.storage;
  (void)getpeername(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address;
}

int PollTimeoutMs(int64_t deadline_ns) {
  const int64_t left_ns = deadline_ns - NowNs();
  return static_cast<int>(std::clamp<int64_t>((left_ns + 999'999) / 1'000'000, 0, 60'000));
}

bool PollOne(int fd, short events, int64_t deadline_ns) {
  while (true) {
    pollfd entry = {fd, events, 0};
    const int ready = poll(&entry, 1, PollTimeoutMs(deadline_ns));
    if (ready > 0) return true;
    if (NowNs() >= deadline_ns) return false;
  }
}

absl::Status SendAll(int fd, const void* data, size_t bytes, int64_t deadline_ns) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = send(fd, next, bytes, MSG_NOSIGNAL);
    if (sent >= 0) {
      next += sent;
      bytes -= sent;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!PollOne(fd, POLLOUT, deadline_ns))
        return absl::DeadlineExceededError("send: the peer does not read");
    } else if (errno != EINTR) {
      return absl::UnavailableError(absl::StrCat("send: ", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(int fd, void* data, size_t bytes, int64_t deadline_ns) {
  char* next = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = recv(fd, next, bytes, 0);
    if (got == 0) return Closed();
    if (got > 0) {
      next += got;
      bytes -= got;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!PollOne(fd, POLLIN, deadline_ns)) return absl::DeadlineExceededError("receive: no answer");
    } else if (errno != EINTR) {
      return absl::UnavailableError(absl::StrCat("receive: ", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

}  // namespace shoal
