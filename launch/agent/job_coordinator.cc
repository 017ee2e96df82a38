#include "launch/agent/job_coordinator.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "collectives/membership/endpoint.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {

absl::StatusOr<JobCoordinator> StartCoordinator(const AgentOptions& options, const RankEnvironment& job) {
  JobCoordinator result;
  CoordinatorServerOptions server;
  server.core.size_min = options.nnodes * options.nproc_per_node;
  server.core.size_max = options.nnodes_max * options.nproc_per_node;
  server.job_id = job.job_id;
  server.secret = job.job_secret;
  server.etcd = options.etcd;
  if (!options.etcd.empty()) {
    server.listen = "";
    result.address = absl::StrCat("etcd:", absl::StrJoin(options.etcd, ","));
  } else {
    server.listen = job.master_port == 0 ? job.master_host : EndpointText(job.master_host, job.master_port);
    result.address = server.listen;
    SHOAL_RETURN_IF_ERROR(ResolveEndpoint(server.listen).status(), "rendezvous endpoint");
  }
  absl::StatusOr<std::unique_ptr<CoordinatorServer>> started = CoordinatorServer::Start(server);
  if (started.ok()) {
    result.server = *std::move(started);
    return result;
  }
  if (!options.etcd.empty() || options.nnodes_max == 1) return started.status();
  SHOAL_LOG(kInfo) << "the launcher of another host coordinates the job at " << result.address << "; this one could not ("
                   << started.status().message() << ")";
  return result;
}

}  // namespace shoal
