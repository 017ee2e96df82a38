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

void AppendDense(const ModelConfig& config, const std::string& layer, std::vector<ParameterSpec>& specs) {
  const int64_t hidden = config.hidden_size;
  const int64_t width = config.dense_intermediate_size;
  specs.push_back({layer + "mlp.gate_proj.weight", {width, hidden}});
  specs.push_back({layer + "mlp.up_proj.weight", {width, hidden}});
  specs.push_back({layer + "mlp.down_proj.weight", {hidden, width}});
}

void AppendExperts(const ModelConfig& config, const std::string& layer, std::vector<ParameterSpec>& specs) {
  const int64_t hidden = config.hidden_size;
  const int64_t width = config.intermediate_size;
  specs.push_back({layer + "block_sparse_moe.gate.weight", {config.num_local_experts, hidden}});
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
      AppendDense(config, layer, specs);
    } else {
      AppendExperts(config, layer, specs);
    }
  }
  specs.push_back({"model.norm.weight", {config.hidden_size}});
  if (!config.tie_word_embeddings) {
    specs.push_back({"lm_head.weight", {config.vocab_size, config.hidden_size}});
  }
  return specs;
}

}  // namespace shoal
