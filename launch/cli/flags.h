// The command line of one command: flags are declared with a pointer to the variable that holds the default
// and takes the value, and Help() is written from the declarations.
//
//   --name value, --name=value, -n value     dashes and underscores alike, as torchrun has it
//   --name, --name=false                     true or false
//   --                                       what follows are no flags (nor is what follows a command's first word)
//
// A flag that is given twice takes the last value; lists take all. Values come from the command line, or
// else, for flags with torchrun's names, from PET_<NAME> in the environment, or else are the default.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "launch/agent/environment.h"

namespace shoal {

struct FlagSpec {
  std::string name;   // With dashes.
  std::string value;  // What stands for the value in help: "N|auto". Empty for true or false.
  std::string help;   // Sentences. The default is added, unless they say it ("Default: ...").
  char letter = 0;    // -t; 0: none.
  bool required = false;
  bool from_environment = false;             // PET_<NAME> counts when the command line has no such flag.
  std::vector<std::string> one_of = {};      // Allowed values; empty: any.
  std::optional<double> min = std::nullopt;  // Of numbers, inclusive.
  bool hidden = false;                       // Not in the help.
};

class FlagSet {
 public:
  // A map takes the text of the flag under the flag's name, and "true" for a flag without a value.
  using Target = std::variant<std::string*, int64_t*, double*, bool*, std::vector<std::string>*,
                              std::map<std::string, std::string>*>;

  // `command`: "shoal train". `description`: a paragraph.
  FlagSet(std::string command, std::string description);

  // `target` is borrowed until Parse() has returned.
  void Add(FlagSpec spec, Target target);
  // The next argument without a name; a list takes all that are left. They must be given.
  void AddPositional(std::string name, std::string help,
                     std::variant<std::string*, std::vector<std::string>*> target);
  // The first argument without a name and all that follow, whatever they look like: another program's command line. It
  // must be given. Declared last of the positional ones.
  void AddCommand(std::string name, std::string help, std::vector<std::string>* target);
  // Later flags stand under this heading in the help.
  void Heading(std::string heading);
  // Lines at the end of the help, each a command.
  void Examples(std::vector<std::string> examples);

  // INVALID_ARGUMENT names the flag, what was expected, and the nearest flag to an unknown one. --help or -h
  // anywhere before -- (or before the command's first word) sets help_wanted() and leaves all else unchecked.
  absl::Status Parse(absl::Span<const std::string> args, const GetEnv& getenv);
  bool help_wanted() const { return help_wanted_; }
  std::string Help() const;
  const std::string& command() const { return command_; }

 private:
  struct Flag {
    FlagSpec spec;
    Target target;
    std::string default_value;
    std::string heading;
    bool given = false;
  };
  struct Positional {
    std::string name;
    std::string help;
    std::variant<std::string*, std::vector<std::string>*> target;
    bool is_command = false;
    bool given = false;
  };

  Flag* Find(std::string_view name);
  absl::Status ParseNamed(absl::Span<const std::string> args, size_t* next);
  // Sets *flags_end where the rest belongs to a command.
  absl::Status ParsePositional(const std::string& arg, bool* flags_end);
  absl::Status ReadEnvironment(const GetEnv& getenv);

  const std::string command_;
  const std::string description_;
  std::vector<Flag> flags_;
  std::vector<Positional> positionals_;
  std::vector<std::string> examples_;
  std::string heading_ = "Flags";
  bool help_wanted_ = false;
};

// Parses the arguments of the process's command. Has a value, the exit code, when the command is not to run:
// help was printed to stdout, or an error to stderr.
std::optional<int> ParseOrExit(FlagSet* flags, absl::Span<const std::string> args);

// Prints "command: error" to stderr, several lines indented, and returns the exit code for it.
int Fail(std::string_view command, const absl::Status& error);

// `text` in lines of at most `width` columns, each after the first with `indent` spaces before it.
std::string WrapText(std::string_view text, size_t width, size_t indent);

}  // namespace shoal
