// The list of a model's parameters: names (Hugging Face's Mixtral), shapes ([out, in]) and canonical order.
// Everything that shards, stores, initialises or communicates parameters goes by this list. Pure.
#pragma once

#include <string>
#include <vector>

#include "models/model_config.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

struct ParameterSpec {
  std::string name;
  Shape shape;
  double initial = 1;  // Where a vector starts. Matrices start at random.
};

// In order: model.embed_tokens.weight; per layer model.layers.L. + input_layernorm.weight,
// self_attn.{q,k,v,o}_proj.weight, post_attention_layernorm.weight, then block_sparse_moe.gate.weight
// (for the cosine router [E, router_dim], and then block_sparse_moe.router_proj.weight and .router_temperature, a vector of
// one), mlp.shared_experts.{gate_proj,up_proj,down_proj}.weight where there is a shared expert, and
// block_sparse_moe.experts.E.{w1,w3,w2}.weight (w1 = gate, w3 = up, w2 = down: the two that read the same
// input lie side by side), or for a dense layer mlp.{gate_proj,up_proj,down_proj}.weight; model.norm.weight;
// lm_head.weight unless the head is tied. The config must be valid.
std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config);

// State of routers that is no parameter (Router::state), by MoE layer: of sigmoid_bias
// model.layers.L.block_sparse_moe.e_score_correction_bias [E], which starts at 0.
std::vector<ParameterSpec> RouterStateSpecs(const ModelConfig& config);
std::string RouterStateName(const ModelConfig& config, int layer);  // "" where the router has none.

}  // namespace shoal
