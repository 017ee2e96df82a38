#include <algorithm>

#include "absl/status/status.h"
#include "launch/agent/agent.h"
#include "launch/agent/environment.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/bench_commands.h"
#include "launch/cli/commands.h"
#include "launch/cli/emulation_flags.h"
#include "launch/cli/flags.h"
#include "launch/config/config.h"
#include "launch/trainer/bench.h"
#include "runtime/base/status.h"
#include "runtime/device/cpu.h"

namespace shoal {
namespace {

struct BenchTrainFlags {
  std::string config;
  std::vector<std::string> overrides;
  int64_t ranks = 1;
  int64_t warmup = 5;
  int64_t steps = 20;
  bool json = false;
  EmulationFlags emulation;
};

// As a rank of a job that something has launched, or as the launcher of its ranks on this host.
absl::StatusOr<int> BenchTrain(const BenchTrainFlags& flags, const LoadedConfig& loaded,
                               absl::Span<const std::string> args) {
  SHOAL_ASSIGN_OR_RETURN(std::optional<RankEnvironment> environment, DetectEnvironment(ProcessEnv));
  const int ranks = static_cast<int>(flags.ranks);
  if (!environment.has_value() && ranks > 1) {
    AgentOptions agent;
    agent.nproc_per_node = ranks;
    agent.more_threads_than_cores = ranks * std::max(1, loaded.config.train().threads()) > UsableCores();
    std::vector<std::string> command = {SelfExecutable(), "bench", "train"};
    command.insert(command.end(), args.begin(), args.end());
    return RunAgent(agent, command);
  }
  if (!environment.has_value()) environment.emplace();
  SHOAL_RETURN_IF_ERROR(CheckParallel(loaded.config, loaded.positions, environment->world_size));
  const BenchOptions options{.warmup = flags.warmup, .steps = flags.steps, .json = flags.json, .device = flags.emulation.Device()};
  SHOAL_RETURN_IF_ERROR(BenchRank(loaded, *environment, options));
  return kExitOk;
}

int RunBenchTrain(absl::Span<const std::string> args) {
  FlagSet flags("shoal bench train",
                "Trains a configuration for some steps and prints tokens/s, GFLOP/s and the share of the "
                "machine's measured GEMM "
                "peak, with median and spread over steps, and the peak memory of a rank. Writes no files.");
  BenchTrainFlags values;
  flags.AddPositional("CONFIG", "A YAML file, for example configs/bench-tiny.yaml.", &values.config);
  flags.Add({.name = "set",
             .value = "KEY=VALUE",
             .help = "Changes a key, for example train.precision=bf16. May be repeated."},
            &values.overrides);
  flags.Add({.name = "nproc-per-node", .value = "N", .help = "Ranks, all on this host.", .min = 1},
            &values.ranks);
  flags.Add({.name = "warmup", .value = "N", .help = "Steps before the measured ones.", .min = 0},
            &values.warmup);
  flags.Add({.name = "steps", .value = "N", .help = "Measured steps.", .min = 1}, &values.steps);
  flags.Add({.name = "json", .help = "Prints one line of JSON instead of a table."}, &values.json);
  AddEmulationFlags(&flags, &values.emulation);
  flags.Examples(
      {"./shoal bench train configs/bench-tiny.yaml --nproc-per-node 2 --set train.precision=bf16"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto loaded = LoadConfig(values.config, values.overrides, Files::kMustExist);
  if (!loaded.ok()) return Fail(flags.command(), loaded.status());
  const auto code = BenchTrain(values, *loaded, args);
  return code.ok() ? *code : Fail(flags.command(), code.status());
}

}  // namespace

int RunBench(absl::Span<const std::string> args) {
  const std::vector<Command> commands = {
      {"train", "measure training steps", RunBenchTrain},
      {"collectives", "measure collective operations, beside other libraries", RunBenchCollectives}};
  const std::string help = CommandsHelp("shoal bench", "Measures speed.", commands);
  return Dispatch("shoal bench", help, commands, args);
}

}  // namespace shoal
