#include "launch/agent/agent.h"
#include "launch/agent/agent_options.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/cli/launch_flags.h"
#include "runtime/device/cpu.h"

namespace shoal {

int RunLaunch(absl::Span<const std::string> args) {
  FlagSet flags("shoal launch",
                "Starts a program once per rank, watches the ranks, and ends them all with one verdict when one fails, as "
                "torchrun does. Each is told its place in SHOAL_RANK, SHOAL_WORLD_SIZE, ... and in torchrun's variables. "
                "With --rdzv-backend=shoal or etcd the job is elastic: ranks are told SHOAL_COORDINATOR and join there "
                "(shoal_join, Membership::Join); one that fails is started again, while the others go on.");
  RawLaunchFlags launch;
  launch.usable_cores = UsableCores();
  launch.may_be_elastic = true;
  std::vector<std::string> command;
  flags.AddCommand("PROGRAM", "What a rank runs, and its arguments.", &command);
  AddLaunchFlags(&flags, &launch);
  flags.Examples({"./shoal launch --nproc-per-node 4 ./program --its-own-flag",
                  "./shoal launch --nproc-per-node 4 --rdzv-backend shoal --max-restarts 3 ./elastic_sums 30",
                  "./shoal launch --nnodes 2:8 --rdzv-backend shoal --rdzv-endpoint host0:29400 ./program     # on each host"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto options = MakeAgentOptions(launch);
  if (!options.ok()) return Fail(flags.command(), options.status());
  return RunAgent(*options, command);
}

}  // namespace shoal
