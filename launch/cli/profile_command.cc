#include <filesystem>

#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/flags.h"
#include "parallel/schedule/profile_file.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

absl::StatusOr<std::string> Show(const std::string& path) {
  std::error_code ignored;
  const std::string file = std::filesystem::is_directory(path, ignored) ? path + "/profile.json" : path;
  SHOAL_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  SHOAL_ASSIGN_OR_RETURN(const ProfileFile profile, ProfileFromJson(text), file);
  return ProfileText(profile);
}

int RunProfileShow(absl::Span<const std::string> args) {
  FlagSet flags("shoal profile show",
                "Prints what a run has learnt of the costs of its tasks: per kind of task a line, time = fixed + rate * units, the "
                "range that it was measured in, and how far single tasks are from it (residual).");
  std::string path;
  flags.AddPositional("RUN", "A run's folder, or its profile.json.", &path);
  flags.Examples({"./shoal profile show runs/quickstart"});
  if (const auto code = ParseOrExit(&flags, args)) return *code;
  const auto text = Show(path);
  if (!text.ok()) return Fail(flags.command(), text.status());
  absl::PrintF("%s", *text);
  return kExitOk;
}

}  // namespace

int RunProfile(absl::Span<const std::string> args) {
  const std::vector<Command> commands = {{"show", "print the costs of tasks", RunProfileShow}};
  const std::string help = CommandsHelp("shoal profile", "What runs have learnt of the costs of tasks.", commands);
  return Dispatch("shoal profile", help, commands, args);
}

}  // namespace shoal
