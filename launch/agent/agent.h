// The launcher: starts the ranks of this host, watches them, ends them all when one fails, and says in one
// message which one it was. Hides processes, pipes, signals and deadlines.
#pragma once

#include <string>

#include "absl/types/span.h"
#include "launch/agent/agent_options.h"

namespace shoal {

// Starts options.nproc_per_node times `command` (the argv of a rank; argv[0] from SelfExecutable()), each
// with the variables that DetectEnvironment understands (or ElasticRankVariables), and blocks until all have ended.
// Call it from main(), on a thread that ends with the process, with no other children. Prints to stderr; rank 0 (of an
// elastic job: the first rank of every host) has our stdout.
//
// Returns the exit code for the process: kExitOk; kExitFailure when a rank did not end with 0 (or none could
// be started); 128 + signal when SIGINT, SIGTERM, SIGHUP or SIGQUIT ended the job (it is passed on to every
// rank once; a second one kills them at once), also when a rank got it first, ended in order and says so by that
// exit code. SIGUSR1 and SIGUSR2 are passed on. No rank outlives the launcher, kill -9 included.
//
// In an elastic job a rank that failed is started again, options.max_restarts times; the next time counts as a failure
// of this host. The coordinator that may be in here ends with it.
//
// After the first failure the other ranks get SIGTERM, after options.grace_time SIGKILL (after a SIGTERM to the launcher,
// options.save_time); a rank that stays
// stopped for options.stopped_timeout has failed. OMP_NUM_THREADS is left alone: the trainer sets its own
// threads; how idle ones wait is set where they are too many (AgentOptions).
int RunAgent(const AgentOptions& options, absl::Span<const std::string> command);

// The running program's file, to start again as a rank.
std::string SelfExecutable();

}  // namespace shoal
