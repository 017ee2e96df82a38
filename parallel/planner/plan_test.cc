#include "parallel/planner/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

namespace shoal {
namespace {

using testing::HasSubstr;

ModelShape Model() {
  ModelShape model;
  model.vocab = 32000;
  model.width = 2048;
  model.expert_inner = 4096;
  model.query_size = 2048;
  model.kv_size = 512;
  model.heads = 16;
  model.experts = 16;
  model.moe.assign(8, true);
  model.compute_bytes = 2;
  model.sequences = 64;
  model.sequence_length = 2048;
  return model;
}

Cluster Hosts(int hosts, int devices) {
  return {.hosts = hosts,
          .devices_per_host = devices,
          .bf16_flops_per_ns = 300e3,
          .fp32_flops_per_ns = 30e3,
          .bf16_peak_flops_per_ns = 500e3,
          .fp32_peak_flops_per_ns = 50e3,
          .memory_bytes_per_ns = 2000,
          .memory_bytes = int64_t{80} << 30,
          .task_ns = 10e3,
          .intra_latency_ns = 10e3,
          .intra_bytes_per_ns = 200,
          .inter_latency_ns = 20e3,
          .inter_bytes_per_ns = 100,
          .interference = 1.2};
}

StepEstimate Estimate(const ModelShape& model, const Cluster& cluster, const StepLayout& layout, const LoadSkew& skew = {}) {
  auto estimate = EstimateStep(model, cluster, layout, skew, {}, Record::kNo);
  EXPECT_TRUE(estimate.ok()) << estimate.status();
  return *std::move(estimate);
}

TEST(EstimateStep, OneRankIsBoundByItsOperations) {
  ModelShape model = Model();
  const StepEstimate estimate = Estimate(model, Hosts(1, 1), {});
  EXPECT_EQ(estimate.exposed_ns, 0);
  EXPECT_LT(estimate.mfu, 0.6);  // The share of the peak that products reach.
  EXPECT_GT(estimate.mfu, 0.3);
}

TEST(EstimateStep, MoreRanksAreFasterAndLessEfficient) {
  const StepEstimate one = Estimate(Model(), Hosts(1, 1), {});
  const StepEstimate eight = Estimate(Model(), Hosts(1, 8), {.expert = 8});
  const StepEstimate sixteen = Estimate(Model(), Hosts(2, 8), {.expert = 16});
  EXPECT_LT(eight.step_ns, one.step_ns);
  EXPECT_LT(sixteen.step_ns, eight.step_ns);
  EXPECT_LT(eight.mfu, one.mfu);
  EXPECT_LT(sixteen.mfu, eight.mfu);
}

TEST(EstimateStep, SkewCostsExpertParallelismAndCopiesWinItBack) {
  const Cluster cluster = Hosts(2, 4);
  const StepEstimate even = Estimate(Model(), cluster, {.expert = 8});
  const StepEstimate skewed = Estimate(Model(), cluster, {.expert = 8}, {.sigma = 1.0, .seed = 3});
  const StepEstimate sparse = Estimate(Model(), cluster, {.sparse = true}, {.sigma = 1.0, .seed = 3});
  EXPECT_GT(skewed.step_ns, 1.1 * even.step_ns);
  EXPECT_LT(sparse.step_ns, skewed.step_ns);
}

TEST(EstimateStep, CopiesByCostAreAsTheyPay) {
  const LoadSkew skew = {.sigma = 1.0, .seed = 3};
  const Cluster cluster = Hosts(2, 4);
  const StepEstimate none = Estimate(Model(), cluster, {.sparse = true, .copies = 0}, skew);
  const StepEstimate by_cost = Estimate(Model(), cluster, {.sparse = true}, skew);
  EXPECT_EQ(none.memory.copies, 0);
  EXPECT_GT(by_cost.memory.copies, 0);
  EXPECT_LT(by_cost.step_ns, 0.9 * none.step_ns);
  for (int overlap : {1, 2, 4}) {
    EXPECT_LT(by_cost.step_ns, Estimate(Model(), cluster, {.sparse = true, .overlap = overlap}, skew).step_ns) << overlap;
  }
  // A link that is too slow for weights: as without copies.
  Cluster slow = cluster;
  slow.intra_bytes_per_ns = slow.inter_bytes_per_ns = 0.5;
  ModelShape few_tokens = Model();
  few_tokens.sequence_length = 64;
  EXPECT_EQ(Estimate(few_tokens, slow, {.sparse = true}, skew).memory.copies, 0);
}

TEST(EstimateStep, CopiesTakeTheMemoryThatIsLeft) {
  const LoadSkew skew = {.sigma = 1.0, .seed = 3};
  Cluster cluster = Hosts(2, 4);
  const MemoryUse roomy = Estimate(Model(), cluster, {.sparse = true}, skew).memory;
  const MemoryUse none = Estimate(Model(), cluster, {.sparse = true, .copies = 0}, skew).memory;
  cluster.memory_bytes = none.total() + roomy.copies / 2;
  const MemoryUse tight = Estimate(Model(), cluster, {.sparse = true}, skew).memory;
  EXPECT_GT(tight.copies, 0);
  EXPECT_LT(tight.copies, roomy.copies);
  EXPECT_LE(tight.total(), cluster.memory_bytes);
}

TEST(EstimateStep, WavesPartWhereNoLossBalancesExperts) {
  Cluster cluster = Hosts(8, 1);
  cluster.inter_bytes_per_ns = 20;  // Communication takes as long as computation.
  ModelShape model = Model();
  const SchedulerOptions waves = {.waves = WavesUpTo(model.sequences)};
  const auto together = EstimateStep(model, cluster, {.expert = 8}, {}, waves, Record::kNo);
  model.balance = false;
  const auto apart = EstimateStep(model, cluster, {.expert = 8}, {}, waves, Record::kNo);
  ASSERT_TRUE(together.ok() && apart.ok());
  EXPECT_TRUE(together->choice.schedule.turns.empty());
  EXPECT_FALSE(apart->choice.schedule.turns.empty());
  EXPECT_LT(apart->step_ns, 0.98 * together->step_ns);
}

TEST(EstimateStep, SixteenThousandRanksInSeconds) {
  ModelShape model = Model();
  model.experts = 256;
  model.sequences = 16384;
  const auto begin = std::chrono::steady_clock::now();
  const StepEstimate estimate = Estimate(model, Hosts(2048, 8), {.expert = 64, .dense = DensePolicy::kSharded});
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  EXPECT_GT(estimate.step_ns, 0);
}

TEST(EstimateStep, SaysWhyALayoutDoesNotFit) {
  EXPECT_THAT(std::string(EstimateStep(Model(), Hosts(1, 8), {.expert = 3}, {}, {}, Record::kNo).status().message()),
              HasSubstr("groups of 3 ranks do not fit 8 ranks and"));
  EXPECT_THAT(std::string(EstimateStep(Model(), Hosts(4, 8), {.expert = 32}, {}, {}, Record::kNo).status().message()),
              HasSubstr("groups of 32 ranks do not fit 32 ranks and 16 experts"));
}

MemoryUse Memory(const ModelShape& model, const Cluster& cluster, const StepLayout& layout) {
  auto out = LayOut(model, cluster, layout, {});
  EXPECT_TRUE(out.ok()) << out.status();
  return PeakMemory(model, layout, *out, /*waves=*/1);
}

TEST(PeakMemory, OneRankByHand) {
  ModelShape model;
  model.vocab = 100;
  model.width = 8;
  model.expert_inner = 16;
  model.query_size = 8;
  model.kv_size = 4;
  model.heads = 2;
  model.experts = 4;
  model.choices = 2;
  model.moe = {true};
  model.sequences = 2;
  model.sequence_length = 5;
  const MemoryUse use = Memory(model, Hosts(1, 1), {});
  const int64_t dense = 3 * 8 + 2 * 100 * 8 + 8 * (2 * 8 + 2 * 4) + 4 * 8, experts = 4 * 3 * 8 * 16;
  EXPECT_EQ(use.weights, 4 * (dense + experts));
  EXPECT_EQ(use.gradients, 4 * (dense + experts));
  EXPECT_EQ(use.optimizer, 8 * (dense + experts));
  EXPECT_EQ(use.copies, 0);
  EXPECT_EQ(use.buffers, 0);
  const int64_t T = 10, D = 8, S = 20;
  const int64_t inputs = 2 * T * D * 4, attention = T * (4 * (D + 2 * 8 + 2 * 4) + 4 * 3);
  const int64_t moe = T * D * 8 + T * 4 * (2 + 4 + 4) + S * 8 + 4 * (S * (8 + 32) + S * 8);
  EXPECT_EQ(use.activations, inputs + attention + moe);
  EXPECT_EQ(use.working, T * D * 8 + T * 100 * 4);  // The head's.
}

// Two hosts of one rank each, which keep everything in pages of 2 MiB.
TEST(PeakMemory, WholeBlocksAreOwned) {
  ModelShape model = Model();
  model.blocks.resize(model.BucketElements().size());
  const int layer = 2;
  model.blocks[layer] = {400, 300, 200, 100};
  EXPECT_EQ(model.OwnedElements(layer, 1), 1000);
  EXPECT_EQ(model.OwnedElements(layer, 2), 600);
  EXPECT_EQ(model.OwnedElements(layer, 8), 400);
  model.blocks.clear();
  const int64_t elements = model.BucketElements()[layer];
  EXPECT_EQ(model.OwnedElements(layer, 7), (elements + 6) / 7);
}

TEST(PeakMemory, WavesHaveTensorsAndBuffersOfTheirOwn) {
  ModelShape model;
  model.vocab = 100;
  model.width = 256;
  model.expert_inner = 256;
  model.query_size = 256;
  model.kv_size = 128;
  model.heads = 2;
  model.experts = 4;
  model.choices = 2;
  model.moe = {true};
  model.sequences = 4;
  model.sequence_length = 1500;
  const auto out = LayOut(model, Hosts(2, 1), {.expert = 2}, {});
  ASSERT_TRUE(out.ok()) << out.status();
  // 3,000 tokens of a rank; 6,000 rows of 1 KiB sent, and as many arrive: 5.86 MiB, with a quarter more 7.32.
  constexpr int64_t kMiB = 1 << 20;
  EXPECT_EQ(PeakMemory(model, {.expert = 2}, *out, 1).buffers, 2 * 8 * kMiB);
  EXPECT_EQ(PeakMemory(model, {.expert = 2}, *out, 2).buffers, 4 * 4 * kMiB);  // 3.66 each.
  // An expert has 768 KiB, two of four are here: 1.5 MiB. Embedding and head have 100 KiB each, the layer 769 KiB.
  const int64_t small = 3 * 256 * 4 + 2 * 100 * 256 * 4;
  EXPECT_EQ(PeakMemory(model, {.expert = 2}, *out, 1).weights, 2 * kMiB + 2 * kMiB + small);
  EXPECT_EQ(PeakMemory(model, {.expert = 2}, *out, 1).gradients, 2 * kMiB + 2 * kMiB + small);
  // More waves than sequences are as many as sequences.
  EXPECT_EQ(PeakMemory(model, {.expert = 2}, *out, 9).total(), PeakMemory(model, {.expert = 2}, *out, 2).total());
}

TEST(EstimateStep, TransportThatComputesMakesCommunicationDearer) {
  Cluster cluster = Hosts(2, 1);
  cluster.inter_bytes_per_ns = 10;
  const double free_ns = Estimate(Model(), cluster, {.expert = 2}).step_ns;
  cluster.inter_compute_share = 0.2;
  const StepEstimate taxed = Estimate(Model(), cluster, {.expert = 2});
  EXPECT_GT(taxed.step_ns, free_ns);
  EXPECT_LT(taxed.step_ns, free_ns / 0.8);
}

TEST(CostsOf, RowsCostAMessageToEachPeer) {
  Cluster cluster = Hosts(2, 8);
  cluster.intra_message_ns = 100;
  cluster.inter_message_ns = 1000;
  const auto fixed_ns = [&](const StepLayout& layout, Lane lane) {
    const auto out = LayOut(Model(), cluster, layout, {});
    EXPECT_TRUE(out.ok()) << out.status();
    return out->costs.models.at({Op::kDispatch, Phase::kForward, lane}).fixed_ns;
  };
  const double intra_ns = cluster.task_ns + cluster.intra_latency_ns, inter_ns = cluster.task_ns + cluster.inter_latency_ns;
  EXPECT_EQ(fixed_ns({.expert = 16}, Lane::kIntra), intra_ns + 6 * 100);  // 7 peers, of which the first is the latency's.
  EXPECT_EQ(fixed_ns({.expert = 16}, Lane::kInter), inter_ns + 7 * 1000);
  EXPECT_EQ(fixed_ns({.expert = 4}, Lane::kIntra), intra_ns + 2 * 100);  // The group is on one host.
  EXPECT_EQ(fixed_ns({.expert = 4}, Lane::kInter), inter_ns);
}

TEST(PeakMemory, QuantisedWeightsAreKeptWhereWeightsAre) {
  ModelShape model = Model();
  const MemoryUse plain = Memory(model, Hosts(1, 4), {.expert = 4});
  model.fp8 = true;
  const MemoryUse kept = Memory(model, Hosts(1, 4), {.expert = 4});
  const int64_t weights = 8 * (model.AttentionElements() + 4 * model.expert_elements());  // Of 8 layers, 4 experts of 16 each.
  EXPECT_EQ(plain.quantised, 0);
  EXPECT_EQ(kept.quantised, 2 * weights);
  EXPECT_EQ(kept.total() - plain.total(), kept.quantised);
  const MemoryUse sharded =
      Memory(model, Hosts(1, 4), {.expert = 2, .dense = DensePolicy::kSharded, .experts = ExpertPolicy::kRematerialise});
  const int64_t up = 2 * model.width * model.expert_inner, largest_dense = model.width * (model.query_size + 2 * model.kv_size);
  EXPECT_EQ(sharded.quantised, 2 * (8 * up + largest_dense));  // 8 experts are here, 4 of them copies.
}

// Four ranks with all 16 experts, of which each owns four.
TEST(PeakMemory, PinnedSumsArePartsOfExpertsByRank) {
  ModelShape model = Model();
  model.sequences = 4;  // Few tokens, so that gradients of experts make the worst moment.
  const Cluster cluster = Hosts(1, 4);
  const MemoryUse fast = Memory(model, cluster, {.expert = 1});
  const MemoryUse pinned = Memory(model, cluster, {.expert = 1, .dispatch = DispatchRule::kNearestWhole});
  const int64_t expert = 4 * model.expert_elements();
  EXPECT_EQ(fast.partials, 0);
  EXPECT_EQ(fast.copies - pinned.copies, 8 * 12 * expert);  // Of 8 layers; copies have no gradients.
  // A rank computes its own rows of all experts, while those of the layer above go to their owners: 4 from each of 3 ranks.
  EXPECT_EQ(pinned.partials, (16 + 16 + 4 * 3) * expert);
  // Without copies, those of one rank's rows at a time.
  EXPECT_EQ(Memory(model, cluster, {.expert = 4, .dispatch = DispatchRule::kNearestWhole}).partials, 4 * expert);
}

TEST(PeakMemory, EachPolicySavesWhatItShould) {
  const ModelShape model = Model();
  const Cluster cluster = Hosts(2, 8);
  const MemoryUse plain = Memory(model, cluster, {.expert = 4});
  EXPECT_LT(Memory(model, cluster, {.expert = 16}).copies, plain.copies);
  EXPECT_LT(Memory(model, cluster, {.expert = 4, .dense = DensePolicy::kSharded}).weights, plain.weights);
  EXPECT_LT(Memory(model, cluster, {.expert = 4, .experts = ExpertPolicy::kRematerialise}).copies, plain.copies / 3);
  EXPECT_LT(Memory(model, cluster, {.expert = 4, .recompute = true}).activations, plain.activations / 2);
  EXPECT_LT(Memory(model, cluster, {.expert = 4, .parts = 4}).activations, plain.activations / 2);
}

TEST(FindPlan, RanksWhatFitsAndSaysWhatDoesNot) {
  ModelShape model = Model();
  PlanOptions options;
  const auto roomy = FindPlan(model, Hosts(2, 4), options);
  ASSERT_TRUE(roomy.ok()) << roomy.status();
  for (size_t i = 1; i < roomy->ranked.size(); ++i) EXPECT_LE(roomy->ranked[i - 1].step_ns, roomy->ranked[i].step_ns);
  options.memory_bytes = int64_t{12} << 30;
  const auto tight = FindPlan(model, Hosts(2, 4), options);
  ASSERT_TRUE(tight.ok()) << tight.status();
  EXPECT_GE(tight->ranked[0].step_ns, roomy->ranked[0].step_ns);
  ASSERT_FALSE(tight->excluded.empty());
  EXPECT_THAT(tight->excluded.front(), HasSubstr("a device has 12 GiB"));
  for (const StepEstimate& estimate : tight->ranked) EXPECT_LE(estimate.memory.total(), options.memory_bytes);
  for (const StepEstimate& estimate : roomy->ranked) EXPECT_EQ(estimate.layout.prefetch, 0);
  options.base = {.expert = 2, .dispatch = DispatchRule::kWaterFillWhole, .prefetch = 2};
  const auto pinned = FindPlan(model, Hosts(2, 4), options);
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  for (const StepEstimate& estimate : pinned->ranked) {
    EXPECT_EQ(estimate.layout.prefetch, 2);
    EXPECT_TRUE(estimate.layout.pinned());
    EXPECT_FALSE(estimate.layout.parts > 1 && estimate.layout.expert < 8 && estimate.layout.experts == ExpertPolicy::kKeep);
  }
  options.base = {};
  options.memory_bytes = int64_t{1} << 30;
  EXPECT_THAT(std::string(FindPlan(model, Hosts(2, 4), options).status().message()), HasSubstr("no layout fits; nearest is"));
}

}  // namespace
}  // namespace shoal
