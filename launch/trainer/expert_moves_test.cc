#include "launch/trainer/expert_moves.h"

#include <limits>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "launch/trainer/session.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

TEST(CopiesThatFit, LeaveAQuarterFree) {
  EXPECT_EQ(CopiesThatFit(1000, 75, 20), 10);
  EXPECT_EQ(CopiesThatFit(999, 75, 20), 9);
  EXPECT_EQ(CopiesThatFit(1000, 75, 7), 7);
  EXPECT_EQ(CopiesThatFit(90, 75, 7), 0);
  EXPECT_EQ(CopiesThatFit(0, 75, 7), 0);
  EXPECT_EQ(CopiesThatFit(-5, 75, 7), 0);
  EXPECT_EQ(CopiesThatFit(std::numeric_limits<int64_t>::max(), 1, 64), 64);
}

// Two layers with 6 experts each that move whatever it costs.
Config SparseConfig(int copies) {
  Config config;
  Model& model = *config.mutable_model();
  model.set_hidden_size(16);
  model.set_num_attention_heads(2);
  model.set_num_key_value_heads(2);
  model.set_num_hidden_layers(2);
  model.set_intermediate_size(16);
  model.set_num_local_experts(6);
  config.mutable_train()->set_seq_length(8);
  config.mutable_train()->set_global_batch_size(6);
  config.mutable_parallel()->set_experts("sparse");
  config.mutable_parallel()->set_expert_overlap(2);
  config.mutable_parallel()->set_expert_copies(copies);
  config.mutable_parallel()->set_reshard_interval(2);
  config.mutable_schedule()->set_waves(1);
  ResolveConfig(&config);
  return config;
}

std::unique_ptr<RankModel> NewModel(const Config& config, Communicator& world) {
  auto model = RankModel::Create(config, ModelConfigOf(config), world, {});
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? std::move(*model) : nullptr;
}

StepResult Step(RankModel& model, int update) {
  const Range mine = model.RowsOf(6);
  const Tensor tokens = Empty({mine.count, 9}, DType::kI32);
  for (int64_t i = 0; i < tokens.elements(); ++i) tokens.data<int32_t>()[i] = static_cast<int32_t>((mine.begin * 9 + i) * 37 % 256);
  const auto result = model.Train({tokens}, 1e-3, update);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.value_or(StepResult());
}

TEST(ExpertMoves, RoomIsMeasuredAfterTwoStepsAndTakenWhenItIsNeeded) {
  RunRanks(3, "auto", [](Communicator& world) {
    const std::unique_ptr<RankModel> model = NewModel(SparseConfig(-1), world);
    ASSERT_TRUE(LoadWeights({.seed = 4}, *model).ok());
    const ExpertStore& experts = model->store().experts();
    for (int step = 1; step <= 3; ++step) {
      EXPECT_EQ(Step(*model, step).experts->copies_per_layer > 0, step == 3) << "step " << step;
      // Two experts are copied to all ranks; this machine has room for more.
      EXPECT_EQ(experts.copies() > 0, step >= 2);
      EXPECT_LE(experts.copies(), 2);
    }
  });
}

TEST(ExpertMoves, RestoredModelHasTheSameOwnersAndCopies) {
  for (const int copies : {-1, 2}) {
    RunRanks(3, "auto", [&](Communicator& world) {
      const Config config = SparseConfig(copies);
      const std::unique_ptr<RankModel> first = NewModel(config, world), second = NewModel(config, world);
      ASSERT_TRUE(LoadWeights({.seed = 4}, *first).ok());
      for (int step = 1; step <= 5; ++step) Step(*first, step);
      const std::vector<int64_t> saved = first->moves()->Save();
      const absl::Status restored = second->moves()->Restore(saved);
      ASSERT_TRUE(restored.ok()) << restored;
      EXPECT_EQ(second->moves()->Save(), saved);
      EXPECT_EQ(second->store().experts().placement(), first->store().experts().placement());
      EXPECT_GE(second->store().experts().copies(), 1);
      ASSERT_TRUE(LoadWeights({.seed = 4}, *second).ok());
      Step(*second, 6);
      // Less room than was saved: experts begin without copies.
      const std::unique_ptr<RankModel> narrow = NewModel(SparseConfig(1), world);
      ASSERT_TRUE(narrow->moves()->Restore(saved).ok());
      EXPECT_EQ(OwnersOf(narrow->store().experts().placement()), OwnersOf(first->store().experts().placement()));
      for (const ExpertPlacement& layer : narrow->store().experts().placement()) EXPECT_LE(CopiesOfRank(layer, 3), 1);
    });
  }
}

TEST(ExpertMoves, CalibrationByCostTrains) {
  RunRanks(3, "auto", [](Communicator& world) {
    Config config = SparseConfig(-1);
    config.mutable_parallel()->set_calibrate(true);
    const std::unique_ptr<RankModel> model = NewModel(config, world);
    ASSERT_TRUE(LoadWeights({.seed = 4}, *model).ok());
    double first = 0;
    for (int step = 1; step <= 6; ++step) {
      const StepResult result = Step(*model, step);
      if (step == 1) first = result.loss;
      if (step == 6) {
        EXPECT_LT(result.loss, first);
      }
    }
    EXPECT_GE(model->store().experts().copies(), 2);  // All room at once.
    const Tensor rows = Empty({1, 9}, DType::kI32);
    for (int32_t& token : rows.span<int32_t>()) token = 65;
    EXPECT_TRUE(model->Evaluate(rows, 3).ok());
  });
}

}  // namespace
}  // namespace shoal
