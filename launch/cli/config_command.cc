#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "launch/config/config.h"

namespace shoal {
namespace {

struct ConfigFlags {
  std::string config;
  std::vector<std::string> overrides;
};

void AddConfigFlags(FlagSet* flags, ConfigFlags* values) {
  flags->AddPositional("CONFIG", "A YAML file, for example configs/quickstart.yaml.", &values->config);
  flags->Add({.name = "set",
              .value = "KEY=VALUE",
              .help = "Changes a key, for example train.steps=200. May be repeated."},
             &values->overrides);
}

int RunShow(absl::Span<const std::string> args) {
  FlagSet flags("shoal config show",
                "Prints a configuration in full: defaults included, values that depend on others filled in. "
                "The output is a "
                "configuration itself. Files that it names need not exist.");
  ConfigFlags values;
  AddConfigFlags(&flags, &values);
  flags.Examples({"./shoal config show configs/quickstart.yaml --set train.precision=bf16"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto loaded = LoadConfig(values.config, values.overrides, Files::kMayBeMissing);
  if (!loaded.ok()) return Fail(flags.command(), loaded.status());
  absl::PrintF("%s", ConfigYaml(loaded->config));
  return kExitOk;
}

int RunCheck(absl::Span<const std::string> args) {
  FlagSet flags("shoal config check",
                "Says whether a configuration can be trained: its keys and values, their combinations, the "
                "files that it names, "
                "and how it fits a number of ranks. Prints all errors with file, line and column.");
  ConfigFlags values;
  AddConfigFlags(&flags, &values);
  int64_t ranks = 0;
  flags.Add({.name = "ranks", .value = "N", .help = "Number of ranks of the job. Default: parallel.nproc_per_node.", .min = 1}, &ranks);
  flags.Examples({"./shoal config check configs/quickstart.yaml --set parallel.expert=2 --ranks 4"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto loaded = LoadConfig(values.config, values.overrides, Files::kMustExist);
  if (!loaded.ok()) return Fail(flags.command(), loaded.status());
  if (ranks == 0) ranks = loaded->config.parallel().nproc_per_node();
  const absl::Status status = CheckParallel(loaded->config, loaded->positions, static_cast<int>(ranks));
  if (!status.ok()) return Fail(flags.command(), status);
  absl::PrintF("%s: good for %d rank%s\n", values.config, ranks, ranks == 1 ? "" : "s");
  return kExitOk;
}

int RunReference(absl::Span<const std::string> args) {
  FlagSet flags("shoal config reference", "Prints what every key means, as Markdown: docs/configuration.md.");
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  absl::PrintF("%s", ConfigReference());
  return kExitOk;
}

}  // namespace

int RunConfig(absl::Span<const std::string> args) {
  const std::vector<Command> commands = {
      {"show", "print a configuration in full", RunShow},
      {"check", "say whether a configuration can be trained", RunCheck},
      {"reference", "print what every key means", RunReference},
  };
  const std::string help =
      CommandsHelp("shoal config", "Works on configurations, the YAML files that describe a run.", commands);
  return Dispatch("shoal config", help, commands, args);
}

}  // namespace shoal
