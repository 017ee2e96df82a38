#include "tests/harness/subprocess.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>

#include "tests/harness/temp_dir.h"

namespace shoal::testing {
namespace {

using ::testing::HasSubstr;

SubprocessOptions Shell(const std::string& script) { return {.args = {"sh", "-c", script}}; }

TEST(Subprocess, CapturesOutputExitCodeEnvironmentAndFolder) {
  TempDir folder;
  setenv("SHOAL_TEST_OLD", "old", 1);
  SubprocessOptions options = Shell("echo $A; pwd; echo ${SHOAL_TEST_OLD:-gone} >&2; exit 3");
  options.env["A"] = "b c";
  options.unset_env = {"SHOAL_TEST_OLD"};
  options.cwd = folder.path();
  const absl::StatusOr<ProcessResult> result = RunProcess(options, absl::Seconds(20));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, 3);
  EXPECT_EQ(result->out, "b c\n" + std::filesystem::canonical(folder.path()).string() + "\n");
  EXPECT_EQ(result->err, "gone\n");
}

TEST(Subprocess, TakesMoreOutputThanAPipeHolds) {
  const auto result =
      RunProcess(Shell("head -c 1000000 /dev/zero; head -c 500000 /dev/zero >&2"), absl::Seconds(20));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->out.size(), 1000000u);
  EXPECT_EQ(result->err.size(), 500000u);
}

TEST(Subprocess, MissingCommandIsNotFoundAndNamed) {
  const auto started = Subprocess::Start({.args = {"no-such-command-of-shoal"}});
  ASSERT_TRUE(absl::IsNotFound(started.status())) << started.status();
  EXPECT_THAT(std::string(started.status().message()), HasSubstr("no-such-command-of-shoal"));
}

TEST(Subprocess, WaitTellsDeadlineThenSignal) {
  auto process = Subprocess::Start(Shell("echo ready; exec sleep 1000"));
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE((*process)->WaitForOutput("ready", absl::Seconds(20)).ok());
  EXPECT_TRUE(absl::IsDeadlineExceeded((*process)->Wait(absl::Milliseconds(1)).status()));
  (*process)->Signal(SIGTERM);
  for (int i = 0; i < 2; ++i) {
    const auto result = (*process)->Wait(absl::Seconds(20));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->signal, SIGTERM);
    EXPECT_EQ(result->exit_code, -1);
  }
}

TEST(Subprocess, WaitForOutputEndsWhenTheProcessEndsWithoutIt) {
  auto process = Subprocess::Start(Shell("echo something"));
  ASSERT_TRUE(process.ok()) << process.status();
  const absl::Status status = (*process)->WaitForOutput("other", absl::Seconds(20));
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("something"));
}

// The grandchild holds the only write end of a pipe; its end is seen as end of file.
TEST(Subprocess, DestructorKillsTheWholeGroup) {
  TempDir folder;
  ASSERT_EQ(mkfifo((folder / "life").c_str(), 0600), 0);
  SubprocessOptions options = Shell("(exec sleep 1000) > life & echo started; wait");
  options.cwd = folder.path();
  auto watcher = Subprocess::Start({.args = {"cat", folder / "life"}});
  ASSERT_TRUE(watcher.ok()) << watcher.status();
  {
    auto process = Subprocess::Start(options);
    ASSERT_TRUE(process.ok()) << process.status();
    ASSERT_TRUE((*process)->WaitForOutput("started", absl::Seconds(20)).ok());
    EXPECT_TRUE(absl::IsDeadlineExceeded((*watcher)->Wait(absl::Milliseconds(50)).status()));
  }
  const auto ended = (*watcher)->Wait(absl::Seconds(20));
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->exit_code, 0);
}

TEST(Subprocess, LeaderMayEndBeforeItsChildren) {
  auto process = Subprocess::Start(Shell("echo first; sleep 1000 &"));
  ASSERT_TRUE(process.ok()) << process.status();
  const auto result = (*process)->Wait(absl::Seconds(20));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->out, "first\n");
}

TEST(TempDir, IsRemovedWithItsContent) {
  std::string path;
  {
    TempDir folder;
    path = folder.path();
    WriteFile(folder / "a/b.txt", "text");
    EXPECT_EQ(ReadFile(folder / "a/b.txt"), "text");
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(FindCommand, FindsOnlyWhatIsThere) {
  EXPECT_NE(FindCommand("sh"), "");
  EXPECT_EQ(FindCommand("no-such-command-of-shoal"), "");
}

}  // namespace
}  // namespace shoal::testing
