#include "models/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr std::pair<RouterKind, std::string_view> kRouterNames[] = {
    {RouterKind::kTopK, "topk"},
    {RouterKind::kSwitch, "switch"},
    {RouterKind::kGShard, "gshard"},
    {RouterKind::kSigmoidBias, "sigmoid_bias"},
    {RouterKind::kXMoe, "xmoe"},
    {RouterKind::kExpertChoice, "expert_choice"},
};

absl::Status CheckSizes(const ModelConfig& config) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"dense_intermediate_size", config.dense_intermediate_size},
      {"num_hidden_layers", config.num_hidden_layers},
      {"num_attention_heads", config.num_attention_heads},
      {"num_key_value_heads", config.num_key_value_heads},
      {"head_dim", config.head_dim},
      {"num_local_experts", config.num_local_experts},
      {"num_experts_per_tok", config.num_experts_per_tok},
  };
  const std::pair<const char*, int64_t> may_be_none[] = {{"router_dim", config.router_dim},
                                                         {"shared_intermediate_size", config.shared_intermediate_size}};
  for (const auto& [name, size] : may_be_none) {
    if (size < 0 || size > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must be from 0 to 2^31 - 1, is ", size));
    }
  }
  for (const auto& [name, size] : sizes) {
    if (size < 1) return absl::InvalidArgumentError(absl::StrCat(name, " must be at least 1, is ", size));
    if (size > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must be less than 2^31, is ", size));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckNumbers(const ModelConfig& config) {
  const std::pair<const char*, double> positive[] = {{"rms_norm_eps", config.rms_norm_eps},
                                                     {"rope_theta", config.rope_theta},
                                                     {"routed_scaling_factor", config.routed_scaling_factor},
                                                     {"router_temperature_init", config.router_temperature_init}};
  for (const auto& [name, value] : positive) {
    if (!std::isfinite(value) || value <= 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must be finite and above 0, is ", value));
    }
  }
  const std::pair<const char*, double> not_negative[] = {
      {"initializer_range", config.initializer_range},
      {"router_aux_loss_coef", config.router_aux_loss_coef},
      {"router_z_loss_coef", config.router_z_loss_coef},
      {"capacity_factor", config.capacity_factor},
      {"bias_update_rate", config.bias_update_rate},
      {"seq_aux_loss_coef", config.seq_aux_loss_coef}};
  for (const auto& [name, value] : not_negative) {
    if (!std::isfinite(value) || value < 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, " must be finite and not negative, is ", value));
    }
  }
  return absl::OkStatus();
}

// That each setting is one that the router has.
absl::Status CheckRouter(const ModelConfig& config) {
  const RouterKind kind = config.router;
  const bool sigmoid = kind == RouterKind::kSigmoidBias, experts_choose = kind == RouterKind::kExpertChoice;
  const bool may_drop = kind == RouterKind::kSwitch || kind == RouterKind::kGShard;
  const auto fail = [&](const auto&... text) {
    return absl::InvalidArgumentError(absl::StrCat(text..., " with router ", AbslSv(Name(kind))));
  };
  if (kind == RouterKind::kSwitch && config.num_experts_per_tok != 1) {
    return fail("num_experts_per_tok must be 1, is ", config.num_experts_per_tok, ",");
  }
  if (kind == RouterKind::kGShard && config.num_experts_per_tok != 2) {
    return fail("num_experts_per_tok must be 2, is ", config.num_experts_per_tok, ",");
  }
  if (experts_choose && config.capacity_factor == 0) return fail("capacity_factor must be above 0");
  if (!experts_choose && !may_drop && config.capacity_factor != 0) {
    return fail("capacity_factor must be 0, is ", config.capacity_factor, ",");
  }
  if ((sigmoid || experts_choose) && config.aux_loss != AuxLoss::kNone) return fail("aux_loss must be none");
  if (sigmoid && config.router_z_loss_coef != 0) {
    return fail("router_z_loss_coef must be 0, is ", config.router_z_loss_coef, ",");
  }
  if (!sigmoid && config.seq_aux_loss_coef != 0) {
    return fail("seq_aux_loss_coef must be 0, is ", config.seq_aux_loss_coef, ",");
  }
  if (kind != RouterKind::kTopK && !config.norm_topk_prob) return fail("norm_topk_prob must be true");
  if (kind == RouterKind::kXMoe && config.router_dim == 0) return fail("router_dim must be at least 1");
  if (kind != RouterKind::kXMoe && config.router_dim != 0) {
    return fail("router_dim must be 0, is ", config.router_dim, ",");
  }
  return absl::OkStatus();
}

int64_t AttentionParameters(const ModelConfig& config) {
  return 2 * config.hidden_size * (config.query_size() + config.kv_size());
}

// Matrices alone: the cosine router's temperature is one more.
int64_t RouterMatrices(const ModelConfig& config) {
  if (config.router == RouterKind::kXMoe) return config.router_dim * (config.hidden_size + config.num_local_experts);
  return config.num_local_experts * config.hidden_size;
}
int64_t SharedExpertParameters(const ModelConfig& config) {
  return 3 * config.hidden_size * config.shared_intermediate_size;
}
int64_t ExpertParameters(const ModelConfig& config) {
  return 3 * config.hidden_size * config.intermediate_size;
}
int64_t DenseParameters(const ModelConfig& config) {
  return 3 * config.hidden_size * config.dense_intermediate_size;
}

// In floating point, where nothing overflows: is the integer count safe to compute?
bool CountsFit(const ModelConfig& config) {
  const double hidden = static_cast<double>(config.hidden_size);
  const double experts =
      3.0 * hidden * static_cast<double>(config.intermediate_size) * config.num_local_experts;
  const double dense = 3.0 * hidden * static_cast<double>(config.dense_intermediate_size);
  const double heads = static_cast<double>(config.num_attention_heads) + config.num_key_value_heads;
  const double attention = 2.0 * hidden * heads * static_cast<double>(config.head_dim);
  const double shared = 3.0 * hidden * static_cast<double>(config.shared_intermediate_size);
  const double router = (hidden + static_cast<double>(config.router_dim)) * config.num_local_experts +
                        hidden * static_cast<double>(config.router_dim);
  const double layer = experts + shared + dense + attention + router;
  const double total =
      config.num_hidden_layers * layer + 2.0 * hidden * static_cast<double>(config.vocab_size);
  return total < 0x1p56;  // Leaves room for bytes and for FLOPs of six per parameter.
}

}  // namespace

std::string_view Name(RouterKind kind) {
  for (const auto& [value, name] : kRouterNames) {
    if (value == kind) return name;
  }
  return "unknown";
}

std::optional<RouterKind> RouterKindOf(std::string_view name) {
  for (const auto& [value, own_name] : kRouterNames) {
    if (own_name == name) return value;
  }
  return std::nullopt;
}

bool operator==(const ModelConfig& a, const ModelConfig& b) {
  if (a.num_hidden_layers != b.num_hidden_layers) return false;
  for (int layer = 0; layer < a.num_hidden_layers; ++layer) {
    if (a.is_dense(layer) != b.is_dense(layer)) return false;
  }
  return a.vocab_size == b.vocab_size && a.hidden_size == b.hidden_size &&
         a.intermediate_size == b.intermediate_size &&
         a.dense_intermediate_size == b.dense_intermediate_size &&
         a.num_attention_heads == b.num_attention_heads && a.num_key_value_heads == b.num_key_value_heads &&
         a.head_dim == b.head_dim && a.num_local_experts == b.num_local_experts &&
         a.num_experts_per_tok == b.num_experts_per_tok && a.router == b.router &&
         a.norm_topk_prob == b.norm_topk_prob && a.capacity_factor == b.capacity_factor &&
         a.routed_scaling_factor == b.routed_scaling_factor && a.bias_update_rate == b.bias_update_rate &&
         a.seq_aux_loss_coef == b.seq_aux_loss_coef && a.router_dim == b.router_dim &&
         a.router_temperature_init == b.router_temperature_init &&
         a.shared_intermediate_size == b.shared_intermediate_size &&
         a.rms_norm_eps == b.rms_norm_eps && a.rope_theta == b.rope_theta &&
         a.tie_word_embeddings == b.tie_word_embeddings && a.initializer_range == b.initializer_range &&
         a.aux_loss == b.aux_loss && a.router_aux_loss_coef == b.router_aux_loss_coef &&
         a.router_z_loss_coef == b.router_z_loss_coef;
}

absl::Status Validate(const ModelConfig& config) {
  SHOAL_RETURN_IF_ERROR(CheckSizes(config));
  SHOAL_RETURN_IF_ERROR(CheckNumbers(config));
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("num_key_value_heads ", config.num_key_value_heads,
                                                   " must divide num_attention_heads ",
                                                   config.num_attention_heads));
  }
  if (config.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim must be even, is ", config.head_dim));
  }
  if (config.num_experts_per_tok > config.num_local_experts) {
    return absl::InvalidArgumentError(absl::StrCat("num_experts_per_tok ", config.num_experts_per_tok,
                                                   " exceeds num_local_experts ", config.num_local_experts));
  }
  SHOAL_RETURN_IF_ERROR(CheckRouter(config));
  for (size_t layer = static_cast<size_t>(config.num_hidden_layers); layer < config.dense_layers.size();
       ++layer) {
    if (config.dense_layers[layer]) {
      return absl::InvalidArgumentError(absl::StrCat(
          "dense layer ", layer, " does not exist: num_hidden_layers is ", config.num_hidden_layers));
    }
  }
  if (!CountsFit(config)) return absl::InvalidArgumentError("the model has more than 2^56 parameters");
  return absl::OkStatus();
}

int NumMoeLayers(const ModelConfig& config) {
  int count = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) count += config.is_dense(layer) ? 0 : 1;
  return count;
}

int64_t TotalParameters(const ModelConfig& config) {
  const int64_t moe = NumMoeLayers(config);
  const int64_t dense = config.num_hidden_layers - moe;
  const int64_t temperature = config.router == RouterKind::kXMoe ? 1 : 0;
  const int64_t moe_layer = config.num_local_experts * ExpertParameters(config) + RouterMatrices(config) + temperature +
                            SharedExpertParameters(config);
  const int64_t every_layer = AttentionParameters(config) + 2 * config.hidden_size;
  const int64_t embeddings = config.vocab_size * config.hidden_size * (config.tie_word_embeddings ? 1 : 2);
  return config.num_hidden_layers * every_layer + moe * moe_layer + dense * DenseParameters(config) +
         embeddings + config.hidden_size;
}

int64_t ActiveMatmulParameters(const ModelConfig& config) {
  const int64_t moe = NumMoeLayers(config);
  const int64_t dense = config.num_hidden_layers - moe;
  const double experts = config.router == RouterKind::kExpertChoice
                             ? std::min<double>(config.capacity_factor, config.num_local_experts)
                             : config.num_experts_per_tok;
  const int64_t routed = std::llround(experts * static_cast<double>(ExpertParameters(config)));
  const int64_t moe_layer = routed + RouterMatrices(config) + SharedExpertParameters(config);
  return config.num_hidden_layers * AttentionParameters(config) + moe * moe_layer +
         dense * DenseParameters(config) + config.vocab_size * config.hidden_size;
}

int64_t TrainFlopsPerToken(const ModelConfig& config, int64_t seq_length) {
  return 6 * ActiveMatmulParameters(config) + 6 * config.num_hidden_layers * config.query_size() * seq_length;
}

}  // namespace shoal
