// The coordinator of an elastic job, inside a launcher.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "collectives/membership/coordinator.h"
#include "launch/agent/agent_options.h"
#include "launch/agent/environment.h"

namespace shoal {

struct JobCoordinator {
  std::unique_ptr<CoordinatorServer> server;  // Null: it is in the launcher of another host.
  std::string address;                        // For the ranks, see ElasticRankVariables.
};

// `job` says the job's name and secret and where it meets (host and port, or unix:NAME). With etcd every launcher has a
// coordinator; otherwise the one that can listen at the endpoint, and the others leave it to that one. An epoch has the
// ranks of options.nnodes to options.nnodes_max hosts.
//
// UNAVAILABLE: the job has one host, and the endpoint cannot be listened at; or its name cannot be resolved.
absl::StatusOr<JobCoordinator> StartCoordinator(const AgentOptions& options, const RankEnvironment& job);

}  // namespace shoal
