#include "launch/cli/flags.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "launch/agent/exit_codes.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/config/nearest.h"
#include "runtime/config/schema.h"

namespace shoal {
namespace {

constexpr size_t kColumns = 100;
constexpr size_t kHelpColumn = 30;

std::string DefaultText(const FlagSet::Target& target) {
  if (const auto* text = std::get_if<std::string*>(&target)) return **text;
  if (const auto* integer = std::get_if<int64_t*>(&target)) return absl::StrCat(**integer);
  if (const auto* number = std::get_if<double*>(&target)) return FormatNumber(**number);
  return "";
}

std::optional<bool> ParseBool(const std::string& text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return std::nullopt;
}

absl::Status CheckMin(const FlagSpec& spec, const std::string& name, double value) {
  if (!spec.min.has_value() || value >= *spec.min) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": ", FormatNumber(value), " is too small; at least ", FormatNumber(*spec.min)));
}

// `name` is what the value was given by, for errors: "--seed" or "PET_NNODES".
absl::Status Assign(const FlagSpec& spec, const FlagSet::Target& target, const std::string& name,
                    const std::string& text) {
  const auto wrong = [&](std::string_view expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": expected ", AbslSv(expected), ", found \"", text, "\""));
  };
  if (!spec.one_of.empty() && std::find(spec.one_of.begin(), spec.one_of.end(), text) == spec.one_of.end()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": \"", text, "\" is not one of ",
                                                   absl::StrJoin(spec.one_of, ", "),
                                                   DidYouMean(text, spec.one_of)));
  }
  if (const auto* integer = std::get_if<int64_t*>(&target)) {
    if (!absl::SimpleAtoi(text, *integer)) return wrong("an integer");
    return CheckMin(spec, name, static_cast<double>(**integer));
  }
  if (const auto* number = std::get_if<double*>(&target)) {
    const std::optional<double> value = ParseNumber(text);
    if (!value.has_value()) return wrong("a number");
    **number = *value;
    return CheckMin(spec, name, *value);
  }
  if (spec.value.empty()) {
    const std::optional<bool> value = ParseBool(text);
    if (!value.has_value()) return wrong("true or false");
    if (const auto* boolean = std::get_if<bool*>(&target)) {
      **boolean = *value;
    } else if (*value) {
      (*std::get<std::map<std::string, std::string>*>(target))[spec.name] = "true";
    }
  } else if (const auto* values = std::get_if<std::map<std::string, std::string>*>(&target)) {
    (**values)[spec.name] = text;
  } else if (const auto* list = std::get_if<std::vector<std::string>*>(&target)) {
    (*list)->push_back(text);
  } else {
    *std::get<std::string*>(target) = text;
  }
  return absl::OkStatus();
}

std::string EnvironmentName(const std::string& flag) {
  return absl::StrCat("PET_", absl::StrReplaceAll(absl::AsciiStrToUpper(flag), {{"-", "_"}}));
}

void AppendEntry(const std::string& name, const std::string& help, std::string* out) {
  std::string line = absl::StrCat("  ", name);
  if (line.size() + 2 > kHelpColumn) {
    absl::StrAppend(out, line, "\n");
    line.clear();
  }
  line.resize(kHelpColumn, ' ');
  absl::StrAppend(out, line, WrapText(help, kColumns - kHelpColumn, kHelpColumn), "\n");
}

}  // namespace

FlagSet::FlagSet(std::string command, std::string description)
    : command_(std::move(command)), description_(std::move(description)) {}

void FlagSet::Add(FlagSpec spec, Target target) {
  SHOAL_CHECK(Find(spec.name) == nullptr) << spec.name << " is declared twice";
  const bool takes_nothing = std::holds_alternative<bool*>(target) ||
                             std::holds_alternative<std::map<std::string, std::string>*>(target);
  SHOAL_CHECK(!spec.value.empty() || takes_nothing) << spec.name << " has no word for its value";
  const std::string default_value = DefaultText(target);
  flags_.push_back({std::move(spec), target, default_value, heading_});
}

void FlagSet::AddPositional(std::string name, std::string help,
                            std::variant<std::string*, std::vector<std::string>*> target) {
  positionals_.push_back({std::move(name), std::move(help), target});
}

void FlagSet::AddCommand(std::string name, std::string help, std::vector<std::string>* target) {
  positionals_.push_back({std::move(name), std::move(help), target, /*is_command=*/true});
}

void FlagSet::Heading(std::string heading) { heading_ = std::move(heading); }

void FlagSet::Examples(std::vector<std::string> examples) { examples_ = std::move(examples); }

FlagSet::Flag* FlagSet::Find(std::string_view name) {
  const std::string dashed = absl::StrReplaceAll(AbslSv(name), {{"_", "-"}});
  for (Flag& flag : flags_) {
    if (flag.spec.name == dashed || (name.size() == 1 && flag.spec.letter == name[0])) return &flag;
  }
  return nullptr;
}

absl::Status FlagSet::ParseNamed(absl::Span<const std::string> args, size_t* next) {
  const std::string& arg = args[*next];
  ++*next;
  const bool is_long = absl::StartsWith(arg, "--");
  const size_t equals = arg.find('=');
  const std::string shown = arg.substr(0, equals);
  const std::string name = shown.substr(is_long ? 2 : 1);
  Flag* const flag = is_long == (name.size() > 1) ? Find(name) : nullptr;
  if (flag == nullptr) {
    // Compared with underscores, so that the words of a shortened name count: --nproc for --nproc-per-node.
    std::vector<std::string> names;
    for (const Flag& known : flags_) {
      if (!known.spec.hidden) names.push_back(absl::StrReplaceAll(known.spec.name, {{"-", "_"}}));
    }
    const std::string nearest = Nearest(absl::StrReplaceAll(name, {{"-", "_"}}), names);
    std::string hint;
    if (!nearest.empty()) {
      hint = absl::StrCat("; did you mean --", absl::StrReplaceAll(nearest, {{"_", "-"}}), "?");
    } else if (is_long && Find("set") != nullptr) {
      hint = "; keys of the configuration are changed by --set KEY=VALUE";
    }
    return absl::InvalidArgumentError(absl::StrCat("unknown flag ", shown, hint));
  }
  flag->given = true;
  if (equals != std::string::npos) return Assign(flag->spec, flag->target, shown, arg.substr(equals + 1));
  if (flag->spec.value.empty()) return Assign(flag->spec, flag->target, shown, "true");
  if (*next == args.size())
    return absl::InvalidArgumentError(absl::StrCat(shown, " needs a value: ", flag->spec.value));
  return Assign(flag->spec, flag->target, shown, args[(*next)++]);
}

absl::Status FlagSet::ParsePositional(const std::string& arg, bool* flags_end) {
  for (Positional& positional : positionals_) {
    if (auto* list = std::get_if<std::vector<std::string>*>(&positional.target)) {
      positional.given = true;
      *flags_end = *flags_end || positional.is_command;
      (*list)->push_back(arg);
      return absl::OkStatus();
    }
    if (positional.given) continue;
    positional.given = true;
    *std::get<std::string*>(positional.target) = arg;
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("unexpected argument \"", arg, "\""));
}

absl::Status FlagSet::ReadEnvironment(const GetEnv& getenv) {
  for (Flag& flag : flags_) {
    if (flag.given || !flag.spec.from_environment) continue;
    const std::string name = EnvironmentName(flag.spec.name);
    const std::optional<std::string> value = getenv(name);
    if (!value.has_value()) continue;
    SHOAL_RETURN_IF_ERROR(Assign(flag.spec, flag.target, name, *value));
    flag.given = true;
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Parse(absl::Span<const std::string> args, const GetEnv& getenv) {
  const auto is_help = [](const std::string& arg) { return arg == "--help" || arg == "-h"; };
  const bool has_command =
      std::any_of(positionals_.begin(), positionals_.end(), [](const Positional& p) { return p.is_command; });
  if (!has_command) help_wanted_ = std::any_of(args.begin(), std::find(args.begin(), args.end(), "--"), is_help);
  if (help_wanted_) return absl::OkStatus();
  bool flags_end = false;
  for (size_t next = 0; next < args.size();) {
    const std::string& arg = args[next];
    if (!flags_end && has_command && is_help(arg)) {
      help_wanted_ = true;
      return absl::OkStatus();
    }
    if (!flags_end && arg == "--") {
      flags_end = true;
      ++next;
    } else if (!flags_end && arg.size() > 1 && arg[0] == '-') {
      SHOAL_RETURN_IF_ERROR(ParseNamed(args, &next));
    } else {
      SHOAL_RETURN_IF_ERROR(ParsePositional(arg, &flags_end));
      ++next;
    }
  }
  SHOAL_RETURN_IF_ERROR(ReadEnvironment(getenv));
  for (const Positional& positional : positionals_) {
    if (!positional.given)
      return absl::InvalidArgumentError(absl::StrCat(positional.name, " is missing: ", positional.help));
  }
  for (const Flag& flag : flags_) {
    if (flag.spec.required && !flag.given) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag.spec.name, " ", flag.spec.value, " is missing: ", flag.spec.help));
    }
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string text = absl::StrCat("Usage: ", command_);
  for (const Positional& positional : positionals_) {
    const bool is_list = std::holds_alternative<std::vector<std::string>*>(positional.target);
    absl::StrAppend(&text, " ", positional.name, is_list ? "..." : "");
  }
  for (const Flag& flag : flags_) {
    if (flag.spec.required) absl::StrAppend(&text, " --", flag.spec.name, " ", flag.spec.value);
  }
  absl::StrAppend(&text, flags_.empty() ? "" : " [flags]", "\n\n", WrapText(description_, kColumns, 0), "\n");
  if (!positionals_.empty()) text += "\nArguments:\n";
  for (const Positional& positional : positionals_) AppendEntry(positional.name, positional.help, &text);
  std::string heading;
  for (const Flag& flag : flags_) {
    if (flag.spec.hidden) continue;
    if (flag.heading != heading) absl::StrAppend(&text, "\n", flag.heading, ":\n");
    heading = flag.heading;
    const std::string letter =
        flag.spec.letter == 0 ? "" : absl::StrCat("-", std::string(1, flag.spec.letter), ", ");
    const std::string value = flag.spec.value.empty() ? "" : absl::StrCat(" ", flag.spec.value);
    const bool said = absl::StrContains(flag.spec.help, "Default: ");
    const std::string known = said || flag.default_value.empty() || flag.spec.required
                                  ? ""
                                  : absl::StrCat(" Default: ", flag.default_value, ".");
    AppendEntry(absl::StrCat(letter, "--", flag.spec.name, value), absl::StrCat(flag.spec.help, known),
                &text);
  }
  if (!examples_.empty()) absl::StrAppend(&text, "\nExamples:\n  ", absl::StrJoin(examples_, "\n  "), "\n");
  return text;
}

std::optional<int> ParseOrExit(FlagSet* flags, absl::Span<const std::string> args) {
  const absl::Status status = flags->Parse(args, ProcessEnv);
  if (!status.ok()) {
    Fail(flags->command(), status);
    absl::FPrintF(stderr, "Try: ./%s --help\n", flags->command());
    return kExitUsage;
  }
  if (!flags->help_wanted()) return std::nullopt;
  absl::PrintF("%s", flags->Help());
  return kExitOk;
}

int Fail(std::string_view command, const absl::Status& error) {
  const std::string message(error.message());
  const bool several = absl::StrContains(message, "\n");
  absl::FPrintF(stderr, "%s:%s%s\n", std::string(command), several ? "\n  " : " ",
                absl::StrReplaceAll(message, {{"\n", "\n  "}}));
  return absl::IsInvalidArgument(error) || absl::IsNotFound(error) ? kExitUsage : kExitFailure;
}

std::string WrapText(std::string_view text, size_t width, size_t indent) {
  std::string wrapped;
  size_t column = 0;
  for (const auto word : absl::StrSplit(AbslSv(text), ' ', absl::SkipEmpty())) {
    if (column > 0 && column + 1 + word.size() > width) {
      absl::StrAppend(&wrapped, "\n", std::string(indent, ' '));
      column = 0;
    }
    if (column > 0) wrapped += ' ';
    absl::StrAppend(&wrapped, word);
    column += (column > 0 ? 1 : 0) + word.size();
  }
  return wrapped;
}

}  // namespace shoal
