#include "parallel/planner/fsmoe_layer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace shoal {
namespace {

// FSMoE's formula (section 4.1): of the part with experts, without the dense part; gradients: what it carries.
double FsmoeClosedForm(const FsmoeLayer& layer, int chunks, double gradients) {
  const double r = chunks, a2a = layer.all_to_all.OfChunk(chunks), experts = layer.experts.OfChunk(chunks);
  const double intra = layer.gather.OfChunk(chunks) + layer.scatter.OfChunk(chunks);
  const bool q1 = a2a > layer.gather.OfChunk(chunks);
  const bool q2 = r * experts > 2 * (r - 1) * a2a;
  const bool q3 = r * experts > (r - 1) * intra;
  const bool q4 = gradients > intra;
  const bool q5 = gradients > r * experts - 2 * (r - 1) * a2a + intra;
  const bool q6 = gradients > r * intra - 2 * (r - 1) * a2a;
  const double inter_bound = 2 * r * a2a + gradients;
  const double expert_bound = 2 * a2a + intra + r * experts;
  if (q1) {
    if (q2) return q5 ? inter_bound : expert_bound;
    return q4 ? inter_bound : 2 * r * a2a + intra;
  }
  if (q3) return q5 ? inter_bound : expert_bound;
  return q6 ? inter_bound : 2 * a2a + r * intra;
}

// Its four cases, each where its formula is exact.
TEST(FsmoeTime, ExpertBound) {
  const FsmoeLayer layer = {.all_to_all = {0, 8}, .gather = {0, 4}, .scatter = {0, 4}, .experts = {0, 400}};
  for (int chunks : {1, 2, 4}) {
    EXPECT_DOUBLE_EQ(FsmoeTime(layer, {.chunks = chunks}, Phase::kForward, 1), FsmoeClosedForm(layer, chunks, 0));
    EXPECT_DOUBLE_EQ(FsmoeClosedForm(layer, chunks, 0), (2 * 8 + 4 + 4) / static_cast<double>(chunks) + 400);
  }
}

TEST(FsmoeTime, AllToAllBound) {
  const FsmoeLayer layer = {.all_to_all = {0, 400}, .gather = {0, 40}, .scatter = {0, 40}, .experts = {0, 20}};
  for (int chunks : {2, 4, 8}) {
    // Chunk 0 is scattered after the last chunk is gathered, whose rows come last.
    EXPECT_DOUBLE_EQ(FsmoeTime(layer, {.chunks = chunks}, Phase::kForward, 1), FsmoeClosedForm(layer, chunks, 0));
  }
}

TEST(FsmoeTime, IntraBound) {
  const FsmoeLayer layer = {.all_to_all = {0, 20}, .gather = {0, 400}, .scatter = {0, 400}, .experts = {0, 20}};
  for (int chunks : {2, 4, 8}) {
    EXPECT_DOUBLE_EQ(FsmoeTime(layer, {.chunks = chunks}, Phase::kForward, 1), FsmoeClosedForm(layer, chunks, 0));
  }
}

TEST(FsmoeTime, GradientBound) {
  FsmoeLayer layer = {.all_to_all = {0, 100}, .gather = {0, 40}, .scatter = {0, 40}, .experts = {0, 50}};
  layer.gradients = {0, 1000};
  for (int chunks : {1, 2, 4}) {
    EXPECT_DOUBLE_EQ(FsmoeTime(layer, {.chunks = chunks, .beside_experts = 1}, Phase::kBackward, 1), 200 + 1000);
    EXPECT_DOUBLE_EQ(FsmoeClosedForm(layer, chunks, 1000), 200 + 1000);
  }
}

// Whatever the regime, the formula never asks for more than the tasks take, and misses little of it.
TEST(FsmoeTime, IsNearTheClosedForm) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const auto draw = [&] { return std::exp(std::uniform_real_distribution<>(0, 5)(random)); };
    FsmoeLayer layer = {
        .all_to_all = {0.1 * draw(), draw()}, .gather = {0.1 * draw(), draw()}, .experts = {0.1 * draw(), draw()}};
    layer.scatter = layer.gather;
    for (int chunks : {1, 2, 4, 8}) {
      const double time = FsmoeTime(layer, {.chunks = chunks}, Phase::kForward, 1), formula = FsmoeClosedForm(layer, chunks, 0);
      EXPECT_GE(time, formula * (1 - 1e-9)) << "seed " << seed << " chunks " << chunks;
      EXPECT_LE(time, 1.6 * formula) << "seed " << seed << " chunks " << chunks;
    }
  }
}

TEST(FsmoeTime, OneLinkAtATimeIsNeverFaster) {
  const FsmoeLayer layer = {.all_to_all = {1, 100}, .gather = {1, 60}, .scatter = {1, 60}, .experts = {1, 80}};
  for (int chunks : {1, 2, 4}) {
    EXPECT_LE(FsmoeTime(layer, {.chunks = chunks}, Phase::kForward, 1),
              FsmoeTime(layer, {.chunks = chunks, .overlap_links = false}, Phase::kForward, 1));
  }
}

}  // namespace
}  // namespace shoal
