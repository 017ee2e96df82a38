#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <numeric>
#include <nlohmann/json.hpp>
#include <sstream>

#include "launch/agent/exit_codes.h"
#include "launch/cli/commands.h"
#include "launch/cli/plan_flags.h"

namespace shoal {
namespace {

using testing::HasSubstr;
using testing::internal::CaptureStderr;
using testing::internal::CaptureStdout;
using testing::internal::GetCapturedStderr;
using testing::internal::GetCapturedStdout;

using Args = std::vector<std::string>;

const std::string kConfig = SHOAL_SOURCE_DIR "/configs/bench-tiny.yaml";
const std::string kCluster = SHOAL_SOURCE_DIR "/configs/clusters/emulated-4.yaml";

std::string Read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

TEST(PlanFlags, ReadAConfigurationAsThePlannerSeesIt) {
  const auto loaded = LoadConfig(kConfig,
                                 Args{"parallel.expert=-1", "parallel.dense=sharded", "parallel.rematerialise=true",
                                      "train.recompute=true", "train.gradient_accumulation_steps=2", "schedule.prefetch=3",
                                      "model.dense_layers=[1]", "train.precision=bf16", "schedule.chunks_forward=5"},
                                 Files::kMayBeMissing);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const StepLayout layout = LayoutOf(loaded->config, 4);
  EXPECT_EQ(layout.ToString(), "expert 4, rematerialise, dense sharded, recompute, 2 parts, prefetch 3");
  const ModelShape model = ModelShapeOf(loaded->config);
  EXPECT_EQ(model.moe, (std::vector<bool>{true, false, true, true}));
  EXPECT_EQ(model.compute_bytes, 2);
  EXPECT_EQ(model.dense_inner, 1024);
  EXPECT_EQ(model.kv_size, 128);
  EXPECT_EQ(SchedulerOptionsOf(loaded->config).chunks_forward, 5);
  EXPECT_EQ(SchedulerOptionsOf(loaded->config).waves, (std::vector<int>{1, 2, 4, 8}));
  const std::vector<int64_t> elements = model.BucketElements();
  ASSERT_EQ(model.blocks.size(), elements.size());
  for (size_t bucket = 0; bucket < elements.size(); ++bucket) {
    EXPECT_EQ(std::accumulate(model.blocks[bucket].begin(), model.blocks[bucket].end(), int64_t{0}), elements[bucket]) << bucket;
  }
}

TEST(RunSimulate, PrintsAPredictionAndWritesATrace) {
  const std::string trace = testing::TempDir() + "/predicted.json";
  CaptureStdout();
  EXPECT_EQ(RunSimulate(Args{kConfig, "--cluster", kCluster, "--set", "parallel.expert=4", "--trace", trace}), kExitOk);
  const std::string text = GetCapturedStdout();
  for (const char* line : {"ranks        4 on 4 hosts", "layout       expert 4", "step ", "exposed ", "peak memory "}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_GT(nlohmann::json::parse(Read(trace))["traceEvents"].size(), 50u);
}

TEST(RunSimulate, NamesWhatDoesNotFit) {
  CaptureStderr();
  EXPECT_EQ(RunSimulate(Args{kConfig, "--cluster", kCluster, "--set", "parallel.expert=3"}), kExitUsage);
  EXPECT_THAT(GetCapturedStderr(), HasSubstr("3 does not divide 4 ranks"));
  CaptureStderr();
  EXPECT_EQ(RunSimulate(Args{kConfig, "--cluster", "/none.yaml"}), kExitUsage);
  EXPECT_THAT(GetCapturedStderr(), HasSubstr("/none.yaml"));
  CaptureStderr();
  EXPECT_EQ(RunSimulate(Args{"sweep", "fsmo"}), kExitUsage);
  EXPECT_THAT(GetCapturedStderr(), HasSubstr("fsmoe, hecate, calibration or dispatch"));
}

TEST(RunPlan, AppliesTheBestLayout) {
  const std::string best = testing::TempDir() + "/best.yaml";
  CaptureStdout();
  EXPECT_EQ(RunPlan(Args{kConfig, "--cluster", kCluster, "--top", "2", "--apply", best}), kExitOk);
  const std::string text = GetCapturedStdout();
  EXPECT_THAT(text, HasSubstr("  1 "));
  EXPECT_THAT(text, HasSubstr("wrote the first to"));
  const auto applied = LoadConfig(best, {}, Files::kMayBeMissing);
  ASSERT_TRUE(applied.ok()) << applied.status();
  EXPECT_THAT(text, HasSubstr(LayoutOf(applied->config, 4).ToString()));
}

}  // namespace
}  // namespace shoal
