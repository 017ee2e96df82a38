// The tuner in a made world: steps are simulated from known costs with noise, so what is best is known.
#include "launch/trainer/step_tuner.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "parallel/schedule/simulate.h"
#include "parallel/schedule/step_scorer.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

constexpr int kRanks = 2;

// Two hosts of one rank, four layers; `byte_ns` of what travels is as much as there is to compute at about 2.
struct World {
  explicit World(double byte_ns) : costs(CostsOf(byte_ns)) {
    shape.layers.resize(4);
    work.tokens = {1024};
    work.sequence_tokens = 128;
    work.choices = 2;
    work.row_bytes = 512;
    work.expert_elements = 10000;
    work.expert_weight_bytes = work.expert_gradient_bytes = 40000;
    work.experts = {{.placement = GroupedPlacement(1, 8, kRanks, kRanks)[0]}};
    work.experts_of_layer.assign(4, 0);
    work.bucket_elements.assign(static_cast<size_t>(shape.buckets().count()), 20000);
    for (int64_t elements : work.bucket_elements) work.bucket_bytes.push_back(4 * elements);
    DescribeTraffic(work, topology, &shape);
    options.scheduler.waves = {1, 2};
  }
  static CostTable CostsOf(double byte_ns) {
    CostTable costs;
    for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kUpdate}) {
      for (const Op op : {Op::kEmbed, Op::kAttention, Op::kRoute, Op::kArrange, Op::kHead}) {
        for (const Lane lane : {Lane::kCompute, Lane::kCopy}) costs.models[{op, phase, lane}] = {20'000, 500};
      }
      for (const Op op : {Op::kExperts, Op::kExpertsWeight}) costs.models[{op, phase, Lane::kCompute}] = {20'000, 400};
      for (const Op op : {Op::kPack, Op::kCombine}) {
        for (const Lane lane : {Lane::kCompute, Lane::kCopy}) costs.models[{op, phase, lane}] = {5'000, 5};
      }
      for (const Op op : {Op::kNorm, Op::kUpdate}) costs.models[{op, phase, Lane::kCompute}] = {5'000, 1};
      for (const Op op : {Op::kDispatch, Op::kReturn, Op::kGather, Op::kReduce}) {
        costs.models[{op, phase, Lane::kInter}] = {60'000, byte_ns};
      }
      for (const Op op : {Op::kExchange, Op::kTotals, Op::kNormSum}) costs.models[{op, phase, Lane::kControl}] = {50'000, 0};
    }
    return costs;
  }
  double Time(const Schedule& schedule) const { return PredictStep(shape, costs, work, topology, schedule); }
  double Best() const { return ChooseSchedule(shape, costs, work, topology, options.scheduler).predicted_ns; }

  Topology topology{{0, 1}};
  StepShape shape;
  Workload work;
  StepTuner::Options options;
  CostTable costs;
};

// One rank's tuner and its steps.
class TunedRun {
 public:
  TunedRun(Communicator& group, const World& world, double noise)
      : tuner(world.shape, world.topology, world.work, &group, world.options),
        noise_(noise),
        random_(static_cast<unsigned>(100 + group.index())) {
  }

  // Whether the schedule is another one now. `more`: time that no task accounts for.
  bool Step(const World& world, double more = 0) {
    Graph graph;
    CostTable costs = world.costs;
    std::normal_distribution<> normal(0, noise_);
    // In the order of keys, which a hash map does not have.
    for (int op = 0; op < kOps; ++op) {
      for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kUpdate}) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto found = costs.models.find({static_cast<Op>(op), phase, static_cast<Lane>(lane)});
          if (found == costs.models.end()) continue;
          const double factor = std::exp(normal(random_));
          found->second.fixed_ns *= factor;
          found->second.ns_per_unit *= factor;
        }
      }
    }
    const StepScorer scorer(world.shape, costs, world.work, world.topology);
    StepRecord record = scorer.Predict(tuner.schedule(), Record::kYes, &graph).record;
    record.end_ns += static_cast<int64_t>(more * static_cast<double>(record.end_ns - record.begin_ns));
    const absl::StatusOr<bool> changed = tuner.AfterStep(graph, record, world.work.experts);
    EXPECT_TRUE(changed.ok()) << changed.status();
    fingerprints.push_back(Fingerprint(EmitStep(world.shape, tuner.schedule())));
    return *changed;
  }
  void Steps(int steps, const World& world) {
    for (int step = 0; step < steps; ++step) Step(world);
  }

  StepTuner tuner;
  std::vector<uint64_t> fingerprints;  // Of the schedule after each step.

 private:
  const double noise_;
  std::mt19937 random_;
};

// Runs `body` on both ranks, whose noise differs, and expects that they took the same schedules.
void RunBoth(const World& world, double noise, const std::function<void(TunedRun&)>& body) {
  std::vector<std::vector<uint64_t>> fingerprints(kRanks);
  RunRanks(kRanks, "auto", [&](Communicator& group) {
    TunedRun run(group, world, noise);
    body(run);
    fingerprints[static_cast<size_t>(group.index())] = run.fingerprints;
  });
  EXPECT_EQ(fingerprints[0], fingerprints[1]);
}

constexpr int kSettledBy = 60;  // Steps: three probes, then what looks best.

TEST(StepTuner, MeasuresPlainSchedulesFirst) {
  const World world(2);
  RunBoth(world, 0, [&](TunedRun& run) {
    EXPECT_EQ(run.tuner.schedule().waves, 1);
    EXPECT_EQ(run.tuner.schedule().layers[0].forward_chunks, 1);
    EXPECT_TRUE(run.tuner.reasons().empty());
    bool waves = false, chunks = false;
    for (int step = 0; step < 12; ++step) {
      run.Step(world);
      waves = waves || run.tuner.schedule().waves == 2;
      chunks = chunks || run.tuner.schedule().layers[0].forward_chunks == 2;
    }
    EXPECT_TRUE(waves);
    EXPECT_TRUE(chunks);
  });
}

TEST(StepTuner, ComesToTheBestSchedule) {
  for (const double byte_ns : {0.1, 0.7, 2.0, 6.0}) {
    const World world(byte_ns);
    const double best = world.Best();
    for (const double noise : {0.0, 0.02}) {
      SCOPED_TRACE(absl::StrCat(byte_ns, " ns a byte, noise ", noise));
      RunBoth(world, noise, [&](TunedRun& run) {
        run.Steps(kSettledBy, world);
        EXPECT_LE(world.Time(run.tuner.schedule()), best * (noise > 0 ? 1.03 : 1.01)) << Describe(run.tuner.schedule());
        EXPECT_NEAR(run.tuner.predicted_ns(), world.Time(run.tuner.schedule()), 0.05 * best);
      });
    }
  }
}

// Memory that nobody has touched yet: computation of the forward pass takes twice as long in the first step with a schedule.
TEST(StepTuner, FirstStepsWithAScheduleSayNothingOfThoseToCome) {
  const World world(2);
  World untouched = world;
  for (auto& [key, model] : untouched.costs.models) {
    if (key.phase != Phase::kForward || key.lane != Lane::kCompute) continue;
    model.fixed_ns *= 2;
    model.ns_per_unit *= 2;
  }
  RunBoth(world, 0, [&](TunedRun& run) {
    bool fresh = true;
    for (int step = 0; step < kSettledBy; ++step) fresh = run.Step(fresh ? untouched : world);
    const CostTable learnt = run.tuner.profiler().table();
    for (const Op op : {Op::kAttention, Op::kExperts, Op::kHead}) {
      const CostKey key = {op, Phase::kForward, Lane::kCompute};
      for (const double units : {256.0, 1024.0}) {
        const double true_ns = world.costs.models.at(key).Predict(units);
        EXPECT_NEAR(learnt.models.at(key).Predict(units), true_ns, 0.02 * true_ns) << Name(key) << ", " << units << " units";
      }
    }
    EXPECT_LE(world.Time(run.tuner.schedule()), 1.01 * world.Best()) << Describe(run.tuner.schedule());
  });
}

TEST(StepTuner, StaysWhereNothingChanges) {
  const World world(2);
  RunBoth(world, 0.02, [&](TunedRun& run) {
    run.Steps(kSettledBy, world);
    int changes = 0;
    for (int step = 0; step < 150; ++step) changes += run.Step(world) ? 1 : 0;
    EXPECT_LE(changes, 2);  // There and back.
  });
}

TEST(StepTuner, GoesBackFromSchedulesThatAreSlowerThanPredicted) {
  const World world(2);
  std::map<uint64_t, double> first;  // Those that it begins with, and what they take.
  for (const auto& [waves, chunks] : {std::pair{1, 1}, {2, 1}, {1, 2}}) {
    Schedule schedule = PlainSchedule(world.shape, world.work.bucket_elements);
    schedule.waves = waves;
    for (LayerSchedule& layer : schedule.layers) layer = {chunks, chunks};
    first[Fingerprint(EmitStep(world.shape, schedule))] = world.Time(schedule);
  }
  RunBoth(world, 0, [&](TunedRun& run) {
    // All others lose time between tasks, which no prediction has.
    int lost = 0;
    for (int step = 0; step < kSettledBy; ++step) {
      const bool other = !first.contains(Fingerprint(EmitStep(world.shape, run.tuner.schedule())));
      lost += other ? 1 : 0;
      run.Step(world, other ? 0.5 : 0);
    }
    EXPECT_GT(lost, 0);
    const auto taken = first.find(run.fingerprints.back());
    ASSERT_TRUE(taken != first.end()) << Describe(run.tuner.schedule());
    for (const auto& [_, time] : first) EXPECT_LE(taken->second, time * 1.001);
  });
}

TEST(StepTuner, LooksAgainWhenALinkBecomesSlower) {
  const World before(0.5), after(2.0);
  const double best = after.Best();
  for (const double noise : {0.0, 0.02}) {
    RunBoth(before, noise, [&](TunedRun& run) {
      run.Steps(kSettledBy, before);
      const double stale = after.Time(run.tuner.schedule());
      // At least four fifths of what there is to gain, and a hundredth of a step.
      const double enough = best + 0.2 * (stale - best) + 0.01 * best;
      double least = stale;
      for (int step = 0; step < 20; ++step) {
        run.Step(after);
        least = std::min(least, after.Time(run.tuner.schedule()));
      }
      EXPECT_LE(least, enough) << "noise " << noise << ": from " << stale << ", best " << best;
      run.Steps(20, after);  // All that was worth a try has been measured.
      EXPECT_LE(after.Time(run.tuner.schedule()), enough) << Describe(run.tuner.schedule());
      EXPECT_GT(stale, 1.01 * best);  // There was something to gain.
    });
  }
}

TEST(StepTuner, OnlyLearnsWhereTheScheduleIsGiven) {
  World world(2);
  world.options.choose = false;
  world.options.scheduler.waves = {2};
  world.options.scheduler.chunks_forward = 3;
  world.options.scheduler.chunks_backward = 1;
  RunBoth(world, 0.02, [&](TunedRun& run) {
    for (int step = 0; step < 30; ++step) EXPECT_FALSE(run.Step(world));
    EXPECT_EQ(Describe(run.tuner.schedule()).substr(0, 40), "2 waves; chunks 3 forward, 1 backward; 7");
    EXPECT_NEAR(run.tuner.predicted_ns(), world.Time(run.tuner.schedule()), 0.05 * run.tuner.predicted_ns());
  });
}

TEST(StepTuner, ChoosesOnceWithoutReplan) {
  World before(0.5), after(4.0);
  before.options.replan = false;
  RunBoth(before, 0, [&](TunedRun& run) {
    run.Steps(kSettledBy, before);
    for (int step = 0; step < 40; ++step) EXPECT_FALSE(run.Step(after));
  });
}

}  // namespace
}  // namespace shoal
