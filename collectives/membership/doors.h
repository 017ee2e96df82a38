// Where one process listens for its peers, for all of its epochs, and what it tells others about itself.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/membership/view.h"
#include "collectives/transport/socket.h"

namespace shoal {

struct Doors {
  Fd unix_listener;  // Transport auto alone.
  Fd tcp_listener;   // Invalid when all peers are on this host and share memory.
  std::string unix_name;
  int port = 0;

  std::vector<int> Listeners() const;
};

// `towards`: where the job meets. Processes that meet at a name of one host, or at its loopback address, are all there:
// nothing is opened to the network, unless an `interface` is chosen.
absl::StatusOr<Doors> OpenDoors(const std::string& transport, const std::string& interface,
                                const SocketAddress& towards);

// Where peers of other hosts find the TCP door: at all addresses of `interface`, or, when that is empty, at the address
// of `local`, a socket's own end towards the place where the job meets.
absl::StatusOr<std::vector<std::string>> OwnEndpoints(const Doors& doors, const std::string& interface,
                                                      const SocketAddress& local);

// Everything but the addresses and the wanted rank. A new id at each call.
MemberInfo DescribeSelf(const Doors& doors);

uint64_t RandomNumber();

}  // namespace shoal
