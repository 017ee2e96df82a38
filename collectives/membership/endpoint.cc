#include "collectives/membership/endpoint.h"

#include "absl/strings/numbers.h"
#include "runtime/base/status.h"

namespace shoal {

absl::StatusOr<SocketAddress> ResolveEndpoint(std::string_view endpoint) {
  constexpr std::string_view kUnix = "unix:";
  if (endpoint.substr(0, kUnix.size()) == kUnix) return ResolveAddress(endpoint, 0);
  const auto unclear = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", AbslSv(endpoint), "\": want HOST:PORT, [IPV6]:PORT or unix:NAME"));
  };
  const size_t colon = endpoint.rfind(':');
  if (colon == std::string_view::npos) return unclear();
  std::string_view host = endpoint.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  int port = 0;
  if (host.empty() || (!bracketed && host.find(':') != std::string_view::npos) ||
      !absl::SimpleAtoi(AbslSv(endpoint.substr(colon + 1)), &port) || port < 0 || port > 65535) {
    return unclear();
  }
  return ResolveAddress(host, port);
}

std::string EndpointText(const std::string& ip, int port) {
  return ip.find(':') == std::string::npos ? absl::StrCat(ip, ":", port) : absl::StrCat("[", ip, "]:", port);
}

}  // namespace shoal
