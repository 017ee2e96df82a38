#include "launch/trainer/schedule.h"

#include <cmath>
#include <numbers>

#include "gtest/gtest.h"

namespace shoal {
namespace {

Config ConfigWith(const std::string& kind) {
  Config config;
  config.mutable_optimizer()->set_lr(1e-3);
  config.mutable_scheduler()->set_kind(kind);
  config.mutable_scheduler()->set_warmup_steps(4);
  config.mutable_scheduler()->set_decay_steps(20);
  config.mutable_scheduler()->set_min_lr(1e-4);
  config.mutable_scheduler()->set_wsd_decay_steps(5);
  return config;
}

TEST(LearningRate, WarmsUpLinearlyWhateverTheKind) {
  for (const char* kind : {"cosine", "linear", "wsd", "constant"}) {
    for (int step = 0; step < 4; ++step) EXPECT_DOUBLE_EQ(LearningRate(ConfigWith(kind), step), 1e-3 * (step + 1) / 4) << kind;
    EXPECT_DOUBLE_EQ(LearningRate(ConfigWith(kind), 4), 1e-3) << kind;
  }
}

TEST(LearningRate, ReachesTheMinimumAtDecaySteps) {
  for (const char* kind : {"cosine", "linear", "wsd"}) {
    const Config config = ConfigWith(kind);
    EXPECT_GT(LearningRate(config, 19), 1e-4) << kind;
    EXPECT_DOUBLE_EQ(LearningRate(config, 20), 1e-4) << kind;
    EXPECT_DOUBLE_EQ(LearningRate(config, 1000), 1e-4) << kind;
  }
  EXPECT_DOUBLE_EQ(LearningRate(ConfigWith("constant"), 1000), 1e-3);
}

TEST(LearningRate, HasTheShapesOfTheirNames) {
  EXPECT_DOUBLE_EQ(LearningRate(ConfigWith("cosine"), 8), 1e-4 + 0.45e-3 * (1 + std::cos(std::numbers::pi * 0.25)));
  EXPECT_DOUBLE_EQ(LearningRate(ConfigWith("linear"), 8), 1e-4 + 0.9e-3 * 0.75);
  EXPECT_DOUBLE_EQ(LearningRate(ConfigWith("wsd"), 15), 1e-3);
  EXPECT_DOUBLE_EQ(LearningRate(ConfigWith("wsd"), 18), 1e-4 + 0.9e-3 * 0.4);
}

}  // namespace
}  // namespace shoal
