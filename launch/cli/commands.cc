#include "launch/cli/commands.h"

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/flags.h"
#include "runtime/base/status.h"
#include "runtime/config/nearest.h"

namespace shoal {

std::string CommandsHelp(std::string_view program, std::string_view description,
                         absl::Span<const Command> commands) {
  size_t width = 0;
  for (const Command& command : commands) width = std::max(width, command.name.size());
  std::string text = absl::StrCat("Usage: ", AbslSv(program), " COMMAND ...\n\n",
                                  WrapText(description, 100, 0), "\n\nCommands:\n");
  for (const Command& command : commands) {
    absl::StrAppend(&text, "  ", command.name, std::string(width + 2 - command.name.size(), ' '),
                    command.summary, "\n");
  }
  absl::StrAppend(&text, "\n", AbslSv(program), " COMMAND --help says more about each.\n");
  return text;
}

int Dispatch(std::string_view program, const std::string& help, absl::Span<const Command> commands,
             absl::Span<const std::string> args) {
  if (args.empty()) {
    absl::FPrintF(stderr, "%s", help);
    return kExitUsage;
  }
  if (args[0] == "--help" || args[0] == "-h") {
    absl::PrintF("%s", help);
    return kExitOk;
  }
  std::vector<std::string> names;
  for (const Command& command : commands) {
    if (command.name == args[0]) return command.run(args.subspan(1));
    names.push_back(command.name);
  }
  const int code =
      Fail(program,
           absl::InvalidArgumentError(absl::StrCat("unknown command ", args[0], DidYouMean(args[0], names))));
  absl::FPrintF(stderr, "Try: ./%s --help\n", std::string(program));
  return code;
}

}  // namespace shoal
