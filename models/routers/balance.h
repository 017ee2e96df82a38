// Load balancing of routers: auxiliary losses and their gradients from sums over the tokens of a whole part of the batch,
// whatever the number of ranks that made them. Pure.
//
// With f_e the fraction of tokens that chose expert e (a constant) and P_e its mean router probability: `hf` pools the
// tokens of all layers, E * sum f_e P_e (Hugging Face's Mixtral); `switch` takes each layer by itself with f_e / k and
// sums over layers (Fedus et al., 2021, arXiv 2101.03961). The z-loss is the mean over tokens of logsumexp(logits)^2, summed
// over layers (Zoph et al., 2022, arXiv 2202.08906).
#pragma once

#include <cstdint>
#include <vector>

#include "models/model_config.h"

namespace shoal {

// Sums over `tokens` tokens, per MoE layer.
struct RoutingTotals {
  int64_t tokens = 0;
  std::vector<std::vector<double>> counts;     // [layer][expert]
  std::vector<std::vector<double>> prob_sums;  // [layer][expert]
  std::vector<double> z_sums;                  // [layer]
};

struct BalanceLoss {
  double aux = 0;                         // Before its coefficient.
  double z = 0;                           // Likewise.
  std::vector<std::vector<float>> dprob;  // [layer][expert]: d(coefficient * aux) / d(a token's probability).
  float z_scale = 0;                      // d(coefficient * z) / d(a token's logsumexp^2).
};

BalanceLoss ComputeBalanceLoss(const ModelConfig& config, const RoutingTotals& totals);

}  // namespace shoal
