#include "parallel/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "parallel/schedule/simulate.h"

namespace shoal {
namespace {

// Nanoseconds a unit of each kind of work, and for each task.
struct Rates {
  double token = 100, row = 200, inter_byte = 1, intra_byte = 0.2, element = 0.1;
  double fixed_compute = 1000, fixed_link = 10000;
};

CostTable CostsOf(const Rates& rates) {
  CostTable costs;
  for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kUpdate}) {
    const double more = phase == Phase::kBackward ? 2 : 1;
    for (const Op op : {Op::kEmbed, Op::kAttention, Op::kDense, Op::kRoute, Op::kArrange, Op::kShared, Op::kHead}) {
      costs.models[{op, phase, Lane::kCompute}] = {rates.fixed_compute, rates.token * more};
    }
    for (const Op op : {Op::kExperts, Op::kExpertsWeight})
      costs.models[{op, phase, Lane::kCompute}] = {rates.fixed_compute, rates.row};
    for (const Op op : {Op::kPack, Op::kCombine})
      costs.models[{op, phase, Lane::kCompute}] = {rates.fixed_compute, rates.row / 50};
    for (const Op op : {Op::kNorm, Op::kUpdate}) costs.models[{op, phase, Lane::kCompute}] = {rates.fixed_compute, rates.element};
    for (const Op op : {Op::kDispatch, Op::kReturn, Op::kGather, Op::kReduce, Op::kMaterialise, Op::kReduceExperts}) {
      costs.models[{op, phase, Lane::kInter}] = {rates.fixed_link, rates.inter_byte};
      costs.models[{op, phase, Lane::kIntra}] = {rates.fixed_link / 4, rates.intra_byte};
    }
    for (const Op op : {Op::kExchange, Op::kTotals, Op::kNormSum})
      costs.models[{op, phase, Lane::kControl}] = {rates.fixed_link, 0};
  }
  costs.interference = 1.2;
  return costs;
}

struct Problem {
  Topology topology{{0, 0, 1, 1}};
  StepShape shape;
  Workload work;
};

Problem Make(int layers, int parts = 1) {
  Problem p;
  p.shape.layers.resize(static_cast<size_t>(layers));
  p.shape.parts = parts;
  p.work.tokens = {1024};
  p.work.choices = 2;
  p.work.row_bytes = 512;
  p.work.expert_elements = 100000;
  p.work.expert_weight_bytes = p.work.expert_gradient_bytes = 400000;
  p.work.experts = {{.placement = GroupedPlacement(1, 8, 4, 4)[0]}};
  p.work.experts_of_layer.assign(static_cast<size_t>(layers), 0);
  p.work.bucket_elements.assign(static_cast<size_t>(p.shape.buckets().count()), 300000);
  for (int64_t elements : p.work.bucket_elements) p.work.bucket_bytes.push_back(4 * elements);
  DescribeTraffic(p.work, p.topology, &p.shape);
  return p;
}

Rates RandomRates(std::mt19937* random) {
  const auto draw = [&](double low, double high) {
    return low * std::pow(high / low, std::uniform_real_distribution<>(0, 1)(*random));
  };
  return {.token = draw(20, 500),
          .row = draw(20, 2000),
          .inter_byte = draw(0.05, 5),
          .intra_byte = draw(0.01, 1),
          .element = 0.1,
          .fixed_compute = draw(100, 50000),
          .fixed_link = draw(500, 300000)};
}

Schedule Uniform(const Problem& p, int forward, int backward) {
  Schedule schedule = PlainSchedule(p.shape, p.work.bucket_elements);
  for (LayerSchedule& layer : schedule.layers) layer = {forward, backward};
  return schedule;
}

TEST(ChooseSchedule, IsTheBestOfAllPairsOnSmallSteps) {
  for (unsigned seed = 0; seed < 15; ++seed) {
    std::mt19937 random(seed);
    const Problem p = Make(2);
    const CostTable costs = CostsOf(RandomRates(&random));
    const SchedulerOptions options = {.slice_gradients = false};
    const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, options);
    double best = std::numeric_limits<double>::infinity();
    for (int forward : options.chunks) {
      for (int backward : options.chunks)
        best = std::min(best, PredictStep(p.shape, costs, p.work, p.topology, Uniform(p, forward, backward)));
    }
    EXPECT_NEAR(choice.predicted_ns, best, 1e-6 * best) << "seed " << seed;
    EXPECT_DOUBLE_EQ(choice.predicted_ns, PredictStep(p.shape, costs, p.work, p.topology, choice.schedule));
  }
}

TEST(ChooseSchedule, IsNearTheBestOfAllPairsOnLargeSteps) {
  for (unsigned seed = 0; seed < 5; ++seed) {
    std::mt19937 random(seed);
    const Problem p = Make(8, 2);
    const CostTable costs = CostsOf(RandomRates(&random));
    const SchedulerOptions options = {.slice_gradients = false};
    const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, options);
    double best = std::numeric_limits<double>::infinity();
    for (int forward : options.chunks) {
      for (int backward : options.chunks)
        best = std::min(best, PredictStep(p.shape, costs, p.work, p.topology, Uniform(p, forward, backward)));
    }
    EXPECT_LE(choice.predicted_ns, 1.005 * best) << "seed " << seed;
  }
}

TEST(ChooseSchedule, NeverLosesToOneNumberEverywhere) {
  for (unsigned seed = 0; seed < 15; ++seed) {
    std::mt19937 random(seed);
    Problem p = Make(6);
    p.work.experts.push_back(p.work.experts[0]);
    p.work.experts[1].rows.assign(32, 100);
    for (int rank = 0; rank < 4; ++rank) p.work.experts[1].rows[static_cast<size_t>(8 * rank)] = 1500;
    p.work.experts_of_layer = {0, 1, 0, 1, 1, 0};
    const CostTable costs = CostsOf(RandomRates(&random));
    const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, {});
    EXPECT_LE(choice.predicted_ns, choice.plain_ns);
    for (int chunks : SchedulerOptions().chunks) {
      EXPECT_LE(choice.predicted_ns, (1 + 1e-9) * PredictStep(p.shape, costs, p.work, p.topology, Uniform(p, chunks, chunks)))
          << "seed " << seed << " chunks " << chunks;
    }
  }
}

TEST(ChooseSchedule, NearsTheBoundWhereLinksAndComputationAreEqual) {
  Problem p = Make(8);
  p.work.bucket_elements.assign(p.work.bucket_elements.size(), 3000);
  p.work.bucket_bytes.assign(p.work.bucket_elements.size(), 12000);
  // Per layer and rank 2048 rows, half of which cross: 512 KiB each way, four times.
  const CostTable costs =
      CostsOf({.token = 20, .row = 500, .inter_byte = 1.5, .intra_byte = 0.1, .fixed_compute = 500, .fixed_link = 1000});
  const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, {});
  Graph graph = EmitStep(p.shape, choice.schedule);
  FillUnits(p.work, p.topology, choice.schedule, 0, &graph);
  const Prediction step = SimulateAlike(graph, FlatCosts(costs), Record::kNo);
  const double bound = *std::max_element(step.busy_ns.begin(), step.busy_ns.end());
  EXPECT_GT(choice.plain_ns, 1.4 * choice.predicted_ns);
  EXPECT_GT(bound, 0.8 * choice.predicted_ns);
  EXPECT_FALSE(choice.reasons.empty());
}

TEST(ChooseSchedule, OneChunkWhereNothingCanBeGained) {
  Problem p = Make(4);
  const CostTable dear = CostsOf({.fixed_compute = 1e8, .fixed_link = 1e9});
  for (const LayerSchedule& layer : ChooseSchedule(p.shape, dear, p.work, p.topology, {}).schedule.layers) {
    EXPECT_EQ(layer.forward_chunks, 1);
    EXPECT_EQ(layer.backward_chunks, 1);
  }
  p.work.experts[0].placement = GroupedPlacement(1, 8, 4, 1)[0];  // Every expert everywhere: no row travels.
  DescribeTraffic(p.work, p.topology, &p.shape);
  for (const LayerSchedule& layer : ChooseSchedule(p.shape, CostsOf({}), p.work, p.topology, {}).schedule.layers) {
    EXPECT_EQ(layer.forward_chunks, 1);
  }
}

TEST(ChooseSchedule, TakesChunksThatAreGiven) {
  const Problem p = Make(3);
  const ScheduleChoice choice = ChooseSchedule(p.shape, CostsOf({}), p.work, p.topology,
                                               {.chunks_forward = 5, .chunks_backward = 7, .slice_gradients = false});
  for (const LayerSchedule& layer : choice.schedule.layers) {
    EXPECT_EQ(layer.forward_chunks, 5);
    EXPECT_EQ(layer.backward_chunks, 7);
  }
}

TEST(ChooseSchedule, SlicesCoverAllGradientsOnceAfterTheyExist) {
  for (unsigned seed = 0; seed < 15; ++seed) {
    std::mt19937 random(seed);
    Problem p = Make(6);
    for (int64_t& elements : p.work.bucket_elements) elements = 1 + static_cast<int64_t>(random() % 1000000);
    const CostTable costs = CostsOf(RandomRates(&random));
    const SchedulerOptions options;
    const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, options);
    std::vector<int64_t> sent(p.work.bucket_elements.size());
    std::vector<int> pieces(sent.size());
    for (const GradientSlice& slice : choice.schedule.gradients) {
      const size_t bucket = static_cast<size_t>(slice.bucket);
      EXPECT_EQ(slice.begin, sent[bucket]);
      sent[bucket] += slice.count;
      ++pieces[bucket];
      const int completed = CompletedBy(p.shape, slice.bucket);
      EXPECT_LT(slice.before_layer, completed < 0 ? 0 : completed) << "seed " << seed;
      EXPECT_TRUE(slice.count == p.work.bucket_elements[bucket] || slice.count >= options.slice_elements_min);
    }
    EXPECT_EQ(sent, p.work.bucket_elements) << "seed " << seed;
  }
}

// A large head, sent at once, would hold up the rows of the last layer.
TEST(ChooseSchedule, GradientsInPausesBeatThoseAtOnce) {
  Problem p = Make(8);
  p.work.bucket_elements.back() = 4'000'000;
  const CostTable costs = CostsOf({.token = 300, .row = 400, .inter_byte = 0.5, .fixed_link = 5000});
  const double sliced = ChooseSchedule(p.shape, costs, p.work, p.topology, {}).predicted_ns;
  const double plain = ChooseSchedule(p.shape, costs, p.work, p.topology, {.slice_gradients = false}).predicted_ns;
  EXPECT_LT(sliced, 0.95 * plain);
}

TEST(ChooseSchedule, PrefetchesAsFarAsItPays) {
  const Problem p = Make(8);
  const ScheduleChoice near = ChooseSchedule(p.shape, CostsOf({}), p.work, p.topology, {});
  const ScheduleChoice any = ChooseSchedule(p.shape, CostsOf({}), p.work, p.topology, {.prefetch = {1, 2, 4}});
  EXPECT_EQ(near.schedule.prefetch, 1);
  EXPECT_LE(any.predicted_ns, near.predicted_ns);
}

TEST(PrefetchUpTo, IsOneWhereMoreTakesMemory) {
  StepShape shape = Make(3).shape;
  EXPECT_EQ(PrefetchUpTo(shape), (std::vector<int>{1, 2}));
  shape.layers.resize(4);
  EXPECT_EQ(PrefetchUpTo(shape), (std::vector<int>{1, 2, 4}));
  shape.experts = ExpertPolicy::kRematerialise;  // Of nothing.
  EXPECT_EQ(PrefetchUpTo(shape), (std::vector<int>{1, 2, 4}));
  shape.materialise = true;
  EXPECT_EQ(PrefetchUpTo(shape), std::vector<int>{1});
  shape.experts = ExpertPolicy::kKeep;
  EXPECT_EQ(PrefetchUpTo(shape), (std::vector<int>{1, 2, 4}));
  shape.dense = DensePolicy::kSharded;
  EXPECT_EQ(PrefetchUpTo(shape), std::vector<int>{1});
}

// Chunks hide rows behind experts alone, waves behind attention too.
TEST(ChooseSchedule, TakesWavesWhereAttentionCanHideRows) {
  Problem p = Make(6);
  p.work.sequence_tokens = 128;
  const CostTable costs = CostsOf({.token = 300, .row = 50, .inter_byte = 0.4, .fixed_compute = 500, .fixed_link = 2000});
  const ScheduleChoice one = ChooseSchedule(p.shape, costs, p.work, p.topology, {});
  const ScheduleChoice any = ChooseSchedule(p.shape, costs, p.work, p.topology, {.waves = {1, 2}});
  EXPECT_EQ(any.schedule.waves, 2);
  EXPECT_LT(any.predicted_ns, 0.97 * one.predicted_ns);
}

// The forward pass sends more than it computes, the backward pass the reverse.
TEST(ChooseSchedule, PartsWavesWhereCommunicationTakesAsLongAsComputation) {
  Problem p = Make(6);
  p.shape.balance = false;
  p.work.tokens = {2048};
  p.work.sequence_tokens = 128;
  p.work.bucket_elements.assign(p.work.bucket_elements.size(), 3000);
  p.work.bucket_bytes.assign(p.work.bucket_elements.size(), 12000);
  const CostTable costs = CostsOf({.token = 150, .row = 250, .inter_byte = 1.2, .intra_byte = 0.1, .fixed_compute = 500, .fixed_link = 2000});
  const SchedulerOptions options = {.waves = {1, 2, 4, 8}};
  SchedulerOptions in_step = options;
  in_step.part_waves = false;
  const ScheduleChoice any = ChooseSchedule(p.shape, costs, p.work, p.topology, options);
  const ScheduleChoice together = ChooseSchedule(p.shape, costs, p.work, p.topology, in_step);
  EXPECT_FALSE(any.schedule.turns.empty());
  EXPECT_TRUE(together.schedule.turns.empty());
  EXPECT_LT(any.predicted_ns, 0.97 * together.predicted_ns);
  p.shape.balance = true;
  EXPECT_TRUE(ChooseSchedule(p.shape, costs, p.work, p.topology, options).schedule.turns.empty());
}

TEST(ChooseSchedule, FasterLinksNeverMakeSlowerSteps) {
  const Problem p = Make(4);
  double before = 0;
  for (double byte : {0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0}) {
    const double now = ChooseSchedule(p.shape, CostsOf({.inter_byte = byte}), p.work, p.topology, {}).predicted_ns;
    EXPECT_GE(now, 0.999 * before) << byte;
    before = now;
  }
}

TEST(ChooseSchedule, IsTheSameEveryTimeAndQuick) {
  Problem p = Make(32);
  const CostTable costs = CostsOf({});
  const auto choose = [&](const char* name) {
    const auto begin = std::chrono::steady_clock::now();
    const ScheduleChoice choice = ChooseSchedule(p.shape, costs, p.work, p.topology, {});
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    RecordProperty(name, static_cast<int>(ms));
    std::printf("%s: %.1f ms\n", name, ms);
    EXPECT_LT(ms, 2000);
    return Fingerprint(EmitStep(p.shape, choice.schedule));
  };
  EXPECT_EQ(choose("alike"), choose("alike"));
  p.shape.parts = 16;
  choose("16 parts");
  p.shape.parts = 1;
  std::mt19937 random(7);
  p.work.experts.assign(32, p.work.experts[0]);
  for (size_t layer = 0; layer < 32; ++layer) {
    for (int i = 0; i < 32; ++i) p.work.experts[layer].rows.push_back(static_cast<int64_t>(random() % 500));
    p.work.experts_of_layer[layer] = static_cast<int>(layer);
  }
  EXPECT_EQ(choose("all different"), choose("all different"));
}

TEST(WorthReplanning, GainsMustExceedNoise) {
  EXPECT_TRUE(WorthReplanning(100, 90, 0.05));
  EXPECT_FALSE(WorthReplanning(100, 96, 0.05));
  EXPECT_FALSE(WorthReplanning(100, 99.5, 0));
  EXPECT_FALSE(WorthReplanning(100, 110, 0.05));
}

}  // namespace
}  // namespace shoal
