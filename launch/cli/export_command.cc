#include <cstdio>

#include "absl/status/status.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/trainer/inference.h"

namespace shoal {
namespace {

struct ExportFlags {
  std::string checkpoint;
  std::string out;
  std::string dtype = "fp32";
};

absl::Status Export(const ExportFlags& flags) {
  SHOAL_RETURN_IF_ERROR(
      ExportModel(flags.checkpoint, flags.out, flags.dtype == "bf16" ? DType::kBF16 : DType::kF32));
  std::printf("wrote %s/config.json and model.safetensors\n", flags.out.c_str());
  return absl::OkStatus();
}

}  // namespace

int RunExport(absl::Span<const std::string> args) {
  FlagSet flags("shoal export",
                "Writes the model of a checkpoint in Hugging Face layout: config.json and model.safetensors "
                "with Mixtral's names, which "
                "other programs read, and which run.init_from takes.");
  ExportFlags values;
  flags.Add({.name = "checkpoint",
             .value = "DIR",
             .help = "A checkpoint, or a run's folder (its newest checkpoint).",
             .required = true},
            &values.checkpoint);
  flags.Add({.name = "out", .value = "DIR", .help = "Folder to write; it is created.", .required = true},
            &values.out);
  flags.Add({.name = "dtype",
             .value = "TYPE",
             .help = "Type of the written weights, fp32 or bf16.",
             .one_of = {"fp32", "bf16"}},
            &values.dtype);
  flags.Examples({"./shoal export --checkpoint runs/quickstart --out quickstart-hf"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const absl::Status status = Export(values);
  return status.ok() ? kExitOk : Fail(flags.command(), status);
}

}  // namespace shoal
