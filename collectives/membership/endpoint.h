// Where somebody listens, as people write it: HOST:PORT, [IPV6]:PORT or unix:NAME.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"

namespace shoal {

// INVALID_ARGUMENT repeats the text and says what is wanted; UNAVAILABLE: the name cannot be resolved. Blocks for as long
// as the resolver does, unless the host is a numeric address.
absl::StatusOr<SocketAddress> ResolveEndpoint(std::string_view endpoint);
// "10.0.0.1:80", "[::1]:80"; `ip` numeric.
std::string EndpointText(const std::string& ip, int port);

}  // namespace shoal
