#include <cstdio>

#include "absl/status/status.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/trainer/inference.h"

namespace shoal {
namespace {

struct GenerateFlags {
  std::string checkpoint;
  std::string prompt;
  int64_t length = 300;
  double temperature = 0.8;
  int64_t top_k = 0;
  int64_t seed = 0;
  int64_t threads = 0;
};

absl::Status Generate(const GenerateFlags& flags) {
  const SampleOptions sample{.prompt = flags.prompt,
                             .length = flags.length,
                             .temperature = flags.temperature,
                             .top_k = flags.top_k,
                             .seed = static_cast<uint64_t>(flags.seed)};
  SHOAL_ASSIGN_OR_RETURN(const std::string text,
                         GenerateText(flags.checkpoint, sample, static_cast<int>(flags.threads)));
  std::printf("%s%s\n", flags.prompt.c_str(), text.c_str());
  return absl::OkStatus();
}

}  // namespace

int RunGenerate(absl::Span<const std::string> args) {
  FlagSet flags("shoal generate",
                "Continues a text, byte by byte, with the model of a checkpoint or of a folder in Hugging "
                "Face layout. Prints the "
                "prompt and what follows it.");
  GenerateFlags values;
  flags.Add({.name = "checkpoint",
             .value = "DIR",
             .help = "A checkpoint, a run's folder (its newest checkpoint), or an exported model.",
             .required = true},
            &values.checkpoint);
  flags.Add({.name = "prompt", .value = "TEXT", .help = "What to continue. Empty: start from a line end."},
            &values.prompt);
  flags.Add({.name = "length", .value = "N", .help = "Bytes to add.", .min = 0}, &values.length);
  flags.Add({.name = "temperature",
             .value = "X",
             .help = "Divides the logits. 0: always the likeliest byte.",
             .min = 0},
            &values.temperature);
  flags.Add(
      {.name = "top-k", .value = "K", .help = "Choose among the K likeliest bytes. 0: among all.", .min = 0},
      &values.top_k);
  flags.Add({.name = "seed", .value = "N", .help = "Equal seeds give equal texts.", .min = 0}, &values.seed);
  flags.Add(
      {.name = "threads", .value = "N", .help = "Threads to compute with. 0: one for each core.", .min = 0},
      &values.threads);
  flags.Examples({"./shoal generate --checkpoint runs/quickstart --prompt \"Call me \""});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const absl::Status status = Generate(values);
  return status.ok() ? kExitOk : Fail(flags.command(), status);
}

}  // namespace shoal
