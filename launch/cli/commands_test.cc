#include "launch/cli/commands.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "launch/agent/exit_codes.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(Dispatch, RunsTheNamedCommandAndHelpsOtherwise) {
  const std::vector<Command> commands = {
      {"echo", "say", [](absl::Span<const std::string> args) { return static_cast<int>(args.size()) + 40; }},
      {"other", "do", [](absl::Span<const std::string>) { return 1; }},
  };
  const std::string help = CommandsHelp("shoal", "Does things.", commands);
  EXPECT_THAT(
      help, HasSubstr("Usage: shoal COMMAND ...\n\nDoes things.\n\nCommands:\n  echo   say\n  other  do\n"));
  const auto dispatch = [&](const std::vector<std::string>& args) {
    return Dispatch("shoal", help, commands, args);
  };
  EXPECT_EQ(dispatch({"echo", "a", "b"}), 42);
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(dispatch({"ehco"}), kExitUsage);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr("shoal: unknown command ehco; did you mean echo?\n"));
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(dispatch({}), kExitUsage);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), help);
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(dispatch({"--help"}), kExitOk);
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), help);
}

struct Ran {
  int code;
  std::string out, err;
};

class RunConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "shoal_cli_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }
  Ran Run(const std::vector<std::string>& args) {
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    const int code = RunConfig(args);
    const std::string out = ::testing::internal::GetCapturedStdout();
    return {code, out, ::testing::internal::GetCapturedStderr()};
  }

  fs::path folder_;
};

TEST_F(RunConfigTest, ShowPrintsAConfigurationThatShowsTheSame) {
  const std::string path = Write("a.yaml", "data: {path: missing.txt}\n");
  const Ran shown = Run({"show", path, "--set", "train.steps=5"});
  EXPECT_EQ(shown.code, kExitOk) << shown.err;
  EXPECT_THAT(shown.out, HasSubstr("\n  steps: 5\n"));
  EXPECT_THAT(shown.out, HasSubstr("\n  head_dim: 32\n"));
  const Ran again = Run({"show", Write("b.yaml", shown.out)});
  EXPECT_EQ(again.out, shown.out) << again.err;
}

TEST_F(RunConfigTest, CheckNamesWhatIsWrong) {
  const std::string path = Write("a.yaml", "data: {kind: random}\n");
  EXPECT_EQ(Run({"check", path, "--ranks", "3"}).out, path + ": good for 3 ranks\n");
  const Ran split = Run({"check", path, "--ranks", "3", "--set", "parallel.expert=2"});
  EXPECT_EQ(split.code, kExitUsage);
  EXPECT_EQ(split.out, "");
  EXPECT_THAT(split.err, HasSubstr("2 does not divide 3 ranks; 1 or 3 would fit"));
  const Ran wrong = Run({"check", Write("b.yaml", "modle: {}\ndata: {knid: text}\n")});
  EXPECT_EQ(wrong.code, kExitUsage);
  EXPECT_THAT(wrong.err, StartsWith("shoal config check:\n  " + folder_.string() +
                                    "/b.yaml:1:1: modle: unknown key; did you mean model?\n"));
  const Ran missing = Run({"check", Write("c.yaml", "data: {path: missing.txt}\n")});
  EXPECT_EQ(missing.code, kExitUsage);
  EXPECT_THAT(missing.err, HasSubstr("c.yaml:1:8: data.path: missing.txt: no such file"));
}

TEST_F(RunConfigTest, ReferenceStartsWithATitle) {
  EXPECT_THAT(Run({"reference"}).out, StartsWith("# Configuration\n"));
}

}  // namespace
}  // namespace shoal
