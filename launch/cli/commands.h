// The commands of the program, each in NAME_command.cc: arguments in (without the command's name), exit code
// out (launch/agent/exit_codes.h). They print to stdout what was asked for and to stderr what went wrong.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

struct Command {
  std::string name;
  std::string summary;  // One line.
  int (*run)(absl::Span<const std::string> args);
};

int RunTrain(absl::Span<const std::string> args);
int RunLaunch(absl::Span<const std::string> args);
int RunGenerate(absl::Span<const std::string> args);
int RunExport(absl::Span<const std::string> args);
int RunData(absl::Span<const std::string> args);
int RunConfig(absl::Span<const std::string> args);
int RunCoordinate(absl::Span<const std::string> args);
int RunPlan(absl::Span<const std::string> args);
int RunSimulate(absl::Span<const std::string> args);
int RunBench(absl::Span<const std::string> args);
int RunTrace(absl::Span<const std::string> args);
int RunProfile(absl::Span<const std::string> args);
int RunVersion(absl::Span<const std::string> args);

// Usage, description and the table of commands.
std::string CommandsHelp(std::string_view program, std::string_view description,
                         absl::Span<const Command> commands);

// Runs the command that args[0] names. Prints `help` for --help and, to stderr, when there are no arguments;
// an unknown command is an error that names the nearest.
int Dispatch(std::string_view program, const std::string& help, absl::Span<const Command> commands,
             absl::Span<const std::string> args);

}  // namespace shoal
