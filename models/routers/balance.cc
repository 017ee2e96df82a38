#include "models/routers/balance.h"

namespace shoal {
namespace {

// Tokens of all layers pooled.
double PooledLoss(const ModelConfig& config, const RoutingTotals& totals) {
  const size_t layers = totals.counts.size(), experts = static_cast<size_t>(config.num_local_experts);
  const double tokens = static_cast<double>(totals.tokens) * static_cast<double>(layers);
  double loss = 0;
  for (size_t e = 0; e < experts; ++e) {
    double count = 0, prob = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
      count += totals.counts[layer][e];
      prob += totals.prob_sums[layer][e];
    }
    loss += static_cast<double>(experts) * (count / tokens) * prob / tokens;
  }
  return loss;
}

double PerLayerLoss(const ModelConfig& config, const RoutingTotals& totals) {
  const double tokens = static_cast<double>(totals.tokens), experts = config.num_local_experts;
  double loss = 0;
  for (size_t layer = 0; layer < totals.counts.size(); ++layer) {
    for (size_t e = 0; e < totals.counts[layer].size(); ++e) {
      const double fraction = totals.counts[layer][e] / (tokens * config.num_experts_per_tok);
      loss += experts * fraction * totals.prob_sums[layer][e] / tokens;
    }
  }
  return loss;
}

}  // namespace

BalanceLoss ComputeBalanceLoss(const ModelConfig& config, const RoutingTotals& totals) {
  BalanceLoss loss;
  if (totals.counts.empty() || totals.tokens == 0) return loss;
  if (config.aux_loss == AuxLoss::kHf) loss.aux = PooledLoss(config, totals);
  if (config.aux_loss == AuxLoss::kSwitch) loss.aux = PerLayerLoss(config, totals);
  for (double z_sum : totals.z_sums) loss.z += z_sum / static_cast<double>(totals.tokens);
  if (totals.sequences == 0) return loss;
  for (double sum : totals.seq_aux_sums) loss.seq_aux += sum / static_cast<double>(totals.sequences);
  return loss;
}

BalanceGradient ComputeBalanceGradient(const ModelConfig& config, int layers, int64_t tokens, int64_t sequences) {
  BalanceGradient gradient;
  if (layers == 0 || tokens == 0) return gradient;
  const double count = static_cast<double>(tokens), experts = config.num_local_experts;
  gradient.of_all_layers = config.aux_loss == AuxLoss::kHf;
  if (config.aux_loss == AuxLoss::kHf) {
    const double pooled = count * layers;
    gradient.by_count = config.router_aux_loss_coef * experts / (pooled * pooled);
  }
  if (config.aux_loss == AuxLoss::kSwitch) {
    gradient.by_count = config.router_aux_loss_coef * experts / (count * config.num_experts_per_tok * count);
  }
  gradient.z_scale = static_cast<float>(config.router_z_loss_coef / count);
  if (sequences > 0) gradient.seq_aux_scale = static_cast<float>(config.seq_aux_loss_coef / static_cast<double>(sequences));
  return gradient;
}

}  // namespace shoal
