// Which rank of which job this process is, as told by whatever launched it: Shoal's own launcher, torchrun,
// mpirun, another PMI launcher or srun. Hides their variables, which of them wins, and where the ranks meet.
// Pure: the environment comes in as a function.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

struct RankEnvironment {
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;        // Among the ranks of this host.
  int local_world_size = 1;  // Ranks on this host.
  int node_rank =
      0;  // Where the launcher does not tell (mpirun): worked out as if all hosts had as many ranks.
  int nodes = 1;
  std::string source = "single process";  // Or "SHOAL", "torchrun", "Open MPI", "PMI", "Slurm".
  std::string master_host;      // For WorldOptions: a name, an address, or "unix:NAME". May be empty when
                                // world_size is 1.
  int master_port = 0;          // 0 with unix:NAME.
  std::string job_id = "none";  // Equal on all ranks of a job. "none" if the launcher gives no name.
  std::string job_secret;       // Equal on all ranks; "": processes that know the job id may join.

  friend bool operator==(const RankEnvironment&, const RankEnvironment&) = default;
};

using GetEnv = std::function<std::optional<std::string>(std::string_view name)>;

// nullopt: nothing launched this process, it is on its own. The first complete source wins:
//   1. SHOAL_RANK, SHOAL_WORLD_SIZE (and SHOAL_LOCAL_RANK with SHOAL_LOCAL_WORLD_SIZE, SHOAL_NODE_RANK,
//   SHOAL_NODES)
//   2. RANK, WORLD_SIZE, LOCAL_RANK (and LOCAL_WORLD_SIZE, GROUP_RANK, GROUP_WORLD_SIZE)      torchrun
//   3. OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}                                       Open MPI
//   4. PMI_SIZE with PMI_RANK or PMIX_RANK, MPI_LOCALRANKID, MPI_LOCALNRANKS                   PMI
//   5. SLURM_PROCID, ... in a step with more than one task (a batch script is not a rank)      Slurm
// The ranks meet at SHOAL_MASTER ("HOST:PORT" or "unix:NAME"), or at MASTER_ADDR:MASTER_PORT (the port above
// under TORCHELASTIC_USE_AGENT_STORE=True: torchrun's own store holds that one), or, all on one host, at a
// unix socket named after source and job, or, under Slurm, on the step's first host at a port in [20000,
// 29000) made from job and step. SHOAL_RUN_ID replaces the job id of any source; SHOAL_JOB_SECRET is the secret.
//
// INVALID_ARGUMENT names the variables: a set is incomplete, a value is no number or out of range, or two
// sources disagree on the world size. FAILED_PRECONDITION: nothing says where the ranks of several hosts
// meet; or this is a rank of an elastic job (SHOAL_COORDINATOR), which has no number before it has joined.
absl::StatusOr<std::optional<RankEnvironment>> DetectEnvironment(const GetEnv& getenv);

// The process's own environment.
std::optional<std::string> ProcessEnv(std::string_view name);

// The inverse: what a launcher exports for one rank. SHOAL's names, and torchrun's for programs that know
// only those.
std::vector<std::pair<std::string, std::string>> RankVariables(const RankEnvironment& rank);

// What a launcher exports for one rank of an elastic job, which joins through `coordinator` (as
// collectives/membership/membership.h has it): where that is, the job, the place on this host, and that this is the start
// number `restarts` of it. Its number and that of all ranks are found by joining.
std::vector<std::pair<std::string, std::string>> ElasticRankVariables(const RankEnvironment& rank,
                                                                      const std::string& coordinator, int restarts,
                                                                      int restarts_max);

struct HostPort {
  std::string host;  // Without brackets.
  int port = 0;
};
// "HOST", "HOST:PORT" or "[V6]:PORT"; `port_default` where there is none. INVALID_ARGUMENT repeats the text.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text, int port_default);

}  // namespace shoal
