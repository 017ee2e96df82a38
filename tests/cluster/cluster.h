// An elastic job across hosts that are network namespaces: a coordinator and members, forked from this
// process (which must have no other threads) onto the hosts.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tests/harness/elastic.h"
#include "tests/process/network_hosts.h"

namespace shoal {

class Cluster {
 public:
  struct Options {
    int hosts = 4;
    int coordinator_host = testing::NetworkHosts::kSwitch;
    int size_min = 1;
    absl::Duration heartbeat_timeout = absl::Seconds(1);
    std::string transport = "auto";
  };

  // FAILED_PRECONDITION: no network namespaces here.
  static absl::StatusOr<std::unique_ptr<Cluster>> Create(const Options& options);

  testing::NetworkHosts& network() { return *network_; }
  const Options& options() const { return options_; }
  // At the same address each time. Returns once it listens.
  void StartCoordinator();
  Child& coordinator() { return *coordinator_; }
  // A process that joins and goes on as LiveInCluster. Says "began T" (NowNs()), and "left" at its polite
  // end.
  std::unique_ptr<Child> StartMember(int host) const;

 private:
  Cluster(const Options& options, std::unique_ptr<testing::NetworkHosts> network);

  const Options options_;
  const std::unique_ptr<testing::NetworkHosts> network_;
  const std::string address_;
  std::unique_ptr<Child> coordinator_;
};

}  // namespace shoal
