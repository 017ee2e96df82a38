// What the launcher's flags (torchrun's names and defaults, so that known command lines work) mean here.
// Pure.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

// What was written, by flag name with dashes and without "--", for example {"nnodes", "2"}. Nothing is judged
// yet.
struct RawLaunchFlags {
  std::map<std::string, std::string> values;
  int usable_cores = 1;  // Of this process: what `auto` and `cpu` mean. From UsableCores().
  bool may_be_elastic = false;  // The ranks can be a program that joins through a coordinator.
};

struct AgentOptions {
  int nproc_per_node = 1;  // The same on every host.
  int nnodes = 1;
  int node_rank = 0;
  // Where rank 0 listens, "HOST:PORT". Empty: one host, and the ranks meet at a unix socket with a random
  // name.
  std::string rdzv_endpoint;
  std::string rdzv_id;  // Empty on one host: a random one.
  // The ranks join and leave through a coordinator, which is in the launcher that can listen at rdzv_endpoint; with `etcd`
  // there is one in every launcher, and etcd says which leads.
  bool elastic = false;
  int nnodes_max = 1;             // As nnodes unless elastic.
  int max_restarts = 0;           // Of each rank of this host; elastic jobs only.
  std::vector<std::string> etcd;  // HOST:PORT each.
  // rank-N.log of each rank of this host is appended to in here. Created. Empty: no log files.
  std::string log_dir;
  // The ranks of this host have more threads than it has cores for. They get OMP_WAIT_POLICY=passive then,
  // unless the user has set that or GOMP_SPINCOUNT: OpenMP's idle threads spin, and would keep the cores from
  // the others.
  bool more_threads_than_cores = false;
  absl::Duration stopped_timeout = absl::Seconds(3);  // A rank stopped for so long (SIGSTOP) has failed.
  // After the first rank that says "peer lost": how long the launcher waits for the rank that caused it to
  // end.
  absl::Duration settle_time = absl::Seconds(1);
  absl::Duration grace_time = absl::Seconds(5);  // Between the signal that ends the ranks and SIGKILL.
  // The same when the launcher was told by SIGTERM to end: time to save. As torchrun and Slurm (KillWait) give by default.
  absl::Duration save_time = absl::Seconds(30);
  std::vector<std::string> warnings;             // About flags that mean nothing here. RunAgent prints them.
};

// INVALID_ARGUMENT names the flag and says what would be accepted. UNIMPLEMENTED: accelerators, other rendezvous
// backends; elastic jobs ("--nnodes=1:4", "--rdzv-backend=shoal") of programs that cannot be.
absl::StatusOr<AgentOptions> MakeAgentOptions(const RawLaunchFlags& flags);

}  // namespace shoal
