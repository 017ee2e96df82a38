// The shape and the losses of one model: a Mixtral-style decoder whose layers are mixtures of experts or
// dense. A plain value, complete: no field stands for "take the default" (head_dim and
// dense_intermediate_size are resolved). Keys and defaults of YAML live in launch/config, keys of Hugging
// Face in models/convert.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace shoal {

// The load-balancing loss, with f_e the share of tokens that chose expert e and P_e its mean router
// probability. kHf: tokens of all MoE layers pooled, E * sum f_e P_e. kSwitch: each MoE layer by itself with
// f_e / k, summed over layers.
enum class AuxLoss : uint8_t { kNone, kHf, kSwitch };

// How tokens find their experts; docs/routers.md has definitions and papers.
enum class RouterKind : uint8_t { kTopK, kSwitch, kGShard, kSigmoidBias, kXMoe, kExpertChoice };
// topk, switch, gshard, sigmoid_bias, xmoe, expert_choice: as configurations name them.
std::string_view Name(RouterKind kind);
std::optional<RouterKind> RouterKindOf(std::string_view name);

struct ModelConfig {
  int64_t vocab_size = 256;
  int64_t hidden_size = 256;
  int64_t intermediate_size = 512;         // Of one expert.
  int64_t dense_intermediate_size = 1024;  // Of a dense layer.
  int num_hidden_layers = 4;
  int num_attention_heads = 8;
  int num_key_value_heads = 4;
  int64_t head_dim = 32;
  int num_local_experts = 8;
  int num_experts_per_tok = 2;
  std::vector<bool> dense_layers;  // Per layer; layers past its end are MoE, so empty means MoE everywhere.
  RouterKind router = RouterKind::kTopK;
  bool norm_topk_prob = true;          // topk.
  double capacity_factor = 0;          // switch, gshard: 0 drops nothing. expert_choice: above 0.
  double routed_scaling_factor = 1;    // sigmoid_bias: of the routed experts' weights.
  double bias_update_rate = 0.001;     // sigmoid_bias: what a step moves a bias by.
  double seq_aux_loss_coef = 0;        // sigmoid_bias: of the sequence-wise balance loss.
  int64_t router_dim = 0;              // xmoe: width of the routing space.
  double router_temperature_init = 0.3;  // xmoe.
  int64_t shared_intermediate_size = 0;  // Of the expert that every token of an MoE layer passes; 0: none.
  double rms_norm_eps = 1e-5;
  double rope_theta = 1e6;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  AuxLoss aux_loss = AuxLoss::kHf;
  double router_aux_loss_coef = 0.02;
  double router_z_loss_coef = 0;

  // Whether tokens may find no room at an expert, or experts choose tokens: then a choice depends on the whole batch.
  bool has_capacity() const { return capacity_factor > 0; }
  bool is_dense(int layer) const {
    return layer < static_cast<int>(dense_layers.size()) && dense_layers[static_cast<size_t>(layer)];
  }
  int64_t query_size() const { return num_attention_heads * head_dim; }
  int64_t kv_size() const { return num_key_value_heads * head_dim; }
};

// Every layer is compared, however `dense_layers` is padded.
bool operator==(const ModelConfig& a, const ModelConfig& b);

// INVALID_ARGUMENT names the field that cannot be: sizes below 1, heads that do not divide, an odd head_dim,
// more experts per token than experts, a dense layer that does not exist, numbers that are not finite, settings
// that the router does not have, more parameters than int64_t counts.
absl::Status Validate(const ModelConfig& config);

int NumMoeLayers(const ModelConfig& config);
int64_t TotalParameters(const ModelConfig& config);
// Weights that one token is multiplied with: attention projections, router, its experts (with expert_choice as many as it has
// on average), the shared expert or the dense part, and the head, tied or not. Without embedding look-up and norms.
int64_t ActiveMatmulParameters(const ModelConfig& config);
// Forward and backward FLOPs of one token of a causal sequence of `seq_length` tokens: 6 * active + 6 *
// layers * query_size * seq.
int64_t TrainFlopsPerToken(const ModelConfig& config, int64_t seq_length);

}  // namespace shoal
