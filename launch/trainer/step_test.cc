#include "launch/trainer/step.h"

#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "launch/trainer/session.h"
#include "parallel/expert/testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

constexpr int64_t kSeq = 8;

// Two layers with rows that travel where there are several ranks.
Config SmallConfig(int ranks) {
  Config config;
  Model& model = *config.mutable_model();
  model.set_hidden_size(16);
  model.set_num_attention_heads(2);
  model.set_num_key_value_heads(2);
  model.set_num_hidden_layers(2);
  model.set_intermediate_size(16);
  model.set_num_local_experts(4);
  config.mutable_train()->set_seq_length(kSeq);
  config.mutable_train()->set_global_batch_size(2 * ranks);
  config.mutable_parallel()->set_expert(ranks);
  ResolveConfig(&config);
  return config;
}

// This rank's rows of each part; a row depends on its place in the batch alone.
std::vector<Tensor> Parts(const RankModel& model, const Config& config) {
  const int64_t parts = config.train().gradient_accumulation_steps(), rows = config.train().global_batch_size() / parts;
  const Range mine = model.RowsOf(rows);
  std::vector<Tensor> tokens;
  for (int64_t part = 0; part < parts; ++part) {
    tokens.push_back(Empty({mine.count, kSeq + 1}, DType::kI32));
    for (int64_t i = 0; i < tokens.back().elements(); ++i) {
      const int64_t row = part * rows + mine.begin + i / (kSeq + 1), column = i % (kSeq + 1);
      tokens.back().data<int32_t>()[i] = static_cast<int32_t>((row * 71 + column * column * 13) % 256);
    }
  }
  return tokens;
}

TEST(RankModel, OtherGraphThanRankZeroIsAnErrorThatNamesTheRanks) {
  RunRanks(4, "auto", [](Communicator& world) {
    Config config = SmallConfig(4);
    // Nothing else depends on it that ranks would notice.
    config.mutable_train()->set_recompute(world.index() == 1 || world.index() == 3);
    const auto model = RankModel::Create(config, ModelConfigOf(config), world, {});
    ASSERT_FALSE(model.ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(model.status())) << model.status();
    EXPECT_TRUE(absl::StrContains(model.status().message(), "ranks 1, 3 have another step graph than rank 0")) << model.status();
  });
}

TEST(RankModel, AbortInTheMiddleOfAStepEndsItEverywhereWithTheCause) {
  for (const bool backward : {false, true}) {
    RunRanks(3, "auto", [&](Communicator& world) {
      Config config = SmallConfig(3);
      const auto model = RankModel::Create(config, ModelConfigOf(config), world, {});
      ASSERT_TRUE(model.ok()) << model.status();
      ASSERT_TRUE(LoadWeights({.seed = 4}, **model).ok());
      const std::vector<Tensor> parts = Parts(**model, config);
      const auto first = (*model)->Train(parts, 1e-3, 1);
      ASSERT_TRUE(first.ok()) << first.status();
      EXPECT_GT(first->loss, 0);
      absl::StatusOr<StepResult> second = absl::UnknownError("");
      if (world.index() != 1) {
        second = (*model)->Train(parts, 1e-3, 2);
      } else if (backward) {
        // When the gradients are there, which the others reach too: they wait for this rank's share of the norm.
        const auto abort = [&](const ParameterStore&) { world.Abort(absl::DataLossError("disk of rank 1")); };
        second = (*model)->Train(parts, 1e-3, 2, abort);
      } else {
        world.Abort(absl::DataLossError("disk of rank 1"));  // Instead of a step: the others wait for its rows.
        second = (*model)->Train(parts, 1e-3, 2);
      }
      ASSERT_FALSE(second.ok());
      EXPECT_TRUE(absl::IsAborted(second.status())) << second.status();
      EXPECT_TRUE(absl::StrContains(second.status().message(), "disk of rank 1")) << second.status();
      // And so do all later ones.
      const auto third = (*model)->Train(parts, 1e-3, 3);
      EXPECT_TRUE(absl::IsAborted(third.status())) << third.status();
    });
  }
}

TEST(RankModel, TheHighestRequestOfAllRanksReachesAllInTheSameStep) {
  for (const int ranks : {1, 3}) {
    RunRanks(ranks, "auto", [&](Communicator& world) {
      const Config config = SmallConfig(ranks);
      int64_t request = 0;
      const auto model = RankModel::Create(config, ModelConfigOf(config), world, {.request = [&] { return request; }});
      ASSERT_TRUE(model.ok()) << model.status();
      ASSERT_TRUE(LoadWeights({.seed = 4}, **model).ok());
      for (int64_t step = 0; step < 4; ++step) {
        request = step == 1 && world.index() == ranks - 1 ? 2 : step == 1 || step == 2 ? 1 : 0;
        const auto result = (*model)->Train(Parts(**model, config), 1e-3, step + 1);
        ASSERT_TRUE(result.ok()) << result.status();
        EXPECT_EQ(result->request, std::vector<int64_t>({0, 2, 1, 0})[static_cast<size_t>(step)]) << step;
      }
    });
  }
}

struct Case {
  std::string name;
  int ranks = 1, experts = 1;
  bool dense_only = false, tied = false;
  bool sharded = false, sparse = false, rematerialise = false, recompute = false;
  int waves = 1, parts = 1;
  bool calibrate = false;  // Copies that no step expected, wherever there is room.
  bool apart = false;
};

// Of three steps with four sequences in all.
std::vector<double> Losses(const Case& c) {
  std::vector<double> losses;
  RunRanks(c.ranks, "auto", [&](Communicator& world) {
    Config config = SmallConfig(c.ranks);
    config.mutable_model()->set_num_local_experts(c.experts);
    config.mutable_model()->set_num_experts_per_tok(1);
    config.mutable_model()->set_aux_loss("none");  // It is the mean over parts.
    config.mutable_model()->set_tie_word_embeddings(c.tied);
    for (int layer = 0; c.dense_only && layer < 2; ++layer) config.mutable_model()->add_dense_layers(layer);
    config.mutable_train()->set_global_batch_size(4);
    config.mutable_train()->set_gradient_accumulation_steps(c.parts);
    config.mutable_train()->set_recompute(c.recompute);
    config.mutable_parallel()->set_dense(c.sharded ? "sharded" : "replicated");
    config.mutable_parallel()->set_expert(1);
    config.mutable_parallel()->set_experts(c.sparse ? "sparse" : "grouped");
    config.mutable_parallel()->set_reshard_interval(c.sparse ? 1 : 0);
    config.mutable_parallel()->set_expert_overlap(c.sparse ? 2 : -1);
    config.mutable_parallel()->set_rematerialise(c.rematerialise);
    config.mutable_schedule()->set_waves(c.waves);
    config.mutable_schedule()->set_wave_order(c.apart ? "apart" : "together");
    RankModel::Options options{.host = world.index() / 2};
    if (c.calibrate) {
      config.mutable_parallel()->set_expert_copies(c.experts);
      options.calibrate = [&](const ExpertPlacement& planned, absl::Span<const int64_t> rows) {
        return expert_testing::AddCopies(planned, rows, c.ranks, c.experts);
      };
    }
    const auto model = RankModel::Create(config, ModelConfigOf(config), world, options);
    ASSERT_TRUE(model.ok()) << model.status();
    ASSERT_TRUE(LoadWeights({.seed = 4}, **model).ok());
    for (int step = 1; step <= 3; ++step) {
      const auto result = (*model)->Train(Parts(**model, config), 1e-2, step);
      ASSERT_TRUE(result.ok()) << result.status();
      if (world.index() == 0) losses.push_back(result->loss);
    }
  });
  return losses;
}

class Corner : public testing::TestWithParam<Case> {};

TEST_P(Corner, LossesAreThoseOfOneRank) {
  Case alone = GetParam();
  alone.ranks = alone.waves = alone.parts = 1;
  alone.sharded = alone.sparse = alone.rematerialise = alone.recompute = alone.calibrate = false;
  const std::vector<double> want = Losses(alone), got = Losses(GetParam());
  ASSERT_EQ(want.size(), 3u);
  ASSERT_EQ(got.size(), want.size());
  EXPECT_LT(want[2], want[0]);
  for (size_t step = 0; step < want.size(); ++step) EXPECT_NEAR(got[step], want[step], 2e-5 * want[step]) << "step " << step;
  // Whichever wave went on first.
  if (GetParam().apart) {
    EXPECT_EQ(Losses(GetParam()), got);
  }
}

INSTANTIATE_TEST_SUITE_P(
    RankModel, Corner,
    testing::Values(Case{.name = "OnlyDenseLayers", .ranks = 3, .dense_only = true},
                    Case{.name = "OnlyDenseLayersSharded", .ranks = 3, .dense_only = true, .tied = true, .sharded = true, .waves = 2},
                    Case{.name = "OneExpert", .ranks = 2, .experts = 1},
                    Case{.name = "FewerExpertsThanRanks", .ranks = 3, .experts = 1, .sparse = true, .waves = 2},
                    Case{.name = "FewerExpertsThanRanksRecomputed", .ranks = 4, .experts = 2, .tied = true, .sharded = true,
                         .sparse = true, .rematerialise = true, .recompute = true, .waves = 2},
                    Case{.name = "RanksWithoutRows", .ranks = 4, .experts = 3, .sharded = true, .sparse = true, .waves = 2, .parts = 4},
                    Case{.name = "WavesApart", .ranks = 2, .experts = 4, .waves = 2, .parts = 1, .apart = true},
                    Case{.name = "WavesApartInPartsUntied", .ranks = 2, .experts = 4, .sparse = true, .waves = 2, .parts = 2, .apart = true},
                    Case{.name = "WavesApartInParts", .ranks = 2, .experts = 4, .tied = true, .sparse = true, .recompute = true,
                         .waves = 2, .parts = 2, .apart = true},
                    Case{.name = "RanksWithoutRowsRematerialised", .ranks = 4, .experts = 3, .sparse = true, .rematerialise = true,
                         .recompute = true, .parts = 2},
                    Case{.name = "Calibrated", .ranks = 4, .experts = 5, .sparse = true, .waves = 2, .parts = 2, .calibrate = true},
                    Case{.name = "CalibratedRematerialised", .ranks = 3, .experts = 4, .sharded = true, .sparse = true,
                         .rematerialise = true, .recompute = true, .parts = 2, .calibrate = true}),
    [](const testing::TestParamInfo<Case>& info) { return info.param.name; });

}  // namespace
}  // namespace shoal
