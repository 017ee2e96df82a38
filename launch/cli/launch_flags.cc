#include "launch/cli/launch_flags.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace shoal {

void AddLaunchFlags(FlagSet* flags, RawLaunchFlags* launch) {
  const auto add = [&](std::string name, std::string value, std::string help, char letter = 0) {
    flags->Add({.name = std::move(name),
                .value = std::move(value),
                .help = std::move(help),
                .letter = letter,
                .from_environment = true},
               &launch->values);
  };
  const bool elastic = launch->may_be_elastic;
  flags->Heading("Ranks (torchrun's names; each may also come from PET_<NAME> in the environment)");
  add("nproc-per-node", "N|auto",
      absl::StrCat("Ranks of this host; auto: one for each core that may be used. Default: ",
                   elastic ? "1." : "parallel.nproc_per_node."));
  add("nnodes", elastic ? "N|MIN:MAX" : "N", absl::StrCat("Hosts of the job. Run the same command on each.", elastic ? " MIN:MAX: they may come and go." : "",
                   " Default: 1."));
  add("node-rank", "R", "Which of the hosts this is, from 0. Default: 0.");
  add("rdzv-endpoint", "HOST[:PORT]",
      absl::StrCat("Where host 0 is reached. Default with several hosts: 127.0.0.1:29500",
                   elastic ? " (29400 unless static)" : "", "; with one, no port is used."));
  if (elastic) {
    add("rdzv-backend", "static|shoal|etcd",
        "static: a fixed number of ranks, each of which is told its number. shoal (or c10d): ranks join through a "
        "coordinator, and come and go; it is in the launcher of the host that the endpoint names. etcd: one is in every "
        "launcher, and etcd at the endpoint says which leads. Default: static.");
    add("max-restarts", "N", "Unless static: a rank that fails is started again at most so often. Default: 0.");
  } else {
    add("rdzv-backend", "static", "How hosts find each other. Default: static.");
  }
  add("rdzv-id", "ID", "Name of the job; ranks of another job are refused. Default: none.");
  add("master-addr", "HOST", "The host of --rdzv-endpoint, when that is not given. Default: 127.0.0.1.");
  add("master-port", "PORT", "The port of --rdzv-endpoint, when that is not given. Default: as there.");
  add("standalone", "", "One host, no port.");
  add("log-dir", "DIR",
      elastic ? "Where rank-N.log of each rank goes. Default: nowhere."
              : "Where rank-N.log of each rank goes. Default: logs in the run's folder.");
  flags->Heading("Accepted for torchrun's sake, without effect");
  if (!elastic) {
    add("max-restarts", "N", "A failed job is not restarted; --resume goes on from its last checkpoint.");
  }
  add("monitor-interval", "SECONDS", "The launcher hears of an ended rank at once.");
  add("local-addr", "HOST", "Ranks use the address that reaches the endpoint.");
  add("redirects", "WHAT", "All output of ranks but the first goes to its log.", 'r');
  add("tee", "WHAT", "Warnings and errors of all ranks reach the terminal.", 't');
  for (const char* name : {"rdzv-conf", "start-method", "role", "local-ranks-filter", "logs-specs",
                           "event-log-handler", "numa-binding", "signals-to-handle"}) {
    flags->Add({.name = name, .value = "VALUE", .from_environment = true, .hidden = true}, &launch->values);
  }
  flags->Add({.name = "no-python", .from_environment = true, .hidden = true}, &launch->values);
}

}  // namespace shoal
