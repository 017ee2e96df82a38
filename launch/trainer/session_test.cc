#include "launch/trainer/session.h"

#include <map>

#include "gtest/gtest.h"
#include "launch/trainer/bench.h"

namespace shoal {
namespace {

// A model of bytes with random weights on one rank.
struct Fixture {
  Fixture() {
    config.mutable_model()->set_hidden_size(16);
    config.mutable_model()->set_num_attention_heads(2);
    config.mutable_model()->set_num_hidden_layers(1);
    config.mutable_model()->set_intermediate_size(16);
    config.mutable_train()->set_seq_length(8);
    ResolveConfig(&config);
    world = *ConnectWorld({});
    model = *RankModel::Create(config, ModelConfigOf(config), *world, {.training = false});
    EXPECT_TRUE(LoadWeights({.seed = 4}, *model).ok());
  }
  Config config;
  std::unique_ptr<Communicator> world;
  std::unique_ptr<RankModel> model;
};

TEST(SampleText, IsAFunctionOfItsArguments) {
  Fixture fixture;
  SampleOptions options{.prompt = "shoal", .length = 40, .context = 8, .temperature = 1.0, .seed = 1};
  const std::string first = *SampleText(options, *fixture.model, *fixture.world);
  EXPECT_EQ(first.size(), 40u);
  EXPECT_EQ(*SampleText(options, *fixture.model, *fixture.world), first);
  options.seed = 2;
  EXPECT_NE(*SampleText(options, *fixture.model, *fixture.world), first);
}

TEST(SampleText, NoTemperatureOrOneCandidateIsTheLikeliest) {
  Fixture fixture;
  SampleOptions greedy{.prompt = "a", .length = 20, .context = 8, .temperature = 0};
  SampleOptions top_one{.prompt = "a", .length = 20, .context = 8, .temperature = 2, .top_k = 1, .seed = 9};
  EXPECT_EQ(*SampleText(greedy, *fixture.model, *fixture.world), *SampleText(top_one, *fixture.model, *fixture.world));
}

TEST(LoadWeights, SameSeedSameWeights) {
  Fixture a, b;
  const Shape shape = {256, 16};
  const Tensor first = a.model->store().Weight("lm_head.weight", shape), second = b.model->store().Weight("lm_head.weight", shape);
  EXPECT_TRUE(std::equal(first.span<float>().begin(), first.span<float>().end(), second.span<float>().begin()));
  double squares = 0;
  for (float w : first.span<float>()) squares += static_cast<double>(w) * w;
  EXPECT_NEAR(squares / 4096, 0.02 * 0.02, 0.1 * 0.02 * 0.02);  // The default initializer_range.
}

TEST(ThreadsPerRank, SharesTheHostUnlessTold) {
  Config config;
  EXPECT_EQ(ThreadsPerRank(config, {.local_world_size = 1 << 20, .source = "SHOAL"}), 1);
  config.mutable_train()->set_threads(5);
  EXPECT_EQ(ThreadsPerRank(config, {.local_world_size = 2}), 5);
}

TEST(LayoutFor, ModelWithoutExpertsHasNoneToSpread) {
  Config config;
  config.mutable_model()->set_num_hidden_layers(2);
  config.mutable_model()->set_num_local_experts(1);
  config.mutable_model()->set_num_experts_per_tok(1);
  config.mutable_parallel()->set_expert(-1);
  EXPECT_EQ(LayoutFor(config, ModelConfigOf(config), 2).expert, 2);
  for (int layer : {0, 1}) config.mutable_model()->add_dense_layers(layer);
  EXPECT_TRUE(CheckParallel(config, {}, 2).ok());
  EXPECT_EQ(LayoutFor(config, ModelConfigOf(config), 2).expert, 1);
}

TEST(Summarize, InterpolatesBetweenOrderStatistics) {
  const StepTimes times = Summarize({5, 1, 3, 2, 4});
  EXPECT_DOUBLE_EQ(times.median, 3);
  EXPECT_DOUBLE_EQ(times.p10, 1.4);
  EXPECT_DOUBLE_EQ(times.p90, 4.6);
  EXPECT_DOUBLE_EQ(times.best, 1);
  EXPECT_DOUBLE_EQ(Summarize({7}).p90, 7);
}

}  // namespace
}  // namespace shoal
