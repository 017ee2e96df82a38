// Hosts on this machine: network namespaces whose cables (eth0) meet in a switch, a namespace of its own.
// Cables can be pulled, interfaces taken down, limited to a rate, and frames lost from one host to another. Needs
// root and iproute2. tests/cluster/emulate makes the same for the command line, with the same parameters.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal::testing {

class NetworkHosts {
 public:
  static constexpr int kSwitch = -1;  // As a host: the switch itself has an address too.

  // FAILED_PRECONDITION: the kernel or the container does not let us.
  static absl::StatusOr<std::unique_ptr<NetworkHosts>> Create(int hosts = 2);
  ~NetworkHosts();  // Removes all of them. Processes in them lose nothing but the others.
  NetworkHosts(const NetworkHosts&) = delete;
  NetworkHosts& operator=(const NetworkHosts&) = delete;

  int hosts() const { return static_cast<int>(cables_.size()); }
  // `command` as it is run on `host`.
  std::vector<std::string> On(int host, std::vector<std::string> command) const;
  // Moves the calling thread, and what it forks, to `host`, with "host-N" or "switch" as its host name.
  absl::Status Enter(int host) const;
  std::string Address(int host) const;

  // kPulled: the other end of the cable is down; what is sent vanishes. kDown: eth0 itself is; sending fails
  // at once.
  enum class Cable : uint8_t { kUp, kPulled, kDown };
  absl::Status SetCable(int host, Cable cable);
  // What a host sends and what it receives, each by itself; 0: as fast as the machine moves bytes. Also while
  // connections are busy. FAILED_PRECONDITION: the kernel has no token buckets (tbf).
  absl::Status SetRate(int host, int64_t bits_per_second);
  // Whether what `from` sends reaches `to`; nothing tells either of them.
  enum class Path : uint8_t { kOpen, kCut };
  absl::Status SetPath(int from, int to, Path path);
  // Whether frames from one host reach another, as set above.
  bool Reaches(int from, int to) const;

 private:
  explicit NetworkHosts(int hosts);
  absl::Status Build();
  std::string Name(int host) const;
  absl::Status ApplyPath(int from, int to) const;
  absl::Status ApplyRoute(int host) const;

  std::vector<Cable> cables_;             // By host.
  std::vector<std::vector<Path>> paths_;  // From, to.
  std::vector<std::string> made_;         // Names of namespaces.
};

}  // namespace shoal::testing
