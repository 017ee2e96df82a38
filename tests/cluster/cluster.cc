#include "tests/cluster/cluster.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "tests/cluster/member.h"

namespace shoal {
namespace {

constexpr char kJob[] = "cluster";
constexpr char kSecret[] = "s3cret";
constexpr int kPort = 29400;  // Of a host that nobody else has.

}  // namespace

absl::StatusOr<std::unique_ptr<Cluster>> Cluster::Create(const Options& options) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<testing::NetworkHosts> network,
                         testing::NetworkHosts::Create(options.hosts));
  return std::unique_ptr<Cluster>(new Cluster(options, std::move(network)));
}

Cluster::Cluster(const Options& options, std::unique_ptr<testing::NetworkHosts> network)
    : options_(options),
      network_(std::move(network)),
      address_(absl::StrCat(network_->Address(options.coordinator_host), ":", kPort)) {}

void Cluster::StartCoordinator() {
  coordinator_.reset();
  coordinator_ = std::make_unique<Child>([this](Child::Parent& parent) {
    SHOAL_CHECK_OK(network_->Enter(options_.coordinator_host));
    CoordinatorServerOptions options;
    options.core.size_min = options_.size_min;
    options.core.heartbeat_timeout = options_.heartbeat_timeout;
    options.listen = address_;
    options.job_id = kJob;
    options.secret = kSecret;
    absl::StatusOr<std::unique_ptr<CoordinatorServer>> server = CoordinatorServer::Start(options);
    SHOAL_CHECK(server.ok()) << server.status().ToString();
    parent.Say("listens");
    while (parent.Hear(absl::Hours(1)).empty()) pause();
  });
  SHOAL_CHECK(coordinator_->Line() == "listens");
}

std::unique_ptr<Child> Cluster::StartMember(int host) const {
  return std::make_unique<Child>([this, host](Child::Parent& parent) {
    parent.Say(absl::StrCat("began ", NowNs()));
    SHOAL_CHECK_OK(network_->Enter(host));
    MembershipOptions options;
    options.coordinators = {address_};
    options.heartbeat_interval = std::min(absl::Milliseconds(100), options_.heartbeat_timeout / 5);
    options.world.job_id = kJob;
    options.world.secret = kSecret;
    options.world.transport = options_.transport;
    options.world.heartbeat_timeout = options_.heartbeat_timeout;
    options.world.timeout = absl::Seconds(60);
    absl::StatusOr<std::unique_ptr<Membership>> membership = Membership::Join(options);
    if (!membership.ok()) return parent.Say(absl::StrCat("wrong: ", membership.status().ToString()));
    LiveInCluster(**membership, parent);
    membership->reset();
    parent.Say("left");
  });
}

}  // namespace shoal
