#include "models/routers/balance.h"

#include <random>

#include "gtest/gtest.h"

namespace shoal {
namespace {

ModelConfig ConfigWith(AuxLoss kind) {
  ModelConfig config;
  config.num_local_experts = 4;
  config.num_experts_per_tok = 2;
  config.aux_loss = kind;
  config.router_aux_loss_coef = 0.5;
  config.router_z_loss_coef = 0.1;
  return config;
}

RoutingTotals Balanced(int layers, int64_t tokens) {
  RoutingTotals totals;
  totals.tokens = tokens;
  const double t = static_cast<double>(tokens);
  totals.counts.assign(static_cast<size_t>(layers), std::vector<double>(4, t * 2 / 4));
  totals.prob_sums.assign(static_cast<size_t>(layers), std::vector<double>(4, t / 4));
  totals.z_sums.assign(static_cast<size_t>(layers), 3 * t);
  return totals;
}

TEST(BalanceLoss, BalancedValuesAreTheChoicesAndTheLayers) {
  EXPECT_DOUBLE_EQ(ComputeBalanceLoss(ConfigWith(AuxLoss::kHf), Balanced(3, 64)).aux, 2.0);
  EXPECT_DOUBLE_EQ(ComputeBalanceLoss(ConfigWith(AuxLoss::kSwitch), Balanced(3, 64)).aux, 3.0);
  EXPECT_DOUBLE_EQ(ComputeBalanceLoss(ConfigWith(AuxLoss::kSwitch), Balanced(3, 64)).z, 9.0);
  EXPECT_DOUBLE_EQ(ComputeBalanceLoss(ConfigWith(AuxLoss::kNone), Balanced(3, 64)).aux, 0.0);
}

TEST(BalanceLoss, SequencesAreAveragedAndLayersAdded) {
  ModelConfig config = ConfigWith(AuxLoss::kNone);
  config.seq_aux_loss_coef = 0.02;
  RoutingTotals totals = Balanced(3, 64);
  totals.prob_sums.clear();
  totals.sequences = 8;
  totals.seq_aux_sums = {8, 12, 16};
  EXPECT_DOUBLE_EQ(ComputeBalanceLoss(config, totals).seq_aux, 1 + 1.5 + 2);
  const BalanceGradient gradient = ComputeBalanceGradient(config, 3, 64, 8);
  EXPECT_FLOAT_EQ(gradient.seq_aux_scale, 0.02f / 8);
  EXPECT_FLOAT_EQ(gradient.z_scale, 0.1f / 64);
  EXPECT_EQ(gradient.by_count, 0);
}

TEST(BalanceLoss, GradientIsThatOfTheLoss) {
  const unsigned seed = 7;
  RecordProperty("seed", static_cast<int>(seed));
  std::mt19937 random(seed);
  for (AuxLoss kind : {AuxLoss::kHf, AuxLoss::kSwitch}) {
    const ModelConfig config = ConfigWith(kind);
    RoutingTotals totals = Balanced(2, 50);
    std::uniform_real_distribution<double> uniform(1, 40);
    for (auto& layer : totals.counts) for (double& count : layer) count = std::floor(uniform(random));
    for (auto& layer : totals.prob_sums) for (double& prob : layer) prob = uniform(random);
    const double loss = ComputeBalanceLoss(config, totals).aux;
    const BalanceGradient gradient = ComputeBalanceGradient(config, 2, 50, 0);
    EXPECT_EQ(gradient.of_all_layers, kind == AuxLoss::kHf);
    for (size_t layer = 0; layer < 2; ++layer) {
      for (size_t e = 0; e < 4; ++e) {
        RoutingTotals moved = totals;
        moved.prob_sums[layer][e] += 1.0;  // One token's probability by 1: the loss is linear in it.
        const double slope = config.router_aux_loss_coef * (ComputeBalanceLoss(config, moved).aux - loss);
        const double choices = gradient.of_all_layers ? totals.counts[0][e] + totals.counts[1][e] : totals.counts[layer][e];
        EXPECT_NEAR(gradient.by_count * choices, slope, 1e-9);
      }
    }
  }
}

}  // namespace
}  // namespace shoal
