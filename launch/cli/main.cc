// The program `shoal`.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"

namespace shoal {
namespace {

int RunHelp(absl::Span<const std::string> args);

const std::vector<Command>& Commands() {
  static const auto* const commands = new std::vector<Command>{
      {"train", "pretrain a model on the ranks of one or several hosts", RunTrain},
      {"generate", "continue a text with a trained model", RunGenerate},
      {"export", "write a checkpoint as a Hugging Face model", RunExport},
      {"data", "turn text into a data set", RunData},
      {"config", "show, check and explain configurations", RunConfig},
      {"launch", "start the ranks of a program of your own, elastic or not", RunLaunch},
      {"coordinate", "let the processes of an elastic job find each other", RunCoordinate},
      {"plan", "find the fastest layout of a model on a described cluster", RunPlan},
      {"simulate", "predict a step on a described cluster", RunSimulate},
      {"bench", "measure the speed of training", RunBench},
      {"trace", "show when the tasks of training steps run", RunTrace},
      {"profile", "show what tasks of training steps cost", RunProfile},
      {"version", "print the version", RunVersion},
      {"help", "explain a command", RunHelp},
  };
  return *commands;
}

std::string Help() {
  const std::string commands = CommandsHelp(
      "shoal", "Shoal pretrains mixture-of-experts language models, on a laptop's cores or on a cluster.",
      Commands());
  return absl::StrCat(commands, R"(
The script ./shoal also knows
  ./shoal build               install what is missing and build, nothing else
  ./shoal test                build and run all tests

Start with
  ./shoal train configs/quickstart.yaml

Exit codes: 0 done; 1 the job failed; 2 wrong flag, configuration or environment; 75 another rank of the job
went away, starting again can help; 128 + N ended by signal N (143: by SIGTERM, training saves first).
docs/configuration.md explains every key of a configuration.
)");
}

int RunHelp(absl::Span<const std::string> args) {
  if (!args.empty() && args[0] != "--help" && args[0] != "-h" && args[0] != "help") {
    std::vector<std::string> asked(args.begin(), args.end());
    asked.push_back("--help");
    return Dispatch("shoal", Help(), Commands(), asked);
  }
  absl::PrintF("%s", Help());
  return kExitOk;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  // A closed pipe and a file-size limit are errors of the call that meets them.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  std::vector<std::string> args(argv + 1, argv + argc);
  if (args.size() == 1 && args[0] == "--version") args[0] = "version";
  const int code = shoal::Dispatch("shoal", shoal::Help(), shoal::Commands(), args);
  const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
  // A reader that has seen enough (EPIPE) is no failure.
  if (code != shoal::kExitOk || !lost || errno == EPIPE) return code;
  absl::FPrintF(stderr, "shoal: cannot write to stdout: %s\n", std::strerror(errno));
  return shoal::kExitFailure;
}
