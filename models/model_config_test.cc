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

TEST(ModelConfig, TotalCountsRoutersAndSharedExperts) {
  ModelConfig config;
  config.num_hidden_layers = 3;
  config.dense_layers = {true};
  config.shared_intermediate_size = 40;
  EXPECT_EQ(TotalParameters(config), SumOfSpecs(config));
  const int64_t active = ActiveMatmulParameters(config);
  config.shared_intermediate_size = 0;
  EXPECT_EQ(active - ActiveMatmulParameters(config), 2 * 3 * 40 * config.hidden_size);
  config.router = RouterKind::kXMoe;
  config.router_dim = 12;
  ASSERT_TRUE(Validate(config).ok());
  EXPECT_EQ(TotalParameters(config), SumOfSpecs(config));
}

TEST(ModelConfig, ActiveParametersOfExpertChoiceFollowItsCapacity) {
  ModelConfig config;
  const int64_t top2 = ActiveMatmulParameters(config);
  config.router = RouterKind::kExpertChoice;
  config.aux_loss = AuxLoss::kNone;
  config.capacity_factor = 2;
  ASSERT_TRUE(Validate(config).ok());
  EXPECT_EQ(ActiveMatmulParameters(config), top2);
  config.capacity_factor = 2.5;
  EXPECT_EQ(ActiveMatmulParameters(config) - top2,
            config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size / 2);
  config.capacity_factor = 1e9;  // A token has no more than all experts.
  EXPECT_EQ(ActiveMatmulParameters(config) - top2,
            config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size * 6);
}

TEST(ModelConfig, RoutersHaveNames) {
  for (const char* name : {"topk", "switch", "gshard", "sigmoid_bias", "xmoe", "expert_choice"}) {
    ASSERT_TRUE(RouterKindOf(name).has_value()) << name;
    EXPECT_EQ(Name(*RouterKindOf(name)), name);
  }
  EXPECT_FALSE(RouterKindOf("top2").has_value());
}

TEST(ModelConfig, RefusesWhatTheRouterDoesNotHave) {
  const auto message = [](RouterKind kind, auto change) {
    ModelConfig config;
    config.router = kind;
    config.aux_loss = AuxLoss::kNone;
    if (kind == RouterKind::kSwitch) config.num_experts_per_tok = 1;
    if (kind == RouterKind::kXMoe) config.router_dim = 8;
    if (kind == RouterKind::kExpertChoice) config.capacity_factor = 1;
    EXPECT_TRUE(Validate(config).ok()) << Validate(config);
    change(config);
    return std::string(Validate(config).message());
  };
  using enum RouterKind;
  EXPECT_EQ(message(kSwitch, [](ModelConfig& c) { c.num_experts_per_tok = 2; }),
            "num_experts_per_tok must be 1, is 2, with router switch");
  EXPECT_EQ(message(kGShard, [](ModelConfig& c) { c.num_experts_per_tok = 3; }),
            "num_experts_per_tok must be 2, is 3, with router gshard");
  EXPECT_EQ(message(kExpertChoice, [](ModelConfig& c) { c.capacity_factor = 0; }),
            "capacity_factor must be above 0 with router expert_choice");
  EXPECT_EQ(message(kTopK, [](ModelConfig& c) { c.capacity_factor = 1.5; }),
            "capacity_factor must be 0, is 1.5, with router topk");
  EXPECT_EQ(message(kSigmoidBias, [](ModelConfig& c) { c.aux_loss = AuxLoss::kHf; }),
            "aux_loss must be none with router sigmoid_bias");
  EXPECT_EQ(message(kSigmoidBias, [](ModelConfig& c) { c.router_z_loss_coef = 0.1; }),
            "router_z_loss_coef must be 0, is 0.1, with router sigmoid_bias");
  EXPECT_EQ(message(kXMoe, [](ModelConfig& c) { c.seq_aux_loss_coef = 0.1; }),
            "seq_aux_loss_coef must be 0, is 0.1, with router xmoe");
  EXPECT_EQ(message(kXMoe, [](ModelConfig& c) { c.router_dim = 0; }), "router_dim must be at least 1 with router xmoe");
  EXPECT_EQ(message(kGShard, [](ModelConfig& c) { c.router_dim = 4; }),
            "router_dim must be 0, is 4, with router gshard");
  EXPECT_EQ(message(kGShard, [](ModelConfig& c) { c.norm_topk_prob = false; }),
            "norm_topk_prob must be true with router gshard");
  EXPECT_NE(message(kTopK, [](ModelConfig& c) { c.shared_intermediate_size = -1; }).find("shared_intermediate_size"),
            std::string::npos);
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

TEST(ParameterSpecs, ACosineRouterAndASharedExpertStandBeforeTheExperts) {
  ModelConfig config;
  config.hidden_size = 12;
  config.intermediate_size = 5;
  config.num_hidden_layers = 1;
  config.num_local_experts = 3;
  config.router = RouterKind::kXMoe;
  config.router_dim = 4;
  config.router_temperature_init = 0.25;
  config.shared_intermediate_size = 7;
  const std::vector<ParameterSpec> specs = ParameterSpecs(config);
  const std::string moe = "model.layers.0.block_sparse_moe.", shared = "model.layers.0.mlp.shared_experts.";
  const std::vector<std::string> want = {moe + "gate.weight [3, 4]",       moe + "router_proj.weight [4, 12]",
                                         moe + "router_temperature [1]",   shared + "gate_proj.weight [7, 12]",
                                         shared + "up_proj.weight [7, 12]", shared + "down_proj.weight [12, 7]",
                                         moe + "experts.0.w1.weight [5, 12]"};
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(specs[7 + i].name + " " + ShapeString(specs[7 + i].shape), want[i]);
  }
  EXPECT_EQ(specs[9].initial, 0.25);
  EXPECT_EQ(specs[1].initial, 1.0);
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
