// `shoal trace` and `shoal profile` as a user runs them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <utility>

#include "launch/agent/exit_codes.h"
#include "nlohmann/json.hpp"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"
#include "tests/process/processes.h"

namespace shoal {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::ProcessResult;
using testing::ReadFile;
using testing::RunProcess;
using testing::TempDir;
using testing::WriteFile;

class TraceTest : public ::testing::Test {
 protected:
  ProcessResult Run(std::vector<std::string> args) const {
    args.insert(args.begin(), SHOAL_PROGRAM);
    const auto result = RunProcess({.args = std::move(args),
                                    .env = {{"OMP_NUM_THREADS", "1"}, {"OMP_WAIT_POLICY", "passive"}},
                                    .unset_env = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"},
                                    .cwd = folder_.path()},
                                   absl::Seconds(90));
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *result : ProcessResult();
  }
  TempDir folder_;
};

TEST_F(TraceTest, WritesTheLastStepsOfAllRanksAndNothingElse) {
  const ProcessResult result =
      Run({"trace", SHOAL_TINY_CONFIG, "--nproc-per-node", "2", "--steps", "4", "-o", "step.json"});
  ASSERT_TRUE(result.ok()) << result.ToString();
  EXPECT_THAT(result.out, AllOf(HasSubstr("scheduling overhead"), HasSubstr("exposed communication"), HasSubstr("ns/row"),
                                HasSubstr("Wrote step.json (2 steps, all ranks)")));
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) files += entry.exists() ? 1 : 0;
  EXPECT_EQ(files, 1u);
  const json trace = json::parse(ReadFile(folder_ / "step.json"), nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(trace.is_object());
  std::map<std::pair<int, int>, double> ends;  // By process and thread.
  std::map<std::pair<int, int>, int> tasks;    // By process and step.
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X") continue;
    const int pid = event.at("pid"), tid = event.at("tid");
    ++tasks[{pid, event.at("args").at("step")}];
    double& end = ends[{pid, tid}];
    const double begin = event.at("ts"), duration = event.at("dur");
    // Predicted steps may last longer than measured ones.
    if (pid < 2) {
      EXPECT_GE(begin, end - 0.01) << event;
    }
    end = begin + duration;
  }
  ASSERT_EQ(tasks.size(), 8u);  // Two ranks, measured and predicted, two steps.
  for (const auto& [key, count] : tasks) EXPECT_EQ(count, (tasks[{0, key.second}]));
}

TEST_F(TraceTest, ShowsProfilesAndSaysWhatIsWrongWithThem) {
  WriteFile(folder_ / "profile.json", R"({"version": 1, "about": "a run", "interference": 1.5, "costs": [
      {"op": "dispatch", "phase": "forward", "lane": "inter", "fixed_ns": 50000, "ns_per_unit": 8, "residual": 0.1, "samples": 7,
       "units_low": 1e6, "units_high": 2e6, "step_ns": 3e6}]})");
  for (const std::string& path : {folder_.path(), folder_ / "profile.json"}) {
    const ProcessResult result = Run({"profile", "show", path});
    EXPECT_TRUE(result.ok()) << result.ToString();
    EXPECT_THAT(result.out, AllOf(HasSubstr("a run"), HasSubstr("1.50 times"), HasSubstr("0.125 GB/s"), HasSubstr("1-2 MB")));
  }
  WriteFile(folder_ / "broken.json", "{}");
  const ProcessResult broken = Run({"profile", "show", folder_ / "broken.json"});
  EXPECT_NE(broken.exit_code, kExitOk);
  EXPECT_THAT(broken.err, HasSubstr("broken.json: `version` is not 1"));
  EXPECT_NE(Run({"profile", "show", "nowhere"}).exit_code, kExitOk);
}

}  // namespace
}  // namespace shoal
