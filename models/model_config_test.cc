#include "models/model_config.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "models/parameters.h"

namespace shoal {
namespace {

int64_t SumOfSpecs(const ModelConfig& config) {
  int64_t sum = 0;
  for (const ParameterSpec& spec : ParameterSpecs(config)) sum += ElementCount(spec.shape);
  return sum;
}

// Figures of the PyTorch reference for the two published benchmark models.
TEST(ModelConfig, CountsMatchTheReference) {
  ModelConfig tiny;
  ASSERT_TRUE(Validate(tiny).ok());
  EXPECT_EQ(TotalParameters(tiny), 13510912);
  EXPECT_EQ(ActiveMatmulParameters(tiny), 4005888);
  EXPECT_EQ(TrainFlopsPerToken(tiny, 256), 25608192);
  ModelConfig small;
  small.vocab_size = 32000;
  small.hidden_size = 512;
  small.intermediate_size = 1024;
  small.num_hidden_layers = 8;
  small.head_dim = 64;
  EXPECT_EQ(TotalParameters(small), 139764224);
  EXPECT_EQ(ActiveMatmulParameters(small), 47874048);
  EXPECT_EQ(TrainFlopsPerToken(small, 512), 299827200);
}

TEST(ModelConfig, TotalEqualsTheSumOfTheParameterList) {
  ModelConfig config;
  config.num_hidden_layers = 3;
  config.dense_intermediate_size = 96;
  config.head_dim = 48;
  for (const bool tied : {false, true}) {
    for (const std::vector<bool>& dense : {std::vector<bool>{}, {false, true}, {true, true, true}}) {
      config.tie_word_embeddings = tied;
      config.dense_layers = dense;
      ASSERT_TRUE(Validate(config).ok());
      EXPECT_EQ(TotalParameters(config), SumOfSpecs(config));
    }
  }
}

TEST(ModelConfig, ActiveParametersOfADenseModelAreItsMatrices) {
  ModelConfig config;
  config.num_hidden_layers = 2;
  config.dense_layers = {true, true};
  int64_t matrices = 0;
  for (const ParameterSpec& spec : ParameterSpecs(config)) {
    if (spec.shape.size() == 2 && spec.name != "model.embed_tokens.weight")
      matrices += ElementCount(spec.shape);
  }
  EXPECT_EQ(ActiveMatmulParameters(config), matrices);
  EXPECT_EQ(NumMoeLayers(config), 0);
}

TEST(ModelConfig, ImpossibleConfigurationsNameTheField) {
  const auto message = [](auto change) {
    ModelConfig config;
    change(config);
    const absl::Status status = Validate(config);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_NE(message([](ModelConfig& c) { c.vocab_size = 0; }).find("vocab_size"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.hidden_size = int64_t{1} << 40; }).find("hidden_size"),
            std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.num_key_value_heads = 3; }).find("num_key_value_heads"),
            std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.head_dim = 33; }).find("head_dim"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.num_experts_per_tok = 9; }).find("num_experts_per_tok"),
            std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) {
              c.dense_layers = {false, false, false, false, true};
            }).find("dense layer 4"),
            std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.rope_theta = 0; }).find("rope_theta"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) {
              c.rms_norm_eps = std::numeric_limits<double>::quiet_NaN();
            }).find("rms_norm_eps"),
            std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.hidden_size = c.intermediate_size = 1 << 30; }).find("parameters"),
            std::string::npos);
}

TEST(ParameterSpecs, OrderAndShapesOfOneMoeAndOneDenseLayer) {
  ModelConfig config;
  config.vocab_size = 11;
  config.hidden_size = 12;
  config.intermediate_size = 5;
  config.dense_intermediate_size = 7;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 6;
  config.num_local_experts = 2;
  config.dense_layers = {false, true};
  std::string text;
  for (const ParameterSpec& spec : ParameterSpecs(config))
    text += spec.name + " " + ShapeString(spec.shape) + "\n";
  EXPECT_EQ(text,
            "model.embed_tokens.weight [11, 12]\n"
            "model.layers.0.input_layernorm.weight [12]\n"
            "model.layers.0.self_attn.q_proj.weight [24, 12]\n"
            "model.layers.0.self_attn.k_proj.weight [12, 12]\n"
            "model.layers.0.self_attn.v_proj.weight [12, 12]\n"
            "model.layers.0.self_attn.o_proj.weight [12, 24]\n"
            "model.layers.0.post_attention_layernorm.weight [12]\n"
            "model.layers.0.block_sparse_moe.gate.weight [2, 12]\n"
            "model.layers.0.block_sparse_moe.experts.0.w1.weight [5, 12]\n"
            "model.layers.0.block_sparse_moe.experts.0.w3.weight [5, 12]\n"
            "model.layers.0.block_sparse_moe.experts.0.w2.weight [12, 5]\n"
            "model.layers.0.block_sparse_moe.experts.1.w1.weight [5, 12]\n"
            "model.layers.0.block_sparse_moe.experts.1.w3.weight [5, 12]\n"
            "model.layers.0.block_sparse_moe.experts.1.w2.weight [12, 5]\n"
            "model.layers.1.input_layernorm.weight [12]\n"
            "model.layers.1.self_attn.q_proj.weight [24, 12]\n"
            "model.layers.1.self_attn.k_proj.weight [12, 12]\n"
            "model.layers.1.self_attn.v_proj.weight [12, 12]\n"
            "model.layers.1.self_attn.o_proj.weight [12, 24]\n"
            "model.layers.1.post_attention_layernorm.weight [12]\n"
            "model.layers.1.mlp.gate_proj.weight [7, 12]\n"
            "model.layers.1.mlp.up_proj.weight [7, 12]\n"
            "model.layers.1.mlp.down_proj.weight [12, 7]\n"
            "model.norm.weight [12]\n"
            "lm_head.weight [11, 12]\n");
}

}  // namespace
}  // namespace shoal
