// The launcher's flags: torchrun's names and defaults, so that known command lines work, and what they mean
// here. Pure.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "launch/agent/environment.h"

namespace shoal {

// What was written, by flag name with dashes and without "--", for example {"nnodes", "2"}. Nothing is judged
// yet.
struct RawLaunchFlags {
  std::map<std::string, std::string> values;
  int usable_cores = 1;  // Of this process: what `auto` and `cpu` mean. From UsableCores().
};

// Takes args[*index] (and the value after it) if it is a launcher flag: true, and *index is behind it. False:
// it is not one. "--nnodes 2", "--nnodes=2" and "--node_rank 1" all do. INVALID_ARGUMENT: a flag without its
// value.
absl::StatusOr<bool> TakeLaunchFlag(absl::Span<const std::string> args, size_t* index, RawLaunchFlags* flags);

// Adds PET_NNODES, PET_NPROC_PER_NODE, ... for flags that were not written, as torchrun does.
void AddPetVariables(const GetEnv& getenv, RawLaunchFlags* flags);

// One line per flag that means something here, for `shoal help train`.
std::string LaunchFlagsHelp();

struct AgentOptions {
  int nproc_per_node = 1;  // The same on every host.
  int nnodes = 1;
  int node_rank = 0;
  // Where rank 0 listens, "HOST:PORT". Empty: one host, and the ranks meet at a unix socket with a random
  // name.
  std::string rdzv_endpoint;
  std::string rdzv_id;  // Empty on one host: a random one.
  // rank-N.log of each rank of this host is appended to in here. Created. Empty: no log files.
  std::string log_dir;
  absl::Duration stopped_timeout = absl::Seconds(3);  // A rank stopped for so long (SIGSTOP) has failed.
  // After the first rank that says "peer lost": how long the launcher waits for the rank that caused it to
  // end.
  absl::Duration settle_time = absl::Seconds(1);
  absl::Duration grace_time = absl::Seconds(5);  // Between SIGTERM and SIGKILL.
  std::vector<std::string> warnings;             // About flags that mean nothing here. RunAgent prints them.
};

// INVALID_ARGUMENT names the flag and says what would be accepted. UNIMPLEMENTED: elastic jobs
// ("--nnodes=1:4"), accelerators, other rendezvous backends than static.
absl::StatusOr<AgentOptions> MakeAgentOptions(const RawLaunchFlags& flags);

}  // namespace shoal
