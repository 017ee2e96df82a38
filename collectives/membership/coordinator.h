// The coordinator as a server: sockets around coordinator_core.h. One thread of its own.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "collectives/membership/coordinator_core.h"

namespace shoal {

struct CoordinatorServerOptions {
  CoordinatorOptions core;
  // HOST:PORT (port 0: chosen) or unix:NAME. Empty, with etcd: the address that reaches it, any port.
  std::string listen = "127.0.0.1:0";
  std::string job_id = "none";
  std::string secret;
  // etcd endpoints HOST:PORT; empty: none. Several coordinators stand by, one leads.
  std::vector<std::string> etcd;
};

class CoordinatorServer {
 public:
  // UNAVAILABLE: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<CoordinatorServer>> Start(const CoordinatorServerOptions& options);
  virtual ~CoordinatorServer() = default;
  // As members dial it. One that listens on every interface tells etcd the address that reaches it.
  virtual std::string address() const = 0;
};

}  // namespace shoal
