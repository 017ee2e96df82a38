#include "models/parameters.h"

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

void AppendAttention(const ModelConfig& config, const std::string& layer, std::vector<ParameterSpec>& specs) {
  const int64_t hidden = config.hidden_size;
  specs.push_back({layer + "input_layernorm.weight", {hidden}});
  specs.push_back({layer + "self_attn.q_proj.weight", {config.query_size(), hidden}});
  specs.push_back({layer + "self_attn.k_proj.weight", {config.kv_size(), hidden}});
  specs.push_back({layer + "self_attn.v_proj.weight", {config.kv_size(), hidden}});
  specs.push_back({layer + "self_attn.o_proj.weight", {hidden, config.query_size()}});
  specs.push_back({layer + "post_attention_layernorm.weight", {hidden}});
}

// A SwiGLU that every token passes.
void AppendDense(int64_t hidden, int64_t width, const std::string& prefix, std::vector<ParameterSpec>& specs) {
  specs.push_back({prefix + "gate_proj.weight", {width, hidden}});
  specs.push_back({prefix + "up_proj.weight", {width, hidden}});
  specs.push_back({prefix + "down_proj.weight", {hidden, width}});
}

void AppendRouter(const ModelConfig& config, const std::string& layer, std::vector<ParameterSpec>& specs) {
  const bool cosine = config.router == RouterKind::kXMoe;
  const std::string prefix = layer + "block_sparse_moe.";
  specs.push_back({prefix + "gate.weight", {config.num_local_experts, cosine ? config.router_dim : config.hidden_size}});
  if (!cosine) return;
  specs.push_back({prefix + "router_proj.weight", {config.router_dim, config.hidden_size}});
  specs.push_back({prefix + "router_temperature", {1}, config.router_temperature_init});
}

void AppendExperts(const ModelConfig& config, const std::string& layer, std::vector<ParameterSpec>& specs) {
  const int64_t hidden = config.hidden_size;
  const int64_t width = config.intermediate_size;
  for (int expert = 0; expert < config.num_local_experts; ++expert) {
    const std::string prefix = absl::StrCat(layer, "block_sparse_moe.experts.", expert);
    specs.push_back({prefix + ".w1.weight", {width, hidden}});
    specs.push_back({prefix + ".w3.weight", {width, hidden}});
    specs.push_back({prefix + ".w2.weight", {hidden, width}});
  }
}

}  // namespace

std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config) {
  std::vector<ParameterSpec> specs;
  specs.push_back({"model.embed_tokens.weight", {config.vocab_size, config.hidden_size}});
  for (int index = 0; index < config.num_hidden_layers; ++index) {
    const std::string layer = absl::StrCat("model.layers.", index, ".");
    AppendAttention(config, layer, specs);
    if (config.is_dense(index)) {
      AppendDense(config.hidden_size, config.dense_intermediate_size, layer + "mlp.", specs);
    } else {
      AppendRouter(config, layer, specs);
      if (config.shared_intermediate_size > 0) {
        AppendDense(config.hidden_size, config.shared_intermediate_size, layer + "mlp.shared_experts.", specs);
      }
      AppendExperts(config, layer, specs);
    }
  }
  specs.push_back({"model.norm.weight", {config.hidden_size}});
  if (!config.tie_word_embeddings) {
    specs.push_back({"lm_head.weight", {config.vocab_size, config.hidden_size}});
  }
  return specs;
}

std::string RouterStateName(const ModelConfig& config, int layer) {
  if (config.router != RouterKind::kSigmoidBias || config.is_dense(layer)) return "";
  return absl::StrCat("model.layers.", layer, ".block_sparse_moe.e_score_correction_bias");
}

std::vector<ParameterSpec> RouterStateSpecs(const ModelConfig& config) {
  std::vector<ParameterSpec> specs;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    std::string name = RouterStateName(config, layer);
    if (!name.empty()) specs.push_back({std::move(name), {config.num_local_experts}, 0});
  }
  return specs;
}

}  // namespace shoal
