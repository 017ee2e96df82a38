#include "collectives/membership/doors.h"

#include <ifaddrs.h>
#include <netinet/in.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <random>

#include "absl/strings/str_format.h"
#include "collectives/membership/endpoint.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string HostName() {
  char name[HOST_NAME_MAX + 1] = "";
  (void)gethostname(name, sizeof name - 1);
  return name;
}

// The addresses of the network interface of that name, or the one address that is written there.
absl::StatusOr<std::vector<SocketAddress>> LocalAddresses(const std::string& interface) {
  std::vector<SocketAddress> addresses;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return ErrnoStatus(errno, "getifaddrs");
  for (const ifaddrs* at = all; at != nullptr; at = at->ifa_next) {
    const int family = at->ifa_addr == nullptr ? AF_UNSPEC : at->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    SocketAddress address;
    address.length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&address.storage, at->ifa_addr, address.length);
    if (interface == at->ifa_name || interface == address.Ip()) addresses.push_back(address);
  }
  freeifaddrs(all);
  if (addresses.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("interface '", interface, "': no network interface or address of this host"));
  }
  return addresses;
}

}  // namespace

uint64_t RandomNumber() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

std::vector<int> Doors::Listeners() const {
  std::vector<int> fds;
  if (unix_listener.valid()) fds.push_back(unix_listener.get());
  if (tcp_listener.valid()) fds.push_back(tcp_listener.get());
  return fds;
}

absl::StatusOr<Doors> OpenDoors(const std::string& transport, const std::string& interface,
                                const SocketAddress& towards) {
  Doors doors;
  if (transport == "auto") {
    doors.unix_name = absl::StrFormat("shoal-%016x%016x", RandomNumber(), RandomNumber());
    SHOAL_ASSIGN_OR_RETURN(const SocketAddress address, ResolveAddress("unix:" + doors.unix_name, 0));
    SHOAL_ASSIGN_OR_RETURN(doors.unix_listener, Listen(address));
  }
  if (towards.family() != AF_UNIX || transport == "tcp" || !interface.empty()) {
    const int family = towards.family() == AF_INET6 ? AF_INET6 : AF_INET;
    const bool here = towards.IsLoopback() && interface.empty();
    SHOAL_ASSIGN_OR_RETURN(doors.tcp_listener, Listen(AnyAddress(family, here)));
    doors.port = LocalAddressOf(doors.tcp_listener.get()).port();
  }
  return doors;
}

absl::StatusOr<std::vector<std::string>> OwnEndpoints(const Doors& doors, const std::string& interface,
                                                      const SocketAddress& local) {
  std::vector<std::string> endpoints;
  if (interface.empty()) {
    endpoints.push_back(EndpointText(local.family() == AF_UNIX ? "127.0.0.1" : local.Ip(), doors.port));
    return endpoints;
  }
  SHOAL_ASSIGN_OR_RETURN(const std::vector<SocketAddress> addresses, LocalAddresses(interface));
  const int family = LocalAddressOf(doors.tcp_listener.get()).family();
  for (const SocketAddress& address : addresses) {
    if (address.family() == family) endpoints.push_back(EndpointText(address.Ip(), doors.port));
  }
  if (endpoints.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("interface '", interface, "' has no address of the family that "
                                                   "the job meets in"));
  }
  return endpoints;
}

MemberInfo DescribeSelf(const Doors& doors) {
  MemberInfo info;
  info.id = RandomNumber();
  info.pid = getpid();
  info.host_name = HostName();
  info.unix_name = doors.unix_name;
  if (!doors.unix_name.empty()) info.boot = FirstLine("/proc/sys/kernel/random/boot_id");
  return info;
}

}  // namespace shoal
