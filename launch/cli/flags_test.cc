#include "launch/cli/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "launch/agent/exit_codes.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;

struct Values {
  std::string config;
  std::vector<std::string> rest;
  std::string name = "none";
  int64_t steps = 7;
  double rate = 0.5;
  bool quiet = false;
  std::vector<std::string> overrides;
  std::map<std::string, std::string> launch;
};

FlagSet Declare(Values* values) {
  FlagSet flags("shoal try", "Tries.");
  flags.AddPositional("CONFIG", "A file.", &values->config);
  flags.Add({.name = "run-name", .value = "NAME", .help = "Name.", .letter = 'n', .from_environment = true},
            &values->name);
  flags.Add({.name = "steps", .value = "N", .help = "Steps.", .min = 1}, &values->steps);
  flags.Add({.name = "rate", .value = "X", .help = "Rate.", .min = 0}, &values->rate);
  flags.Add({.name = "quiet", .help = "Say less.", .from_environment = true}, &values->quiet);
  flags.Add({.name = "set", .value = "KEY=VALUE", .help = "Set."}, &values->overrides);
  flags.Heading("Ranks");
  flags.Add({.name = "nproc-per-node", .value = "N|auto", .help = "Ranks.", .from_environment = true},
            &values->launch);
  flags.Add({.name = "standalone", .help = "Alone.", .from_environment = true}, &values->launch);
  flags.Add({.name = "secret", .value = "S", .help = "Secret.", .hidden = true}, &values->launch);
  return flags;
}

absl::Status Parse(Values* values, const std::vector<std::string>& args,
                   std::map<std::string, std::string> env = {}) {
  FlagSet flags = Declare(values);
  return flags.Parse(args, [&](std::string_view name) -> std::optional<std::string> {
    const auto found = env.find(std::string(name));
    return found == env.end() ? std::nullopt : std::optional<std::string>(found->second);
  });
}

std::string Error(const std::vector<std::string>& args, std::map<std::string, std::string> env = {}) {
  Values values;
  const absl::Status status = Parse(&values, args, std::move(env));
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

TEST(FlagSet, TakesEveryForm) {
  Values values;
  ASSERT_TRUE(Parse(&values, {"--steps", "3", "a.yaml", "--rate=1e-3", "--quiet", "--set", "a=b", "--set=c=d",
                              "--run_name", "x", "--nproc_per-node=2", "--standalone"})
                  .ok());
  EXPECT_EQ(values.config, "a.yaml");
  EXPECT_EQ(values.steps, 3);
  EXPECT_EQ(values.rate, 1e-3);
  EXPECT_TRUE(values.quiet);
  EXPECT_EQ(values.name, "x");
  EXPECT_THAT(values.overrides, ElementsAre("a=b", "c=d"));
  EXPECT_THAT(values.launch, ElementsAre(Pair("nproc-per-node", "2"), Pair("standalone", "true")));
}

TEST(FlagSet, KeepsDefaultsAndTakesTheLastOfTwo) {
  Values values;
  ASSERT_TRUE(
      Parse(&values, {"a.yaml", "--steps=1", "--steps=2", "--quiet", "--quiet=false", "-n", "y"}).ok());
  EXPECT_EQ(values.steps, 2);
  EXPECT_FALSE(values.quiet);
  EXPECT_EQ(values.name, "y");
  EXPECT_EQ(values.rate, 0.5);
  EXPECT_THAT(values.launch, IsEmpty());
}

TEST(FlagSet, TakesValuesAndArgumentsWithDashes) {
  Values values;
  ASSERT_TRUE(Parse(&values, {"--run-name", "--steps", "--", "--weird.yaml"}).ok());
  EXPECT_EQ(values.name, "--steps");
  EXPECT_EQ(values.config, "--weird.yaml");
  Values dash;
  ASSERT_TRUE(Parse(&dash, {"-"}).ok());
  EXPECT_EQ(dash.config, "-");
}

TEST(FlagSet, ReadsTheEnvironmentBelowTheCommandLine) {
  Values values;
  ASSERT_TRUE(Parse(&values, {"a", "--run-name=line"},
                    {{"PET_RUN_NAME", "env"},
                     {"PET_QUIET", "1"},
                     {"PET_NPROC_PER_NODE", "4"},
                     {"PET_STEPS", "9"},
                     {"PET_STANDALONE", "0"}})
                  .ok());
  EXPECT_EQ(values.name, "line");
  EXPECT_TRUE(values.quiet);
  EXPECT_EQ(values.steps, 7);
  EXPECT_THAT(values.launch, ElementsAre(Pair("nproc-per-node", "4")));
  EXPECT_EQ(Error({"a"}, {{"PET_QUIET", "maybe"}}), "PET_QUIET: expected true or false, found \"maybe\"");
}

TEST(FlagSet, NamesWhatIsWrong) {
  EXPECT_EQ(Error({"a", "--stpes", "3"}), "unknown flag --stpes; did you mean --steps?");
  EXPECT_EQ(Error({"a", "--nproc=3"}), "unknown flag --nproc; did you mean --nproc-per-node?");
  EXPECT_EQ(Error({"a", "--secrte=3"}),
            "unknown flag --secrte; keys of the configuration are changed by --set KEY=VALUE");
  EXPECT_EQ(Error({"a", "-x"}), "unknown flag -x");
  EXPECT_EQ(Error({"a", "-steps", "1"}), "unknown flag -steps; did you mean --steps?");
  EXPECT_EQ(Error({"a", "--n", "1"}),
            "unknown flag --n; keys of the configuration are changed by --set KEY=VALUE");
  EXPECT_EQ(Error({"a", "--steps"}), "--steps needs a value: N");
  EXPECT_EQ(Error({"a", "--steps", "many"}), "--steps: expected an integer, found \"many\"");
  EXPECT_EQ(Error({"a", "--steps=0"}), "--steps: 0 is too small; at least 1");
  EXPECT_EQ(Error({"a", "--rate=fast"}), "--rate: expected a number, found \"fast\"");
  EXPECT_EQ(Error({"a", "--rate=-1"}), "--rate: -1 is too small; at least 0");
  EXPECT_EQ(Error({"a", "--quiet=maybe"}), "--quiet: expected true or false, found \"maybe\"");
  EXPECT_EQ(Error({"a", "b"}), "unexpected argument \"b\"");
  EXPECT_EQ(Error({}), "CONFIG is missing: A file.");
}

TEST(FlagSet, ChecksRequiredFlagsAndWords) {
  std::string out, type = "fp32";
  std::vector<std::string> inputs;
  const auto parse = [&](const std::vector<std::string>& args) {
    FlagSet flags("shoal try", "Tries.");
    flags.AddPositional("INPUT", "Files.", &inputs);
    flags.Add({.name = "out", .value = "DIR", .help = "Folder.", .required = true}, &out);
    flags.Add({.name = "dtype", .value = "T", .help = "Type.", .one_of = {"fp32", "bf16"}}, &type);
    EXPECT_THAT(flags.Help(), HasSubstr("Usage: shoal try INPUT... --out DIR [flags]\n"));
    return std::string(flags.Parse(args, ProcessEnv).message());
  };
  EXPECT_EQ(parse({"a"}), "--out DIR is missing: Folder.");
  EXPECT_EQ(parse({"--out", "d"}), "INPUT is missing: Files.");
  EXPECT_EQ(parse({"a", "--out", "d", "--dtype", "bf61"}),
            "--dtype: \"bf61\" is not one of fp32, bf16; did you mean bf16?");
  inputs.clear();
  EXPECT_EQ(parse({"a", "--out", "d", "b", "--dtype=bf16", "c"}), "");
  EXPECT_THAT(inputs, ElementsAre("a", "b", "c"));
  EXPECT_EQ(type, "bf16");
}

TEST(FlagSet, HelpShowsNamesValuesAndDefaults) {
  Values values;
  FlagSet flags = Declare(&values);
  flags.Examples({"shoal try a.yaml"});
  EXPECT_EQ(flags.Help(), R"(Usage: shoal try CONFIG [flags]

Tries.

Arguments:
  CONFIG                      A file.

Flags:
  -n, --run-name NAME         Name. Default: none.
  --steps N                   Steps. Default: 7.
  --rate X                    Rate. Default: 0.5.
  --quiet                     Say less.
  --set KEY=VALUE             Set.

Ranks:
  --nproc-per-node N|auto     Ranks.
  --standalone                Alone.

Examples:
  shoal try a.yaml
)");
}

TEST(FlagSet, HelpNeedsNothingElse) {
  Values values;
  FlagSet flags = Declare(&values);
  ASSERT_TRUE(flags.Parse({"--steps", "x", "--help"}, ProcessEnv).ok());
  EXPECT_TRUE(flags.help_wanted());
  FlagSet again = Declare(&values);
  ASSERT_TRUE(again.Parse({"a", "--", "-h"}, ProcessEnv).code() == absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(again.help_wanted());
}

TEST(FlagSet, ACommandKeepsItsOwnFlags) {
  const auto parse = [](const std::vector<std::string>& args, int64_t* ranks, std::vector<std::string>* command) {
    FlagSet flags("shoal run", "Runs.");
    flags.AddCommand("PROGRAM", "What runs.", command);
    flags.Add({.name = "ranks", .value = "N", .help = "How many."}, ranks);
    EXPECT_THAT(flags.Help(), HasSubstr("shoal run PROGRAM... [flags]"));
    const absl::Status status = flags.Parse(args, ProcessEnv);
    return flags.help_wanted() ? absl::CancelledError("help") : status;
  };
  int64_t ranks = 1;
  std::vector<std::string> command;
  EXPECT_TRUE(parse({"--ranks", "2", "program", "--ranks", "3", "--help", "--"}, &ranks, &command).ok());
  EXPECT_EQ(ranks, 2);
  EXPECT_THAT(command, ElementsAre("program", "--ranks", "3", "--help", "--"));
  command.clear();
  EXPECT_TRUE(parse({"--", "--program", "x"}, &ranks, &command).ok());
  EXPECT_THAT(command, ElementsAre("--program", "x"));
  EXPECT_TRUE(absl::IsInvalidArgument(parse({"--ranks", "2"}, &ranks, &command))) << "no program";
  EXPECT_TRUE(absl::IsCancelled(parse({"--ranks", "2", "--help", "program"}, &ranks, &command)));
}

TEST(WrapText, BreaksAndIndents) {
  EXPECT_EQ(WrapText("", 10, 2), "");
  EXPECT_EQ(WrapText("a bb ccc dddd", 6, 2), "a bb\n  ccc\n  dddd");
  EXPECT_EQ(WrapText("unbreakable x", 5, 1), "unbreakable\n x");
}

TEST(Fail, PrintsOneOrSeveralLinesAndChoosesTheCode) {
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(Fail("shoal train", absl::InvalidArgumentError("a: b")), kExitUsage);
  EXPECT_EQ(Fail("shoal train", absl::DataLossError("a\nb")), kExitFailure);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "shoal train: a: b\nshoal train:\n  a\n  b\n");
}

}  // namespace
}  // namespace shoal
