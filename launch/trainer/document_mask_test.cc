// Training within documents (data.document_mask): on ranks, on a device, in recorded steps, as alone on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "launch/trainer/session.h"
#include "launch/trainer/testing.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using kernels::testing::TestDevice;

constexpr int64_t kRows = 4, kSeq = 12;
constexpr int32_t kEnd = 7;

enum class Graphs : uint8_t { kOff, kAuto };

Config SmallConfig(bool document_mask, Graphs graphs) {
  Config config = testing::TinyConfig(kRows, kSeq);
  config.mutable_data()->set_document_mask(document_mask);
  config.mutable_data()->set_end_of_document_token(kEnd);
  config.mutable_schedule()->set_device_graphs(graphs == Graphs::kAuto ? "auto" : "off");
  return config;
}

std::unique_ptr<RankModel> NewModel(Config config, Communicator& world, Device* device) {
  ResolveConfig(&config);
  auto model = RankModel::Create(config, ModelConfigOf(config), world, {.device = device});
  SHOAL_CHECK(model.ok()) << model.status().ToString();
  SHOAL_CHECK_OK(LoadWeights({.seed = 4}, **model));
  return *std::move(model);
}

// Documents begin and end at other places in each step.
Tensor TokensOf(int64_t step, Range rows) {
  const Tensor tokens = Empty({rows.count, kSeq + 1}, DType::kI32);
  for (int64_t i = 0; i < tokens.elements(); ++i) {
    const int64_t at = i + rows.begin * (kSeq + 1);
    tokens.data<int32_t>()[i] = static_cast<int32_t>((at + step) * (at + 3) % 5 == 0 ? kEnd : (97 * at + 31 * step) % 256);
  }
  return tokens;
}

// Losses of some steps, and last of a validation.
std::vector<double> LossesOf(RankModel& model) {
  std::vector<double> losses;
  const Range mine = model.RowsOf(kRows);
  for (int64_t step = 0; step < 5; ++step) {
    const auto result = model.Train({TokensOf(step, mine)}, 1e-2, step + 1);
    SHOAL_CHECK(result.ok()) << result.status().ToString();
    losses.push_back(result->loss);
  }
  const auto loss = model.Evaluate(TokensOf(9, mine), kRows);
  SHOAL_CHECK(loss.ok()) << loss.status().ToString();
  losses.push_back(*loss);
  return losses;
}

std::vector<double> LossesOnOneRank(bool document_mask, Graphs graphs, Device* device) {
  std::vector<double> losses;
  RunRanks(1, "auto", [&](Communicator& world) { losses = LossesOf(*NewModel(SmallConfig(document_mask, graphs), world, device)); });
  return losses;
}

void ExpectNear(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-5 * want[i]) << i;
}

TEST(DocumentMask, ChangesWhatIsTrained) {
  const std::vector<double> with = LossesOnOneRank(true, Graphs::kOff, nullptr), without = LossesOnOneRank(false, Graphs::kOff, nullptr);
  for (size_t i = 0; i < with.size(); ++i) EXPECT_GT(std::abs(with[i] - without[i]), 1e-4) << i;
}

TEST(DocumentMask, GivesTheSameOnTwoRanksAndRecomputed) {
  const std::vector<double> want = LossesOnOneRank(true, Graphs::kOff, nullptr);
  RunRanks(2, "auto", [&](Communicator& world) {
    Config config = SmallConfig(true, Graphs::kOff);
    config.mutable_parallel()->set_expert(2);
    for (Device* device : {static_cast<Device*>(nullptr), &TestDevice()}) {
      for (const bool recompute : {false, true}) {
        config.mutable_train()->set_recompute(recompute);
        ExpectNear(LossesOf(*NewModel(config, world, device)), want);
      }
    }
  });
}

// Recorded steps read the documents of their own tokens.
TEST(DocumentMask, GivesTheSameOnADeviceAndTheSameBitsInRecordedSteps) {
  const std::vector<double> plain = LossesOnOneRank(true, Graphs::kOff, &TestDevice());
  ExpectNear(plain, LossesOnOneRank(true, Graphs::kOff, nullptr));
  EXPECT_EQ(LossesOnOneRank(true, Graphs::kAuto, &TestDevice()), plain);
}

}  // namespace
}  // namespace shoal
