#include "launch/cli/launch_flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace shoal {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

struct Parsed {
  std::map<std::string, std::string> values;
  std::vector<std::string> words;
};

absl::StatusOr<Parsed> Parse(const std::vector<std::string>& args,
                             const std::map<std::string, std::string>& environment = {}) {
  FlagSet flags("program", "Launches.");
  RawLaunchFlags launch;
  Parsed parsed;
  flags.AddPositional("WORD", "What a rank does.", &parsed.words);
  AddLaunchFlags(&flags, &launch);
  const absl::Status status = flags.Parse(args, [&](std::string_view name) -> std::optional<std::string> {
    const auto found = environment.find(std::string(name));
    if (found == environment.end()) return std::nullopt;
    return found->second;
  });
  if (!status.ok()) return status;
  parsed.values = launch.values;
  return parsed;
}

TEST(AddLaunchFlags, TorchrunsCommandLine) {
  const auto parsed = Parse({"--nproc_per_node", "2", "--nnodes=3:3", "-t", "3", "--standalone", "meet"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->values, ElementsAre(Pair("nnodes", "3:3"), Pair("nproc-per-node", "2"),
                                          Pair("standalone", "true"), Pair("tee", "3")));
  EXPECT_THAT(parsed->words, ElementsAre("meet"));
}

TEST(AddLaunchFlags, TheCommandLineWinsOverTheEnvironment) {
  const auto parsed = Parse({"--nnodes", "2", "meet"}, {{"PET_NNODES", "9"},
                                                        {"PET_NODE_RANK", "1"},
                                                        {"PET_STANDALONE", "0"},
                                                        {"PET_MAX_RESTARTS", "3"},
                                                        {"PET_ROLE", "trainer"}});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->values, ElementsAre(Pair("max-restarts", "3"), Pair("nnodes", "2"),
                                          Pair("node-rank", "1"), Pair("role", "trainer")));
}

TEST(AddLaunchFlags, EveryFlagMeansSomethingOrIsWarnedAbout) {
  RawLaunchFlags launch;
  launch.values = Parse({"--numa-binding", "node", "--no-python", "meet"})->values;
  const auto options = MakeAgentOptions(launch);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->warnings, Contains(HasSubstr("--numa-binding")));
  EXPECT_THAT(options->warnings, Contains(HasSubstr("--no-python")));
}

}  // namespace
}  // namespace shoal
