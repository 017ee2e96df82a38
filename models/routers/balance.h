// Load balancing of routers: auxiliary losses and their gradients from sums over the tokens of a whole part of the batch,
// whatever the number of ranks that made them. Pure.
//
// With f_e the fraction of tokens that chose expert e (a constant) and P_e its mean router probability: `hf` pools the
// tokens of all layers, E * sum f_e P_e (Hugging Face's Mixtral); `switch` takes each layer by itself with f_e / k and
// sums over layers (Fedus et al., 2021, arXiv 2101.03961). The z-loss is the mean over tokens of logsumexp(logits)^2, summed
// over layers (Zoph et al., 2022, arXiv 2202.08906). The sequence-wise loss is the mean over sequences of sum f_e P_e, with f_e the
// sequence's choices of e over its fair share and P_e the mean of score_e over the token's sum of scores, summed over layers
// (DeepSeek-AI, 2024, "DeepSeek-V3", arXiv 2412.19437).
#pragma once

#include <cstdint>
#include <vector>

#include "models/model_config.h"

namespace shoal {

// Sums over `tokens` tokens in `sequences` sequences, per MoE layer. What no loss reads may be empty.
struct RoutingTotals {
  int64_t tokens = 0, sequences = 0;
  std::vector<std::vector<double>> counts;     // [layer][expert]
  std::vector<std::vector<double>> prob_sums;  // [layer][expert]
  std::vector<double> z_sums;                  // [layer]
  std::vector<double> seq_aux_sums;            // [layer]
};

struct BalanceLoss {
  double aux = 0, z = 0, seq_aux = 0;  // Before their coefficients.
};

BalanceLoss ComputeBalanceLoss(const ModelConfig& config, const RoutingTotals& totals);

// Their gradients, from the numbers of layers, tokens and sequences alone; no tokens: none.
struct BalanceGradient {
  double by_count = 0;      // d(coefficient * aux) / d(a token's probability of an expert), over the expert's choices.
  bool of_all_layers = false;  // Choices in all layers (kHf), or in the layer of the token's router.
  float z_scale = 0;        // d(coefficient * z) / d(a token's logsumexp^2).
  float seq_aux_scale = 0;  // d(coefficient * seq_aux) / d(a sequence's loss).
};

BalanceGradient ComputeBalanceGradient(const ModelConfig& config, int layers, int64_t tokens, int64_t sequences);

}  // namespace shoal
