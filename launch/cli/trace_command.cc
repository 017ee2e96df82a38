#include <algorithm>

#include "absl/strings/str_cat.h"
#include "launch/agent/agent.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/emulation_flags.h"
#include "launch/cli/flags.h"
#include "launch/cli/launch_flags.h"
#include "launch/config/config.h"
#include "launch/trainer/trace_run.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/device/cpu.h"

namespace shoal {
namespace {

struct TraceFlags {
  std::string config;
  std::vector<std::string> overrides;
  TraceOptions trace;
  EmulationFlags emulation;
  RawLaunchFlags launch;
};

// As a rank of a job that something has launched, or as the launcher of its ranks on this host.
absl::StatusOr<int> Trace(TraceFlags flags, const LoadedConfig& loaded, absl::Span<const std::string> args) {
  SHOAL_ASSIGN_OR_RETURN(const std::optional<RankEnvironment> environment, DetectEnvironment(ProcessEnv));
  if (environment.has_value()) {
    SetLogIdentity(absl::StrCat("rank ", environment->rank));
    SHOAL_RETURN_IF_ERROR(CheckParallel(loaded.config, loaded.positions, environment->world_size));
    if (flags.trace.path.empty()) flags.trace.path = loaded.config.run().name() + ".trace.json";
    flags.trace.device = flags.emulation.Device();
    SHOAL_RETURN_IF_ERROR(TraceRank(loaded, *environment, flags.trace));
    return kExitOk;
  }
  flags.launch.usable_cores = UsableCores();
  if (flags.launch.values.count("nproc-per-node") == 0) {
    flags.launch.values["nproc-per-node"] = absl::StrCat(loaded.config.parallel().nproc_per_node());
  }
  SHOAL_ASSIGN_OR_RETURN(AgentOptions agent, MakeAgentOptions(flags.launch));
  SHOAL_RETURN_IF_ERROR(CheckParallel(loaded.config, loaded.positions, agent.nnodes * agent.nproc_per_node));
  agent.more_threads_than_cores =
      agent.nproc_per_node * std::max(1, loaded.config.train().threads()) > flags.launch.usable_cores;
  std::vector<std::string> command = {SelfExecutable(), "trace"};
  command.insert(command.end(), args.begin(), args.end());
  return RunAgent(agent, command);
}

}  // namespace

int RunTrace(absl::Span<const std::string> args) {
  FlagSet flags("shoal trace",
                "Trains a configuration for a few steps, and writes when each task of the last ones ran on every rank, beside what "
                "was predicted from the steps before: a trace for ui.perfetto.dev. Prints where the time went and what tasks "
                "cost. Touches no run's folder. telemetry.trace_steps traces steps of a real run.");
  TraceFlags values;
  flags.AddPositional("CONFIG", "A YAML file, for example configs/bench-tiny.yaml.", &values.config);
  flags.Add({.name = "set", .value = "KEY=VALUE", .help = "Changes a key of the configuration. May be repeated."},
            &values.overrides);
  flags.Add({.name = "steps", .value = "N", .help = "Steps to train. The first says nothing of what tasks cost.", .min = 1}, &values.trace.steps);
  flags.Add({.name = "last", .value = "N", .help = "Steps of these to trace, the last ones.", .min = 1}, &values.trace.traced);
  flags.Add({.name = "output", .value = "FILE", .help = "Where to write the trace. Default: NAME.trace.json.", .letter = 'o'},
            &values.trace.path);
  AddEmulationFlags(&flags, &values.emulation);
  AddLaunchFlags(&flags, &values.launch);
  flags.Examples({"./shoal trace configs/bench-tiny.yaml --nproc-per-node 2 -o step.json"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto loaded = LoadConfig(values.config, values.overrides, Files::kMustExist);
  if (!loaded.ok()) return Fail(flags.command(), loaded.status());
  const auto code = Trace(std::move(values), *loaded, args);
  if (code.ok()) return *code;
  const int failure = Fail(flags.command(), code.status());
  return absl::IsAborted(code.status()) ? kExitPeerLost : failure;
}

}  // namespace shoal
