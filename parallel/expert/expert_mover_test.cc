#include "parallel/expert/expert_mover.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "parallel/expert/copy_costs.h"
#include "parallel/placement/traces.h"

namespace shoal {
namespace {

constexpr int kLayers = 3, kRanks = 4, kExperts = 8;
// Weights of an expert travel as long as 20 of its rows compute.
constexpr CopyCosts kCosts = {.layer = {.row_work_ps = 1000,
                                        .row_send_ps = 100,
                                        .row_cross_ps = 100,
                                        .expert_send_ps = 20'000,
                                        .expert_cross_ps = 20'000}};
constexpr int kMovePercent = 600;

OwnerMap Dealt() {
  OwnerMap owners(kLayers);
  for (int i = 0; i < kLayers * kExperts; ++i)
    owners[static_cast<size_t>(i / kExperts)].push_back(i % kRanks);
  return owners;
}

RoutingTrace Trace(double sigma) {
  return RoutingTrace({.layers = kLayers,
                       .ranks = kRanks,
                       .experts = kExperts,
                       .choices = 2,
                       .tokens_per_rank = 400,
                       .sigma = sigma,
                       .rank_noise = 0.02,
                       .seed = 7});
}

std::vector<std::vector<int64_t>> RowsOfStep(const RoutingTrace& trace) {
  std::vector<std::vector<int64_t>> rows;
  for (int layer = 0; layer < kLayers; ++layer) rows.push_back(trace.Rows(layer));
  return rows;
}

int Hottest(const std::vector<int64_t>& rows) {
  const std::vector<int64_t> loads = ColumnSums(rows, kExperts);
  return static_cast<int>(std::max_element(loads.begin(), loads.end()) - loads.begin());
}

TEST(ExpertMover, SkewCopiesTheHottest) {
  for (const Topology& topology : {Topology::OneHost(kRanks), Topology{{0, 0, 1, 1}}}) {
    ExpertMover mover(topology, Dealt(), {.copies = 4});
    mover.SetCosts(kCosts, kMovePercent);
    RoutingTrace trace = Trace(1.5);
    for (int step = 0; step < 5; ++step, trace.Advance()) {
      mover.Observe(RowsOfStep(trace));
      const std::vector<ExpertPlacement>& placement = mover.Placement();
      for (int layer = 0; layer < kLayers; ++layer) {
        EXPECT_FALSE(placement[static_cast<size_t>(layer)][static_cast<size_t>(Hottest(trace.Rows(layer)))]
                         .holders.empty())
            << "step " << step << ", layer " << layer;
      }
    }
  }
}

TEST(ExpertMover, CalibrationAddsCopiesOfWhatWasNotExpected) {
  const Topology topology = Topology::OneHost(kRanks);
  ExpertMover mover(topology, Dealt(), {.copies = 4});
  const std::vector<int64_t> rows = Trace(1.5).Rows(0);
  const ExpertPlacement planned = OwnersOnly(Dealt()[0]);
  EXPECT_EQ(mover.Calibrate(planned, rows), planned);  // Nothing is known yet of costs.
  mover.SetCosts(kCosts, kMovePercent);
  const ExpertPlacement more = mover.Calibrate(planned, rows);
  EXPECT_FALSE(more[static_cast<size_t>(Hottest(rows))].holders.empty());
  EXPECT_EQ(mover.Calibrate(more, rows), more);
  EXPECT_EQ(mover.Calibrate(planned, std::vector<int64_t>(rows.size(), 100)), planned);
}

// Steps of a mover, and what it wanted in each.
std::vector<std::pair<OwnerMap, std::vector<ExpertPlacement>>> Drive(ExpertMover* mover, RoutingTrace* trace, int steps) {
  std::vector<std::pair<OwnerMap, std::vector<ExpertPlacement>>> wanted;
  for (int step = 0; step < steps; ++step, trace->Advance()) {
    mover->Observe(RowsOfStep(*trace));
    mover->Reshard();
    mover->Placement();
    wanted.emplace_back(mover->owners(), mover->placement());
  }
  return wanted;
}

TEST(ExpertMover, RestoredDecidesAsTheSavedOneWould) {
  for (const int overlap : {2, -1}) {
    const Topology topology{{0, 0, 1, 1}};
    // Fewer entries than layers have, so that they take turns.
    const ExpertMover::Options options{.copies = 3, .overlap = overlap, .reshard_interval = 4, .entries_per_step = 40};
    for (const int before : {0, 1, 3, 7}) {
      ExpertMover whole(topology, Dealt(), options);
      RoutingTrace trace = Trace(1.5);
      whole.SetCosts(kCosts, kMovePercent);
      Drive(&whole, &trace, before);
      const std::vector<int64_t> saved = whole.Save();
      ExpertMover second(topology, Dealt(), options);
      ASSERT_TRUE(second.Restore(saved).ok()) << second.Restore(saved);
      EXPECT_EQ(second.Save(), saved);
      RoutingTrace same = trace;
      EXPECT_EQ(Drive(&second, &same, 9), Drive(&whole, &trace, 9)) << "after " << before << " steps, overlap " << overlap;
    }
  }
}

TEST(ExpertMover, RestoreTakesNothingFromOtherJobsOrDamage) {
  const ExpertMover::Options options{.copies = 3, .overlap = 2};
  ExpertMover mover(Topology::OneHost(kRanks), Dealt(), options);
  RoutingTrace trace = Trace(1.5);
  Drive(&mover, &trace, 3);
  const std::vector<int64_t> saved = mover.Save();
  OwnerMap two_layers = Dealt();
  two_layers.pop_back();
  ExpertMover smaller(Topology::OneHost(kRanks), two_layers, options), other(Topology::OneHost(kRanks + 1), Dealt(), options);
  const absl::Status layers = smaller.Restore(saved), ranks = other.Restore(saved);
  EXPECT_TRUE(absl::IsFailedPrecondition(layers)) << layers;
  EXPECT_EQ(ranks.message(), "it is of 4 ranks, and here are 5");
  ExpertMover fresh(Topology::OneHost(kRanks), Dealt(), options);
  const std::vector<int64_t> untouched = fresh.Save();
  for (size_t length = 0; length < saved.size(); ++length) {
    EXPECT_TRUE(absl::IsDataLoss(fresh.Restore(absl::MakeConstSpan(saved).first(length)))) << length;
  }
  for (size_t i = 19; i < 19 + 8; ++i) {  // Owners, numbers of holders and holders.
    std::vector<int64_t> damaged = saved;
    damaged[i] = -1;
    EXPECT_TRUE(absl::IsDataLoss(fresh.Restore(damaged))) << i;
  }
  EXPECT_EQ(fresh.Save(), untouched);
}

TEST(ExpertMover, LessRoomThanCopiesLeavesNone) {
  ExpertMover mover(Topology::OneHost(kRanks), Dealt(), {.copies = 3, .overlap = 3});
  RoutingTrace trace = Trace(1.5);
  Drive(&mover, &trace, 3);
  EXPECT_EQ(CopiesOfRank(mover.placement()[0], kRanks), 3);
  mover.SetRoom(3);
  EXPECT_EQ(CopiesOfRank(mover.placement()[0], kRanks), 3);
  mover.SetRoom(2);
  for (const ExpertPlacement& layer : mover.placement()) EXPECT_EQ(CopiesOfRank(layer, kRanks), 0);
  EXPECT_EQ(mover.owners(), OwnersOf(mover.placement()));
  mover.Placement();
  EXPECT_EQ(CopiesOfRank(mover.placement()[0], kRanks), 2);
}

TEST(ExpertMover, EvenLoadsGetNoCopies) {
  ExpertMover mover(Topology::OneHost(kRanks), Dealt(), {.copies = 4, .reshard_interval = 2});
  mover.SetCosts(kCosts, kMovePercent);
  RoutingTrace trace = Trace(0);
  for (int step = 0; step < 10; ++step, trace.Advance()) {
    mover.Observe(RowsOfStep(trace));
    EXPECT_FALSE(mover.Reshard().has_value());
    for (const ExpertPlacement& layer : mover.Placement()) {
      for (const ExpertCopies& copies : layer) EXPECT_TRUE(copies.holders.empty());
    }
  }
}

TEST(ExpertMover, MakesNoCopiesByCostBeforeItKnowsCosts) {
  ExpertMover by_cost(Topology::OneHost(kRanks), Dealt(), {.copies = 4, .reshard_interval = 1});
  ExpertMover fixed(Topology::OneHost(kRanks), Dealt(), {.copies = 4, .overlap = 2});
  by_cost.Observe(RowsOfStep(Trace(1.5)));
  fixed.Observe(RowsOfStep(Trace(1.5)));
  EXPECT_FALSE(by_cost.Reshard().has_value());
  for (const ExpertPlacement& layer : by_cost.Placement()) {
    for (const ExpertCopies& copies : layer) EXPECT_TRUE(copies.holders.empty());
  }
  for (const ExpertPlacement& layer : fixed.Placement()) {
    EXPECT_EQ(std::count_if(layer.begin(), layer.end(),
                            [](const ExpertCopies& copies) { return !copies.holders.empty(); }),
              2);
  }
}

TEST(ExpertMover, MovesOwnersAtTheIntervalAlone) {
  for (OwnerPolicy policy : {OwnerPolicy::kHecate, OwnerPolicy::kEplb, OwnerPolicy::kTuned}) {
    // Without room for copies only other owners help.
    ExpertMover mover(Topology::OneHost(kRanks), Dealt(), {.owners = policy, .reshard_interval = 3});
    mover.SetCosts(kCosts, kMovePercent);
    RoutingTrace trace = Trace(1.0);
    int moves = 0;
    for (int step = 1; step <= 12; ++step, trace.Advance()) {
      mover.Observe(RowsOfStep(trace));
      const std::optional<OwnerMap> owners = mover.Reshard();
      if (owners.has_value()) {
        EXPECT_EQ(step % 3, 0);
        ++moves;
        EXPECT_EQ(OwnersOf(mover.Placement()), *owners);
      }
    }
    EXPECT_GE(moves, 1) << "policy " << static_cast<int>(policy);
  }
}

TEST(ExpertMover, DoesNotMoveOwnersThatDoNotPayForIt) {
  ExpertMover mover(Topology::OneHost(kRanks), Dealt(), {.reshard_interval = 1});
  CopyCosts costs = kCosts;
  costs.layer.expert_send_ps = 1'000'000'000;
  mover.SetCosts(costs, kMovePercent);
  mover.Observe(RowsOfStep(Trace(1.0)));
  EXPECT_FALSE(mover.Reshard().has_value());
}

TEST(ExpertMover, RanksThatSawTheSameDecideAlike) {
  const Topology topology{{0, 0, 1, 1}};
  std::vector<ExpertMover> ranks;
  for (int rank = 0; rank < 2; ++rank)
    ranks.emplace_back(topology, Dealt(), ExpertMover::Options{.copies = 3, .reshard_interval = 4});
  RoutingTrace trace = Trace(1.0);
  for (int step = 0; step < 12; ++step, trace.Advance()) {
    for (ExpertMover& mover : ranks) {
      if (step == 2) mover.SetCosts(kCosts, kMovePercent);
      mover.Observe(RowsOfStep(trace));
    }
    EXPECT_EQ(ranks[0].Reshard(), ranks[1].Reshard());
    const std::vector<ExpertPlacement>&a = ranks[0].Placement(), &b = ranks[1].Placement();
    EXPECT_EQ(Fingerprint(a), Fingerprint(b));
    EXPECT_TRUE(a == b);
  }
}

TEST(ExpertMover, ManyEntriesTakeTurns) {
  ExpertMover mover(Topology::OneHost(kRanks), Dealt(), {.copies = 4, .entries_per_step = kRanks * kExperts});
  mover.SetCosts(kCosts, kMovePercent);
  for (int step = 1; step <= kLayers; ++step) {
    mover.Observe(RowsOfStep(Trace(1.5)));
    int layers = 0;
    for (const ExpertPlacement& layer : mover.Placement()) {
      layers += std::any_of(layer.begin(), layer.end(),
                            [](const ExpertCopies& copies) { return !copies.holders.empty(); });
    }
    EXPECT_EQ(layers, step);
  }
}

// ---- Costs from measured times.

StepShape Shape(bool intra, bool inter) {
  StepShape shape;
  shape.layers.assign(2, {});
  shape.ranks = 4;
  shape.intra = intra;
  shape.inter = inter;
  return shape;
}

TEST(MeasuredCopyCosts, FollowsTheTable) {
  Workload workload;
  workload.tokens = {100};
  workload.row_bytes = 10;
  workload.expert_weight_bytes = 1000;
  workload.expert_gradient_bytes = 2000;
  workload.bucket_bytes = {100, 300};
  workload.bucket_elements = {100, 300};
  CostTable table;
  const Topology topology{{0, 0, 1, 1}};
  const StepShape shape = Shape(true, true);
  EXPECT_FALSE(MeasuredCopyCosts(table, shape, workload, topology).has_value());
  table.models[{Op::kExperts, Phase::kForward, Lane::kCompute}] = {500, 5};
  table.models[{Op::kExperts, Phase::kBackward, Lane::kCompute}] = {500, 6};
  table.models[{Op::kExpertsWeight, Phase::kBackward, Lane::kCompute}] = {500, 7};
  table.models[{Op::kAttention, Phase::kForward, Lane::kCompute}] = {50, 1};
  table.models[{Op::kAttention, Phase::kBackward, Lane::kCompute}] = {50, 2};
  table.models[{Op::kDispatch, Phase::kForward, Lane::kIntra}] = {10, 0.5};
  EXPECT_FALSE(MeasuredCopyCosts(table, shape, workload, topology).has_value())
      << "the link between hosts is not known";
  table.models[{Op::kDispatch, Phase::kForward, Lane::kInter}] = {10, 4};
  table.models[{Op::kGather, Phase::kForward, Lane::kInter}] = {0, 0.1};
  table.models[{Op::kReduceExperts, Phase::kBackward, Lane::kInter}] = {30, 4};
  const std::optional<CopyCosts> costs = MeasuredCopyCosts(table, shape, workload, topology);
  ASSERT_TRUE(costs.has_value());
  EXPECT_EQ(costs->layer.row_work_ps, 6000);
  EXPECT_EQ(costs->layer.row_send_ps, 5'000);
  EXPECT_EQ(costs->layer.row_cross_ps, 20'000);  // Both ranks of a host at once took 4 ns a byte.
  EXPECT_EQ(costs->layer.expert_send_ps, 500'000);
  EXPECT_EQ(costs->layer.expert_cross_ps, 2'000'000);
  EXPECT_EQ(costs->gradient_percent, 200);
  EXPECT_EQ(costs->hidden_forward_ps, (150 - 20) * 1000);
  EXPECT_EQ(costs->hidden_backward_ps, (250 - 30) * 1000);
}

}  // namespace
}  // namespace shoal
