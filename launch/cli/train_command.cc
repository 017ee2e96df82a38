#include <algorithm>
#include <csignal>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/agent.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/cli/launch_flags.h"
#include "launch/config/config.h"
#include "launch/trainer/train.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/device/cpu.h"

namespace shoal {
namespace {

struct TrainFlags {
  std::string config;
  std::vector<std::string> overrides;
  std::string output_dir;
  bool resume = false;
  RawLaunchFlags launch;
};

void AddTrainFlags(FlagSet* flags, TrainFlags* values) {
  flags->AddPositional("CONFIG", "A YAML file, for example configs/quickstart.yaml.", &values->config);
  flags->Add({.name = "set",
              .value = "KEY=VALUE",
              .help = "Changes a key of the configuration, for example train.steps=200. May be repeated."},
             &values->overrides);
  flags->Add({.name = "output-dir",
              .value = "DIR",
              .help = "Folder of the runs' folders; short for --set run.output_dir=DIR."},
             &values->output_dir);
  flags->Add(
      {.name = "resume",
       .help =
           "Go on from the run's newest checkpoint, if it has one; short for --set checkpoint.resume=auto."},
      &values->resume);
  AddLaunchFlags(flags, &values->launch);
  flags->Examples({
      "./shoal train configs/quickstart.yaml --nproc-per-node 2",
      "./shoal train configs/quickstart.yaml --nproc-per-node 2 --set train.steps=200 --set "
      "optimizer.lr=1e-3",
      "./shoal train CONFIG --nnodes 2 --node-rank 0 --rdzv-endpoint host0:29500     # and --node-rank 1 on "
      "the other host",
      "mpirun -np 4 ./shoal train CONFIG",
      "srun -n 4 ./shoal train CONFIG",
  });
}

// As a rank of a job that something has launched, the launcher below included.
absl::Status TrainAsRank(const LoadedConfig& loaded, const RankEnvironment& environment) {
  SetLogIdentity(absl::StrCat("rank ", environment.rank));
  SHOAL_RETURN_IF_ERROR(CheckParallel(loaded.config, loaded.positions, environment.world_size));
  return TrainRank(loaded, environment);
}

int ExitCode(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  if (absl::IsCancelled(status)) return kExitSignalBase + SIGTERM;  // Rank 0 has said it.
  const int code = Fail("shoal train", status);
  return absl::IsAborted(status) ? kExitPeerLost : code;
}

// Starts the ranks of this host, each as this program with the same arguments.
absl::StatusOr<int> Launch(const LoadedConfig& loaded, TrainFlags* flags,
                           absl::Span<const std::string> args) {
  flags->launch.usable_cores = UsableCores();
  if (flags->launch.values.count("nproc-per-node") == 0) {
    flags->launch.values["nproc-per-node"] = absl::StrCat(loaded.config.parallel().nproc_per_node());
  }
  SHOAL_ASSIGN_OR_RETURN(AgentOptions agent, MakeAgentOptions(flags->launch));
  SHOAL_RETURN_IF_ERROR(CheckParallel(loaded.config, loaded.positions, agent.nnodes * agent.nproc_per_node));
  // How long saving takes is the ranks' to know, which have deadlines of their own; who sent the signal has one, too.
  agent.save_time = absl::InfiniteDuration();
  agent.more_threads_than_cores =
      agent.nproc_per_node * std::max(1, loaded.config.train().threads()) > flags->launch.usable_cores;
  const Run& run = loaded.config.run();
  if (agent.log_dir.empty()) agent.log_dir = absl::StrCat(run.output_dir(), "/", run.name(), "/logs");
  std::vector<std::string> command = {SelfExecutable(), "train"};
  command.insert(command.end(), args.begin(), args.end());
  return RunAgent(agent, command);
}

}  // namespace

int RunTrain(absl::Span<const std::string> args) {
  FlagSet flags("shoal train",
                "Pretrains the model that a configuration describes. Starts the ranks itself, on one host or "
                "with the same command "
                "on each of several; inside mpirun, srun or torchrun it is one of their ranks. Prints "
                "progress, and writes "
                "metrics, checkpoints and a loss curve to the run's folder. SIGUSR1 saves a checkpoint, SIGTERM saves one "
                "and ends.");
  // Also in ranks that have just been started. Who asks before there is anything to save shall end nothing.
  signal(SIGUSR1, SIG_IGN);
  TrainFlags values;
  AddTrainFlags(&flags, &values);
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  // The short forms come first: a --set of the same key says more.
  if (!values.output_dir.empty())
    values.overrides.insert(values.overrides.begin(), "run.output_dir=" + values.output_dir);
  if (values.resume) values.overrides.insert(values.overrides.begin(), "checkpoint.resume=auto");
  const auto environment = DetectEnvironment(ProcessEnv);
  if (!environment.ok()) return ExitCode(environment.status());
  const auto loaded = LoadConfig(values.config, values.overrides, Files::kMustExist);
  if (!loaded.ok()) return ExitCode(loaded.status());
  if (environment->has_value()) return ExitCode(TrainAsRank(*loaded, **environment));
  const auto code = Launch(*loaded, &values, args);
  return code.ok() ? *code : ExitCode(code.status());
}

}  // namespace shoal
