// One program under every launcher: Shoal's own, torchrun's variables, mpirun, srun, two hosts. Which program
// is said by the environment, the helper of these tests if it says nothing:
//   SHOAL_TEST_PROGRAM  command line of a job that ends by itself; launcher flags are put behind it
//   SHOAL_TEST_EXPECT   what rank 0 of such a job with four ranks prints on stdout
//   SHOAL_TEST_ENDLESS  command line of a job that goes on until it is ended
//   SHOAL_TEST_RUNNING  what rank 0 of it prints once the ranks have met
// "{tmp}" in a command line becomes a folder of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "launch/agent/exit_codes.h"
#include "runtime/base/status.h"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"
#include "tests/process/network_hosts.h"
#include "tests/process/processes.h"
#include "tests/process/slurm_cluster.h"

namespace shoal {
namespace {

using ::testing::AnyOf;
using testing::FindCommand;
using ::testing::HasSubstr;
using testing::NetworkHosts;
using testing::ProcessResult;
using testing::SlurmCluster;
using testing::Subprocess;
using testing::SubprocessOptions;
using testing::WaitAllGone;
using testing::WaitForRanks;
using testing::Words;

using Command = std::vector<std::string>;

constexpr absl::Duration kLong = absl::Seconds(60);
constexpr absl::Duration kEndMax = absl::Seconds(10);  // From a rank's failure to the end of the job.

std::string Setting(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : fallback;
}

// Whatever launched the test must not be taken for the launcher under test.
std::vector<std::string> LauncherVariables() {
  std::vector<std::string> names = {"RANK",        "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                                    "MASTER_ADDR", "MASTER_PORT"};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string name = std::string(*entry).substr(0, std::string(*entry).find('='));
    for (const char* prefix : {"SLURM", "OMPI_", "PMI", "PET_", "TORCHELASTIC_", "GROUP_", "ROLE_"}) {
      if (name.rfind(prefix, 0) == 0) names.push_back(name);
    }
  }
  return names;
}

Command operator+(Command a, const Command& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class LaunchersTest : public ::testing::Test {
 protected:
  // Shells start background jobs with SIGINT ignored: the launcher would respect that.
  LaunchersTest() { signal(SIGINT, SIG_DFL); }

  Command Program() { return Line(Setting("SHOAL_TEST_PROGRAM", SHOAL_PROCESS_PROGRAM " meet")); }
  Command Endless() { return Line(Setting("SHOAL_TEST_ENDLESS", SHOAL_PROCESS_PROGRAM " endless")); }
  std::string expect_ = Setting("SHOAL_TEST_EXPECT", "met: rank 0 of 4 by ");
  std::string running_ = Setting("SHOAL_TEST_RUNNING", "running");

  std::unique_ptr<Subprocess> Start(Command command, std::map<std::string, std::string> env = {}) {
    SubprocessOptions options;
    options.args = std::move(command);
    options.env = std::move(env);
    options.unset_env = LauncherVariables();
    auto process = Subprocess::Start(options);
    EXPECT_TRUE(process.ok()) << process.status();
    return std::move(process).value();
  }

  ProcessResult Finish(Subprocess& process, absl::Duration timeout = kLong) {
    const absl::StatusOr<ProcessResult> result = process.Wait(timeout);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.value_or(ProcessResult());
  }

  void ExpectGood(const ProcessResult& result) {
    EXPECT_EQ(result.exit_code, kExitOk) << result.ToString();
    EXPECT_THAT(result.out, HasSubstr(expect_)) << result.ToString();
  }

 private:
  Command Line(const std::string& text) {
    const std::string name = absl::StrCat("job", ++jobs_);
    return Words(absl::StrReplaceAll(text, {{"{tmp}", dir_ / name}}));
  }

  testing::TempDir dir_;
  int jobs_ = 0;
};

TEST_F(LaunchersTest, Own) { ExpectGood(Finish(*Start(Program() + Command{"--nproc-per-node", "4"}))); }

TEST_F(LaunchersTest, TorchrunsFlagsFromTheEnvironment) {
  ExpectGood(Finish(*Start(Program(), {{"PET_NPROC_PER_NODE", "4"}, {"PET_STANDALONE", "1"}})));
}

TEST_F(LaunchersTest, TorchrunsVariables) {
  const std::string port = std::to_string(testing::ProbablyFreePort());
  const Command program = Program();
  std::vector<std::unique_ptr<Subprocess>> ranks;
  for (const std::string rank : {"0", "1", "2", "3"}) {
    ranks.push_back(Start(program, {{"RANK", rank},
                                    {"WORLD_SIZE", "4"},
                                    {"LOCAL_RANK", rank},
                                    {"LOCAL_WORLD_SIZE", "4"},
                                    {"MASTER_ADDR", "127.0.0.1"},
                                    {"MASTER_PORT", port}}));
  }
  for (const auto& rank : ranks) EXPECT_EQ(Finish(*rank).exit_code, kExitOk);
  ExpectGood(Finish(*ranks[0]));
}

TEST_F(LaunchersTest, OpenMpi) {
  std::string mpirun = FindCommand("mpirun.openmpi");
  if (mpirun.empty()) GTEST_SKIP() << "mpirun.openmpi is not installed";
  ExpectGood(Finish(*Start(Command{mpirun, "--oversubscribe", "-np", "4"} + Program(),
                           {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}})));
}

TEST_F(LaunchersTest, Slurm) {
  const auto cluster = SlurmCluster::Start();
  if (absl::IsFailedPrecondition(cluster.status())) GTEST_SKIP() << cluster.status().message();
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const std::map<std::string, std::string> env = {{"SLURM_CONF", (*cluster)->conf()}};
  {
    SCOPED_TRACE("ranks on one host");
    ExpectGood(Finish(*Start(Command{"srun", "-N", "1", "-n", "4"} + Program(), env)));
  }
  {
    SCOPED_TRACE("ranks on two hosts, which meet at a port made from the job's number");
    ExpectGood(Finish(*Start(Command{"srun", "-N", "2", "-n", "4"} + Program(), env)));
  }
  {
    SCOPED_TRACE("one task is not a rank: it launches the ranks");
    ExpectGood(
        Finish(*Start(Command{"srun", "-n", "1"} + Program() + Command{"--nproc-per-node", "4"}, env)));
  }
}

class TwoHostsTest : public LaunchersTest {
 protected:
  Command OnHost(int host, const Command& program) {
    return hosts_->On(
        host, program + Command{"--nproc-per-node=2", "--nnodes=2", "--node-rank=" + std::to_string(host),
                                "--rdzv-endpoint=" + hosts_->Address(0), "--rdzv-id=two"});
  }
  void SetUp() override {
    auto hosts = NetworkHosts::Create();
    if (absl::IsFailedPrecondition(hosts.status())) GTEST_SKIP() << hosts.status().message();
    ASSERT_TRUE(hosts.ok()) << hosts.status();
    hosts_ = std::move(hosts).value();
  }

  std::unique_ptr<NetworkHosts> hosts_;
};

TEST_F(TwoHostsTest, FormOneJob) {
  const Command program = Program();
  const auto second = Start(OnHost(1, program));  // The order must not matter.
  const auto first = Start(OnHost(0, program));
  ExpectGood(Finish(*first));
  EXPECT_EQ(Finish(*second).exit_code, kExitOk);
}

TEST_F(TwoHostsTest, AKilledRankEndsTheJobOnBoth) {
  const Command program = Endless();
  const auto first = Start(OnHost(0, program));
  const auto second = Start(OnHost(1, program));
  const absl::Status started = first->WaitForOutput(running_, kLong);
  ASSERT_TRUE(started.ok()) << started;
  const auto ranks = WaitForRanks(second->pid(), 2, kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  (*ranks)[1].Signal(SIGKILL);
  const ProcessResult there = Finish(*second, kEndMax);
  const ProcessResult here = Finish(*first, kEndMax);
  EXPECT_EQ(there.exit_code, kExitFailure);
  EXPECT_THAT(there.err, HasSubstr("shoal: rank 3 of 4 killed by signal 9 (SIGKILL)"));
  EXPECT_EQ(here.exit_code, kExitFailure);
  EXPECT_THAT(here.err, AnyOf(HasSubstr("shoal: rank 0 of 4 exited with code 75 (peer lost)"),
                              HasSubstr("shoal: rank 1 of 4 exited with code 75 (peer lost)")));
  EXPECT_THAT(here.err, HasSubstr("rank 3")) << "the last lines name the rank that was lost";
}

class FailuresTest : public LaunchersTest {
 protected:
  void SetUp() override {
    launcher_ = Start(Endless() + Command{"--nproc-per-node", "4"});
    const absl::Status started = launcher_->WaitForOutput(running_, kLong);
    ASSERT_TRUE(started.ok()) << started;
    auto ranks = WaitForRanks(launcher_->pid(), 4, kLong);
    ASSERT_TRUE(ranks.ok()) << ranks.status();
    ranks_ = std::move(ranks).value();
  }

  std::unique_ptr<Subprocess> launcher_;
  std::vector<testing::ProcessHandle> ranks_;
};

TEST_F(FailuresTest, KilledRank) {
  ranks_[2].Signal(SIGKILL);
  const ProcessResult result = Finish(*launcher_, kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("shoal: rank 2 of 4 killed by signal 9 (SIGKILL)")) << result.ToString();
  EXPECT_TRUE(WaitAllGone(ranks_, absl::ZeroDuration()).ok());
}

TEST_F(FailuresTest, StoppedRank) {
  ranks_[1].Signal(SIGSTOP);
  const ProcessResult result = Finish(*launcher_, kEndMax);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("shoal: rank 1 of 4 stopped by SIGSTOP")) << result.ToString();
  EXPECT_TRUE(WaitAllGone(ranks_, absl::ZeroDuration()).ok());
}

TEST_F(FailuresTest, KilledLauncher) {
  launcher_->Signal(SIGKILL);
  const absl::Status gone = WaitAllGone(ranks_, kEndMax);
  EXPECT_TRUE(gone.ok()) << gone;
}

TEST_F(FailuresTest, Interrupt) {
  launcher_->Signal(SIGINT);
  EXPECT_EQ(Finish(*launcher_, kEndMax).exit_code, kExitSignalBase + SIGINT);
  EXPECT_TRUE(WaitAllGone(ranks_, absl::ZeroDuration()).ok());
}

TEST_F(LaunchersTest, HalfAnEnvironmentIsAMistake) {
  const ProcessResult result = Finish(*Start(Program(), {{"RANK", "0"}, {"WORLD_SIZE", "4"}}));
  EXPECT_EQ(result.exit_code, kExitUsage);
  EXPECT_THAT(result.err, HasSubstr("LOCAL_RANK is not set")) << result.ToString();
}

TEST_F(LaunchersTest, TwoLaunchersThatDisagreeAreAMistake) {
  const ProcessResult result = Finish(*Start(Program(), {{"RANK", "0"},
                                                         {"WORLD_SIZE", "4"},
                                                         {"LOCAL_RANK", "0"},
                                                         {"OMPI_COMM_WORLD_RANK", "0"},
                                                         {"OMPI_COMM_WORLD_SIZE", "2"},
                                                         {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                                                         {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}));
  EXPECT_EQ(result.exit_code, kExitUsage);
  EXPECT_THAT(result.err, HasSubstr("torchrun says that the world size is 4, Open MPI says 2"))
      << result.ToString();
}

}  // namespace
}  // namespace shoal
