#include "models/routers/balance.h"

namespace shoal {
namespace {

// Tokens of all layers pooled: every layer has the same gradient.
void PooledLoss(const ModelConfig& config, const RoutingTotals& totals, BalanceLoss* loss) {
  const size_t layers = totals.counts.size(), experts = static_cast<size_t>(config.num_local_experts);
  const double tokens = static_cast<double>(totals.tokens) * static_cast<double>(layers);
  std::vector<float> dprob(experts);
  for (size_t e = 0; e < experts; ++e) {
    double count = 0, prob = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
      count += totals.counts[layer][e];
      prob += totals.prob_sums[layer][e];
    }
    const double fraction = count / tokens;
    loss->aux += static_cast<double>(experts) * fraction * prob / tokens;
    dprob[e] = static_cast<float>(config.router_aux_loss_coef * static_cast<double>(experts) * fraction / tokens);
  }
  loss->dprob.assign(layers, dprob);
}

void PerLayerLoss(const ModelConfig& config, const RoutingTotals& totals, BalanceLoss* loss) {
  const double tokens = static_cast<double>(totals.tokens), experts = config.num_local_experts;
  for (size_t layer = 0; layer < totals.counts.size(); ++layer) {
    std::vector<float> dprob;
    for (size_t e = 0; e < totals.counts[layer].size(); ++e) {
      const double fraction = totals.counts[layer][e] / (tokens * config.num_experts_per_tok);
      loss->aux += experts * fraction * totals.prob_sums[layer][e] / tokens;
      dprob.push_back(static_cast<float>(config.router_aux_loss_coef * experts * fraction / tokens));
    }
    loss->dprob.push_back(std::move(dprob));
  }
}

}  // namespace

BalanceLoss ComputeBalanceLoss(const ModelConfig& config, const RoutingTotals& totals) {
  BalanceLoss loss;
  if (totals.counts.empty() || totals.tokens == 0) return loss;
  if (config.aux_loss == AuxLoss::kHf) PooledLoss(config, totals, &loss);
  if (config.aux_loss == AuxLoss::kSwitch) PerLayerLoss(config, totals, &loss);
  for (double z_sum : totals.z_sums) loss.z += z_sum / static_cast<double>(totals.tokens);
  if (totals.sequences > 0) {
    for (double sum : totals.seq_aux_sums) loss.seq_aux += sum / static_cast<double>(totals.sequences);
    loss.seq_aux_scale = static_cast<float>(config.seq_aux_loss_coef / static_cast<double>(totals.sequences));
  }
  loss.z_scale = static_cast<float>(config.router_z_loss_coef / static_cast<double>(totals.tokens));
  return loss;
}

}  // namespace shoal
