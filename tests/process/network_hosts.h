// Two hosts on this machine: network namespaces with a cable between them. Needs root and iproute2.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal::testing {

class NetworkHosts {
 public:
  // FAILED_PRECONDITION: the kernel or the container does not let us.
  static absl::StatusOr<std::unique_ptr<NetworkHosts>> Create();
  ~NetworkHosts();  // Removes both.
  NetworkHosts(const NetworkHosts&) = delete;
  NetworkHosts& operator=(const NetworkHosts&) = delete;

  // `command` as it is run on host 0 or 1.
  std::vector<std::string> On(int host, std::vector<std::string> command) const;
  std::string Address(int host) const;

 private:
  NetworkHosts() = default;
  std::string names_[2];
};

}  // namespace shoal::testing
