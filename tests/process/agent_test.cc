// The launcher with real processes that fail in every way.
#include "launch/agent/agent.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <map>
#include <regex>

#include "absl/time/clock.h"
#include "launch/agent/exit_codes.h"
#include "runtime/base/status.h"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"
#include "tests/process/processes.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::ProcessHandle;
using testing::ProcessResult;
using testing::ReadFile;
using testing::Subprocess;
using testing::TempDir;
using testing::WaitAllGone;
using testing::WaitForRanks;
using testing::Words;

// Ample: the machine may be busy. Where a test promises less, it says so.
constexpr absl::Duration kLong = absl::Seconds(60);
// A job that fails ends within this, whatever its ranks do.
constexpr absl::Duration kEndMax = absl::Seconds(10);

std::unique_ptr<Subprocess> Launch(const std::string& words,
                                   const std::map<std::string, std::string>& env = {}) {
  // Shells start background jobs with SIGINT ignored, nohup with SIGHUP: the launcher would respect that.
  for (const int number : {SIGINT, SIGHUP}) signal(number, SIG_DFL);
  testing::SubprocessOptions options;
  options.env = env;
  for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}) {
    if (env.count(name) == 0) options.unset_env.push_back(name);
  }
  options.args = Words(words);
  options.args.insert(options.args.begin(), SHOAL_RANK_PROGRAM);
  auto process = Subprocess::Start(options);
  EXPECT_TRUE(process.ok()) << process.status();
  return std::move(process).value();
}

ProcessResult RunJob(const std::string& words, absl::Duration timeout = kLong) {
  const absl::StatusOr<ProcessResult> result = Launch(words)->Wait(timeout);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.value_or(ProcessResult());
}

int CountOf(const std::string& text, const std::string& word) {
  int count = 0;
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++count;
  return count;
}

TEST(AgentTest, EveryRankKnowsItsPlace) {
  TempDir dir;
  const ProcessResult result =
      RunJob("--nproc-per-node 4 --rdzv-id night --log-dir " + (dir / "a/logs") + " show");
  EXPECT_EQ(result.exit_code, kExitOk) << result.ToString();
  EXPECT_THAT(result.out,
              HasSubstr("rank 0 of 4, local 0 of 4, node 0 of 1, source SHOAL, master unix:shoal-"));
  EXPECT_EQ(CountOf(result.out, "\n"), 1) << "only rank 0 has our stdout: " << result.out;
  EXPECT_EQ(result.err, "");
  for (const std::string rank : {"1", "2", "3"}) {
    EXPECT_THAT(ReadFile(dir / ("a/logs/rank-" + rank + ".log")),
                AllOf(HasSubstr("rank " + rank + " of 4, local " + rank + " of 4"), HasSubstr("job night")));
  }
}

TEST(AgentTest, RanksOfTheSecondHost) {
  const ProcessResult result =
      RunJob("--nproc-per-node=2 --nnodes=3 --node-rank=0 --rdzv-endpoint=[fe80::1]:77 show");
  EXPECT_THAT(result.out,
              HasSubstr("rank 0 of 6, local 0 of 2, node 0 of 3, source SHOAL, master fe80::1:77"));
  TempDir dir;
  RunJob("--nproc-per-node=2 --nnodes=3 --node-rank=1 --log-dir " + dir.path() + " show");
  EXPECT_THAT(ReadFile(dir / "rank-3.log"),
              HasSubstr("rank 3 of 6, local 1 of 2, node 1 of 3, source SHOAL, master 127.0.0.1:29500"));
}

TEST(AgentTest, IdleThreadsOfACrowdedHostDoNotSpinUnlessAsked) {
  const auto policy = [](const std::string& words, const std::map<std::string, std::string>& env) {
    return Launch(words + " variable OMP_WAIT_POLICY", env)->Wait(kLong)->out;
  };
  EXPECT_EQ(policy("--crowded", {}), "OMP_WAIT_POLICY=passive\n");
  EXPECT_EQ(policy("--crowded", {{"OMP_WAIT_POLICY", "active"}}), "OMP_WAIT_POLICY=active\n");
  EXPECT_EQ(policy("--crowded", {{"GOMP_SPINCOUNT", "100"}}), "OMP_WAIT_POLICY=(not set)\n");
  EXPECT_EQ(policy("", {}), "OMP_WAIT_POLICY=(not set)\n");
}

TEST(AgentTest, ALogIsKeptWhenTheJobStartsAgain) {
  TempDir dir;
  RunJob("--nproc-per-node=2 --rdzv-id=first --log-dir " + dir.path() + " show");
  RunJob("--nproc-per-node=2 --rdzv-id=second --log-dir " + dir.path() + " show");
  EXPECT_THAT(ReadFile(dir / "rank-1.log"), AllOf(HasSubstr("job first"), HasSubstr("job second")));
}

TEST(AgentTest, ExitCodeOfARankIsReported) {
  TempDir dir;
  const ProcessResult result =
      RunJob("--nproc-per-node 4 --log-dir " + dir.path() + " fail 2 exit 3", kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_EQ(CountOf(result.err, "shoal: "), 1) << result.err;
  EXPECT_THAT(result.err, HasSubstr("shoal: rank 2 of 4 exited with code 3"));
  EXPECT_TRUE(std::regex_search(result.err, std::regex("local rank 2, pid [0-9]+, host ."))) << result.err;
  EXPECT_THAT(result.err, HasSubstr("its last lines (" + (dir / "rank-2.log") + "):"));
  EXPECT_THAT(result.err, HasSubstr("last words of rank 2"));
  EXPECT_THAT(result.err, Not(HasSubstr("then: "))) << "the others ended because of the launcher";
}

TEST(AgentTest, KilledRankIsReported) {
  const ProcessResult result = RunJob("--nproc-per-node 4 fail 1 signal 9", kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("shoal: rank 1 of 4 killed by signal 9 (SIGKILL)"));
}

TEST(AgentTest, StoppedRankAmongStubbornOnesEndsWithinTenSeconds) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 4 --stubborn fail 3 signal 19");
  const auto ranks = WaitForRanks(launcher->pid(), 4, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  ASSERT_TRUE(launcher->WaitForOutput("was stopped by SIGSTOP", kLong).ok());
  const auto result = launcher->Wait(kEndMax);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitFailure);
  EXPECT_THAT(result->err, HasSubstr("shoal: rank 3 of 4 stopped by SIGSTOP for 3."));
  EXPECT_TRUE(WaitAllGone(*ranks, absl::ZeroDuration()).ok());
}

TEST(AgentTest, StoppedRankThatGoesOnInTimeIsFine) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 2 interrupts");
  const auto ranks = WaitForRanks(launcher->pid(), 2, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  ASSERT_TRUE(launcher->WaitForOutput("[rank 1] ", kLong).ok());
  (*ranks)[1].Signal(SIGSTOP);
  ASSERT_TRUE(launcher->WaitForOutput("rank 1 (pid ", kLong).ok());
  (*ranks)[1].Signal(SIGCONT);
  // Longer than the time after which a stopped rank has failed.
  EXPECT_FALSE(launcher->Wait(absl::Seconds(4)).ok());
  launcher->Signal(SIGTERM);
  EXPECT_EQ(launcher->Wait(kEndMax)->exit_code, kExitSignalBase + SIGTERM);
}

TEST(AgentTest, RanksThatLostAPeerAreNotBlamed) {
  const ProcessResult result = RunJob("--nproc-per-node 4 peers-lost", kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("shoal: rank 3 of 4 killed by signal 6 (SIGABRT)"));
  EXPECT_EQ(CountOf(result.err, "exited with code 75 (peer lost)"), 3) << result.err;
}

TEST(AgentTest, ALostPeerOnAnotherHostIsAskedFor) {
  const ProcessResult result = RunJob("--nproc-per-node 2 fail 1 exit 75", kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("see the launcher on that rank's host"));
}

TEST(AgentTest, SignalsReachEveryRank) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 2 fail 9 exit 0");
    const auto ranks = WaitForRanks(launcher->pid(), 2, kLong);
    ASSERT_TRUE(ranks.ok()) << ranks.status();
    launcher->SignalGroup(number);
    const auto result = launcher->Wait(kEndMax);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->exit_code, kExitSignalBase + number) << result->ToString();
    EXPECT_TRUE(WaitAllGone(*ranks, absl::ZeroDuration()).ok());
    EXPECT_THAT(result->err, Not(HasSubstr("shoal: rank"))) << "no rank is to blame";
  }
}

TEST(AgentTest, ASecondInterruptEndsStubbornRanksAtOnce) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 2 --stubborn interrupts");
  ASSERT_TRUE(launcher->WaitForOutput("[rank 1] ", kLong).ok());
  ASSERT_TRUE(launcher->WaitForOutput("rank 0 ", kLong).ok());
  launcher->Signal(SIGTERM);
  ASSERT_TRUE(launcher->WaitForOutput("SIGTERM: ending 2 ranks; another one ends them at once", kLong).ok());
  const absl::Time start = absl::Now();
  launcher->Signal(SIGTERM);
  EXPECT_EQ(launcher->Wait(kLong)->exit_code, kExitSignalBase + SIGTERM);
  EXPECT_LT(absl::Now() - start, absl::Seconds(4)) << "they had 30 s to save";
}

TEST(AgentTest, ARankThatIsStoppedInsteadOfEndingIsKilled) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 1 --stubborn interrupts");
  ASSERT_TRUE(launcher->WaitForOutput("counting", kLong).ok());
  const auto ranks = WaitForRanks(launcher->pid(), 1, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  launcher->Signal(SIGTERM);
  ASSERT_TRUE(launcher->WaitForOutput("SIGTERM: ending 1 rank", kLong).ok());
  (*ranks)[0].Signal(SIGSTOP);
  const auto result = launcher->Wait(kEndMax);
  ASSERT_TRUE(result.ok()) << result.status() << "; it had 30 s to save";
  EXPECT_EQ(result->exit_code, kExitSignalBase + SIGTERM);
}

TEST(AgentTest, ARankThatEndedAsAskedEndsTheJobWithoutBlame) {
  const ProcessResult result = RunJob("--nproc-per-node 3 fail 1 exit 143", kEndMax);
  EXPECT_EQ(result.exit_code, kExitSignalBase + SIGTERM);
  EXPECT_THAT(result.err, AllOf(HasSubstr("shoal: rank 1 ended as asked by SIGTERM: ending 2 ranks"),
                                Not(HasSubstr("exited with code"))));
}

TEST(AgentTest, Usr1IsPassedOn) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 2 fail 9 exit 0");
  const auto ranks = WaitForRanks(launcher->pid(), 2, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  launcher->Signal(SIGUSR1);
  const auto result = launcher->Wait(kEndMax);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitFailure);
  EXPECT_THAT(result->err, HasSubstr("killed by signal 10 (SIGUSR1)"));
}

TEST(AgentTest, NoRankOutlivesAKilledLauncher) {
  const std::unique_ptr<Subprocess> launcher = Launch("--nproc-per-node 4 --stubborn fail 9 exit 0");
  const auto ranks = WaitForRanks(launcher->pid(), 4, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  launcher->Signal(SIGKILL);
  const absl::Status gone = WaitAllGone(*ranks, kEndMax);
  EXPECT_TRUE(gone.ok()) << gone;
}

TEST(AgentTest, WhatARankLeavesBehindIsEnded) {
  const ProcessResult result = RunJob("--nproc-per-node 1 leave");
  EXPECT_EQ(result.exit_code, kExitOk) << result.ToString();
  int pid = 0;
  ASSERT_EQ(std::sscanf(result.out.c_str(), "left %d behind", &pid), 1) << result.out;
  const absl::Status gone = ProcessHandle(pid).WaitGone(kEndMax);
  EXPECT_TRUE(gone.ok()) << gone;
}

// Until `word` has come so often, or the terminal's last user has gone (EIO).
std::string ReadUntil(int fd, const std::string& word, int times) {
  std::string text;
  char buffer[4096];
  while (CountOf(text, word) < times) {
    const ssize_t bytes = read(fd, buffer, sizeof(buffer));
    if (bytes <= 0) break;
    text.append(buffer, static_cast<size_t>(bytes));
  }
  return text;
}

TEST(AgentTest, CtrlCReachesEveryRankOnce) {
  int terminal = -1;
  const pid_t launcher = forkpty(&terminal, nullptr, nullptr, nullptr);
  ASSERT_GE(launcher, 0);
  if (launcher == 0) {
    // "stty tostop": rank 0 writes to the terminal from a background group.
    termios settings = {};
    tcgetattr(STDOUT_FILENO, &settings);
    settings.c_lflag |= TOSTOP;
    tcsetattr(STDOUT_FILENO, TCSANOW, &settings);
    execl(SHOAL_RANK_PROGRAM, SHOAL_RANK_PROGRAM, "--nproc-per-node=2", "interrupts", nullptr);
    _exit(127);
  }
  alarm(60);  // Ends the test if the terminal stays silent.
  std::string text = ReadUntil(terminal, "] counting", 2);
  EXPECT_EQ(write(terminal, "\x03", 1), 1);
  text += ReadUntil(terminal, "the end", 1);
  alarm(0);
  EXPECT_EQ(CountOf(text, "interrupts: 1"), 2) << text;
  int status = 0;
  ASSERT_EQ(waitpid(launcher, &status, 0), launcher);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == kExitSignalBase + SIGINT) << text;
  close(terminal);
}

// Until the launcher has printed `word` so often.
void WaitForCount(Subprocess& launcher, const std::string& word, int times) {
  const absl::Time deadline = absl::Now() + kLong;
  while (CountOf(launcher.err(), word) < times && absl::Now() < deadline) {
    (void)launcher.WaitForOutput("never printed", absl::Milliseconds(20));
  }
  EXPECT_GE(CountOf(launcher.err(), word), times) << launcher.err();
}

TEST(AgentTest, AKilledRankOfAnElasticJobComesBack) {
  TempDir dir;
  const std::unique_ptr<Subprocess> launcher = Launch(
      "--nproc-per-node 3 --rdzv-backend shoal --max-restarts 2 sums " + (dir / "stop"));
  WaitForCount(*launcher, "epoch of 3", 3);
  for (int kill = 1; kill <= 2; ++kill) {
    const auto ranks = WaitForRanks(launcher->pid(), 3, kLong);
    ASSERT_TRUE(ranks.ok()) << ranks.status();
    (*ranks)[kill].Signal(SIGKILL);
    WaitForCount(*launcher, "epoch of 3", 3 + 3 * kill);
  }
  testing::WriteFile(dir / "stop", "");
  const auto result = launcher->Wait(kLong);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitOk) << result->ToString();
  EXPECT_THAT(result->err, HasSubstr("killed by signal 9 (SIGKILL); it is started again, 1 of 2 times"));
  EXPECT_THAT(result->err, HasSubstr("restart 1"));
}

TEST(AgentTest, WhenItsRestartsAreUsedUpTheRankIsBlamed) {
  TempDir dir;
  const std::unique_ptr<Subprocess> launcher =
      Launch("--nproc-per-node 2 --rdzv-backend shoal sums " + (dir / "stop"));
  WaitForCount(*launcher, "epoch of 2", 2);
  const auto ranks = WaitForRanks(launcher->pid(), 2, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  (*ranks)[1].Signal(SIGKILL);
  const auto result = launcher->Wait(kEndMax);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitFailure);
  EXPECT_THAT(result->err, HasSubstr("shoal: rank 1 of 2 killed by signal 9 (SIGKILL)"));
}

// Two launchers: the first to listen at the endpoint coordinates. When the other one's host fails, its ranks go on.
TEST(AgentTest, HostsOfAnElasticJobComeAndGo) {
  TempDir dir;
  const std::string words = absl::StrCat("--nproc-per-node 2 --nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:",
                                         testing::ProbablyFreePort(), " sums ", dir / "stop");
  const std::unique_ptr<Subprocess> first = Launch(words);
  WaitForCount(*first, "epoch of 2", 2);
  {
    const std::unique_ptr<Subprocess> second = Launch(words);
    WaitForCount(*first, "epoch of 4", 2);
    EXPECT_THAT(second->err(), HasSubstr("the launcher of another host coordinates"));
    second->Signal(SIGKILL);
  }
  WaitForCount(*first, "epoch of 2", 4);
  testing::WriteFile(dir / "stop", "");
  const auto result = first->Wait(kLong);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitOk) << result->ToString();
}

TEST(AgentTest, ProgramsOfFixedSizeRefuseElasticJobs) {
  const ProcessResult result = RunJob("--nproc-per-node 2 --rdzv-backend shoal show");
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("this program cannot join"));
}

TEST(AgentTest, MistakesAreNamed) {
  EXPECT_EQ(RunJob("--nnodes 1:2 show").exit_code, kExitUsage);
  const ProcessResult unwritable = RunJob("--log-dir /proc/nowhere/logs show");
  EXPECT_EQ(unwritable.exit_code, kExitFailure);
  EXPECT_THAT(unwritable.err, HasSubstr("/proc/nowhere/logs"));
  ::testing::internal::CaptureStderr();
  const std::vector<std::string> command = {"/no/such/program"};
  EXPECT_EQ(RunAgent({}, command), kExitFailure);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("cannot execute /no/such/program"));
}

}  // namespace
}  // namespace shoal
