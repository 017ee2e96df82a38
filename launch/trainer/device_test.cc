// A rank whose model is on a device: TestDevice(), emulated or with SHOAL_TEST_DEVICE=cuda a GPU.
#include "launch/trainer/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "launch/checkpoint/checkpoint.h"
#include "launch/trainer/session.h"
#include "launch/trainer/testing.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

constexpr int64_t kRows = 2, kSeq = 8;

Config SmallConfig() {
  Config config = testing::TinyConfig(kRows, kSeq);
  config.mutable_schedule()->set_gradient_slices("plain");
  ResolveConfig(&config);
  return config;
}

std::unique_ptr<RankModel> ModelOn(Device* device, const Config& config, Communicator& world) {
  auto model = RankModel::Create(config, ModelConfigOf(config), world, {.device = device});
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

// Of the step's loss; its tokens depend on `step` alone.
double TrainOne(int64_t step, RankModel& model) {
  const Range mine = model.RowsOf(kRows);
  const Tensor rows = Empty({mine.count, kSeq + 1}, DType::kI32);
  for (int64_t i = 0; i < rows.elements(); ++i) {
    rows.data<int32_t>()[i] = static_cast<int32_t>((97 * (i + mine.begin * (kSeq + 1)) + 31 * step) % 256);
  }
  const absl::StatusOr<StepResult> result = model.Train({rows}, 1e-2, step + 1);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? result->loss : 0;
}

void ExpectSameBits(const std::vector<Shard>& got, const std::vector<Shard>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].name, want[i].name);
    ASSERT_EQ(got[i].data.bytes(), want[i].data.bytes());
    EXPECT_EQ(std::memcmp(got[i].data.raw(), want[i].data.raw(), static_cast<size_t>(got[i].data.bytes())), 0) << got[i].name;
  }
}

class OnDevice : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, OnDevice, ::testing::Values(1, 2));

TEST_P(OnDevice, AResumedRunHasTheSameBits) {
  const TempDir folder;
  RunRanks(GetParam(), "auto", [&](Communicator& world) {
    const Config config = SmallConfig();
    const auto whole = ModelOn(&kernels::testing::TestDevice(), config, world);
    ASSERT_TRUE(LoadWeights({.seed = 4}, *whole).ok());
    TrainOne(0, *whole);
    auto group = world.Split(GetParam() == 1 ? std::vector<int>{0} : std::vector<int>{0, 1});
    ASSERT_TRUE(group.ok()) << group.status();
    auto checkpointer = Checkpointer::Create({.run_dir = folder.path()}, *std::move(group));
    ASSERT_TRUE(checkpointer.ok()) << checkpointer.status();
    ASSERT_TRUE((*checkpointer)->Save(1, "", CheckpointShards(*whole)).ok());
    ASSERT_EQ((*checkpointer)->Wait(), absl::OkStatus());
    const double loss = TrainOne(1, *whole);

    const auto checkpoint = FindCheckpoint(folder.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto resumed = ModelOn(&kernels::testing::TestDevice(), config, world);
    ASSERT_EQ(LoadWeights({.checkpoint = checkpoint->get()}, *resumed), absl::OkStatus());
    EXPECT_EQ(TrainOne(1, *resumed), loss);
    ExpectSameBits(CheckpointShards(*resumed), CheckpointShards(*whole));

    // The CPU goes on from it as well.
    const auto processor = ModelOn(nullptr, config, world);
    ASSERT_EQ(LoadWeights({.checkpoint = checkpoint->get()}, *processor), absl::OkStatus());
    EXPECT_NEAR(TrainOne(1, *processor), loss, 1e-5 * loss);
  });
}

TEST(DeviceModel, TheNextTokenIsAsLikelyAsOnTheCpu) {
  RunRanks(1, "auto", [](Communicator& world) {
    const Config config = SmallConfig();
    const auto device = ModelOn(&kernels::testing::TestDevice(), config, world), processor = ModelOn(nullptr, config, world);
    const Tensor ids = Empty({5}, DType::kI32);
    for (int i = 0; i < 5; ++i) ids.data<int32_t>()[i] = 10 * i;
    std::vector<Tensor> logits;
    for (RankModel* model : {device.get(), processor.get()}) {
      ASSERT_EQ(LoadWeights({.seed = 4}, *model), absl::OkStatus());
      const auto next = model->NextLogits(ids);
      ASSERT_TRUE(next.ok()) << next.status();
      logits.push_back(*next);
    }
    for (int i = 0; i < 256; ++i) EXPECT_NEAR(logits[0].data<float>()[i], logits[1].data<float>()[i], 1e-5) << i;
  });
}

TEST(DeviceFor, WithoutAGpuItIsTheCpuOrAnError) {
  Config config = SmallConfig();
  EXPECT_EQ(*DeviceFor(config, {}), nullptr);
  if (std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "this machine has one";
  config.mutable_train()->set_device("auto");
  ASSERT_TRUE(DeviceFor(config, {}).ok());
  EXPECT_EQ(*DeviceFor(config, {}), nullptr);
  config.mutable_train()->set_device("cuda");
  EXPECT_THAT(std::string(DeviceFor(config, {}).status().message()), HasSubstr("train.device: cuda: "));
}

}  // namespace
}  // namespace shoal
