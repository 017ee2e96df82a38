#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "parallel/placement/baselines.h"
#include "parallel/placement/copies.h"
#include "parallel/placement/eplb.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/layer_cost.h"
#include "parallel/placement/owners.h"
#include "parallel/placement/reshard.h"
#include "parallel/placement/traces.h"
#include "parallel/planner/layout.h"
#include "parallel/planner/sweeps.h"
#include "parallel/schedule/scheduler.h"
#include "parallel/schedule/simulate.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int kLayers = 4, kExperts = 64, kSpareSlots = 32;
constexpr int kSteps = 55, kFirst = 5, kPeriod = 25;  // Steps, the first that counts, how often owners move.
constexpr int kRoom = 16;  // Copies of a layer that a rank can hold, where they are chosen by cost.
constexpr double kPsPerNs = 1e3;
// An expert that moves takes master weights and moments along: 14 bytes a parameter, 2 of which are its
// weights.
constexpr int64_t kMoveFactor = 7;

// The paper's clusters, at 80% of their nominal links, and GPT-MoE-S with experts of as many operations and
// weights.
Cluster ClusterOf(bool b) {
  Cluster cluster;
  cluster.hosts = 4;
  cluster.devices_per_host = 8;
  cluster.bf16_peak_flops_per_ns = cluster.fp32_peak_flops_per_ns = b ? 312e3 : 125e3;
  cluster.bf16_flops_per_ns = cluster.fp32_flops_per_ns = 0.4 * cluster.bf16_peak_flops_per_ns;
  cluster.memory_bytes_per_ns = b ? 1555 : 900;
  cluster.task_ns = 10e3;
  cluster.intra_latency_ns = 10e3;
  cluster.intra_bytes_per_ns = 0.8 * (b ? 300 : 150);
  cluster.inter_latency_ns = 20e3;
  cluster.inter_bytes_per_ns = 0.8 * (b ? 50 : 12.5);
  cluster.interference = 1.2;
  return cluster;
}

ModelShape GptMoeS() {
  ModelShape model;
  model.vocab = 64;  // Layers alone.
  model.width = model.query_size = model.kv_size = 768;
  model.heads = 12;
  model.expert_inner = 1024;  // Three matrices of it are two of 2 * width.
  model.experts = kExperts;
  model.choices = 2;
  model.moe.assign(kLayers, true);
  model.compute_bytes = 2;
  model.sequence_length = 2048;
  model.sequences = 2 * 32;
  return model;
}

using Rows = std::vector<std::vector<int64_t>>;  // By layer: [ranks, experts].
using Placements = std::vector<ExpertPlacement>;

// One cluster: what a step takes with given placements and rows.
class Bench {
 public:
  explicit Bench(bool b)
      : cluster_(ClusterOf(b)), model_(GptMoeS()), out_(*LayOut(model_, cluster_, {.expert = 32}, {})) {
    const double row_bytes = static_cast<double>(out_.work.row_bytes),
                 expert_bytes = static_cast<double>(out_.work.expert_weight_bytes);
    const auto ps = [](double ns) { return static_cast<int64_t>(ns * kPsPerNs); };
    costs_ = {
        .row_work_ps = ps(2.0 * static_cast<double>(model_.expert_elements()) / cluster_.bf16_flops_per_ns),
        .row_send_ps = ps(row_bytes / cluster_.intra_bytes_per_ns),
        .row_cross_ps = ps(row_bytes / cluster_.inter_bytes_per_ns),
        .expert_send_ps = ps(expert_bytes / cluster_.intra_bytes_per_ns),
        .expert_cross_ps = ps(expert_bytes / cluster_.inter_bytes_per_ns)};
    Task attention;
    attention.op = Op::kAttention;
    const double tokens = static_cast<double>(out_.work.tokens[0]);
    Task back = attention;
    back.phase = Phase::kBackward;
    const auto link_ps = [&](double bytes) { return ps(bytes / cluster_.inter_bytes_per_ns); };
    const double dense = static_cast<double>(out_.work.bucket_elements[2]);
    hidden_forward_ps_ = std::max<int64_t>(0, ps(out_.costs.Predict(attention, tokens)) - link_ps(2 * dense));
    hidden_backward_ps_ = std::max<int64_t>(0, ps(out_.costs.Predict(back, tokens)) - link_ps(4 * dense));
    overlap_ = OverlapBudget(out_.topology,
                             {.other_work_ns = static_cast<int64_t>(out_.costs.Predict(attention, tokens)),
                              .link_bytes_per_s = static_cast<int64_t>(1e9 * cluster_.inter_bytes_per_ns),
                              .expert_bytes = out_.work.expert_weight_bytes});
  }

  const Topology& topology() const { return out_.topology; }
  const LayerCosts& costs() const { return costs_; }
  CopyOptions copies() const {
    return {.room = kRoom,
            .costs = {.layer = costs_,
                      .hidden_forward_ps = hidden_forward_ps_,
                      .hidden_backward_ps = hidden_backward_ps_}};
  }
  int overlap() const { return overlap_; }
  int64_t tokens() const { return out_.work.tokens[0]; }

  // `hidden`: copies travel beside other work, as the graph has them; else they cost nothing here and the
  // caller adds them.
  double StepNs(const Placements& placements, const Rows& rows, bool hidden) const {
    LaidOut out = out_;
    out.work.experts.clear();
    for (size_t layer = 0; layer < kLayers; ++layer) {
      out.work.experts.push_back({placements[layer], rows.empty() ? std::vector<int64_t>() : rows[layer]});
      out.work.experts_of_layer[layer] = static_cast<int>(layer);
    }
    DescribeTraffic(out.work, out.topology, &out.shape);
    CostTable costs = CostsOf(model_, cluster_, out.work, out.topology);
    if (!hidden) {
      for (auto& [key, model] : costs.models) {
        if (key.op == Op::kMaterialise || key.op == Op::kReduceExperts) model = {};
      }
    }
    const Schedule schedule = PlainSchedule(out.shape, out.work.bucket_elements);
    const StepUnits units(out.work, out.topology);
    return SimulateCluster(EmitStep(out.shape, schedule), FlatCosts(costs), schedule, units, out.topology,
                           Record::kNo)
        .step_ns;
  }

  // Experts with their optimizer state to new owners, with nothing beside.
  double MoveNs(const OwnerMap& before, const OwnerMap& after) const {
    int64_t ps = 0;
    for (size_t layer = 0; layer < kLayers; ++layer) {
      ps += kMoveFactor * GatherPs(topology(), OwnersOnly(before[layer]), OwnersOnly(after[layer]), costs_);
    }
    return static_cast<double>(ps) / kPsPerNs;
  }

 private:
  const Cluster cluster_;
  const ModelShape model_;
  const LaidOut out_;
  LayerCosts costs_;
  int overlap_ = 0;
  int64_t hidden_forward_ps_ = 0,
          hidden_backward_ps_ = 0;  // Of a layer's attention, less the link's time for dense weights.
};

enum System {
  kEp,
  kFasterMoe,
  kSmartMoe,
  kFlexMoe,
  kEplb,
  kMaterialise,
  kHecate,
  kByCost,
  kByCostEplb,
  kByCostTuned,
  kBalanced,
  kSystems
};
constexpr std::array<const char*, kSystems> kNames = {"EP",      "FasterMoE",   "SmartMoE", "FlexMoE+32",
                                                      "EPLB+32", "materialise", "Hecate",   "by cost",
                                                      "EPLB owners", "tuned",   "balanced"};

// One run of all systems over the same routing.
class Run {
 public:
  Run(const Bench& bench, double sigma)
      : bench_(bench),
        trace_({.layers = kLayers,
                .ranks = bench.topology().ranks(),
                .experts = kExperts,
                .choices = 2,
                .tokens_per_rank = bench.tokens(),
                .sigma = sigma,
                .seed = 1}),
        window_(kLayers, kExperts),
        by_rank_(kLayers, bench.topology().ranks() * kExperts),
        contiguous_(kLayers, ContiguousOwners(kExperts, bench.topology().ranks())),
        smart_(contiguous_),
        hecate_(contiguous_) {
    replicas_ = flexible_ = Owners(contiguous_);
    for (ByCost& system : by_cost_) system.placements = replicas_;
  }

  // Mean nanoseconds of a step of each system.
  std::array<double, kSystems> Measure() {
    for (step_ = 0; step_ < kSteps; ++step_, trace_.Advance()) {
      rows_.clear();
      for (int layer = 0; layer < kLayers; ++layer) rows_.push_back(trace_.Rows(layer));
      if (step_ >= kFirst) Step();
      std::vector<int64_t> counts, all;
      for (const std::vector<int64_t>& rows : rows_) {
        all.insert(all.end(), rows.begin(), rows.end());
        const std::vector<int64_t> loads = ColumnSums(rows, kExperts);
        counts.insert(counts.end(), loads.begin(), loads.end());
      }
      window_.Add(counts);
      by_rank_.Add(all);
    }
    for (double& time : total_) time /= kSteps - kFirst;
    return total_;
  }

  double max_over_mean() const { return imbalance_ / (kSteps - kFirst) / kLayers; }

 private:
  void Step() {
    const bool move = (step_ - kFirst) % kPeriod == 0;
    if (move) MoveOwners();
    total_[kEp] += bench_.StepNs(Owners(contiguous_), rows_, true);
    AddShadows();
    total_[kSmartMoe] += bench_.StepNs(Owners(smart_), rows_, true);
    // An all-reduce of the gradients of copies sends what a reduction and new copies send.
    total_[kFlexMoe] += bench_.StepNs(flexible_, rows_, true);
    total_[kEplb] += bench_.StepNs(replicas_, rows_, true);
    const MaterialiseBudget budget = {.overlap = bench_.overlap(), .memory = bench_.overlap()};
    Placements plain, hecate;
    for (int layer = 0; layer < kLayers; ++layer) {
      const size_t at = static_cast<size_t>(layer);
      const auto loads = window_.Predicted(layer);
      plain.push_back(Materialise(contiguous_[at], loads, bench_.topology(), budget));
      hecate.push_back(Materialise(hecate_[at], loads, bench_.topology(), budget));
    }
    total_[kMaterialise] += bench_.StepNs(plain, rows_, true);
    total_[kHecate] += bench_.StepNs(hecate, rows_, true);
    for (ByCost& system : by_cost_) {
      for (int layer = 0; layer < kLayers; ++layer) {
        ExpertPlacement& placement = system.placements[static_cast<size_t>(layer)];
        placement = ChooseCopies(OwnersOf({placement})[0], Expected(layer), bench_.topology(),
                                 bench_.copies(), placement);
      }
      total_[system.index] += bench_.StepNs(system.placements, rows_, true);
    }
    total_[kBalanced] += bench_.StepNs(Owners(contiguous_), {}, true);
    for (size_t layer = 0; layer < kLayers; ++layer) {
      const auto shares = SplitTokens(DispatchRule::kNearest, bench_.topology(),
                                      OwnersOnly(contiguous_[layer]), rows_[layer]);
      const LayerRows rows = RowsOf(bench_.topology(), shares);
      imbalance_ += static_cast<double>(*std::max_element(rows.work.begin(), rows.work.end())) *
                    bench_.topology().ranks() / static_cast<double>(rows.total);
    }
  }

  void MoveOwners() {
    std::vector<std::vector<int64_t>> loads;
    OwnerMap smart;
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto predicted = window_.Predicted(layer);
      loads.emplace_back(predicted.begin(), predicted.end());
      smart.push_back(SmartMoeOwners(loads.back(), bench_.topology()));
      const int ranks = bench_.topology().ranks();
      const auto slots = BalanceReplicas(
          loads.back(),
          {.slots = kExperts + kSpareSlots, .ranks = ranks, .hosts = bench_.topology().hosts(), .groups = 1});
      SHOAL_CHECK(slots.ok()) << slots.status();
      ExpertPlacement next = PlacementOfSlots(*slots, kExperts, ranks);
      total_[kEplb] += bench_.MoveNs(OwnerMap(kLayers, OwnersOf({replicas_[static_cast<size_t>(layer)]})[0]),
                                     OwnerMap(kLayers, OwnersOf({next})[0])) /
                       kLayers;
      replicas_[static_cast<size_t>(layer)] = std::move(next);
      AdjustFlexible(layer);
    }
    total_[kSmartMoe] += bench_.MoveNs(smart_, smart);
    smart_ = std::move(smart);
    OwnerMap hecate = Reshard(loads, bench_.topology(), hecate_, bench_.overlap());
    const double moved = bench_.MoveNs(hecate_, hecate);
    total_[kHecate] += moved;
    hecate_ = std::move(hecate);
    for (ByCost& system : by_cost_) {
      Rows expected;
      for (int layer = 0; layer < kLayers; ++layer) expected.push_back(Expected(layer));
      const OwnerMap before = OwnersOf(system.placements);
      const OwnerMap after = ChooseOwners(expected, bench_.topology(), before,
                                          {.policy = system.policy,
                                           .overlap = bench_.overlap(),
                                           .copies = bench_.copies(),
                                           .steps = kPeriod,
                                           .move_percent = static_cast<int>(100 * kMoveFactor)});
      total_[system.index] += bench_.MoveNs(before, after);
      if (after != before) system.placements = Owners(after);
    }
  }

  // FlexMoE's copies stay and have optimizer state of their own, which comes with them.
  void AdjustFlexible(int layer) {
    ExpertPlacement& placement = flexible_[static_cast<size_t>(layer)];
    const int slots = (kExperts + kSpareSlots) / bench_.topology().ranks();
    ExpertPlacement next = FlexMoeAdjust(placement, Expected(layer), bench_.topology(),
                                         {.slots_per_rank = slots, .costs = bench_.costs()});
    const int64_t ps = kMoveFactor * GatherPs(bench_.topology(), placement, next, bench_.costs());
    total_[kFlexMoe] += static_cast<double>(ps) / kPsPerNs;
    placement = std::move(next);
  }

  // Decided when the rows are known, sent and returned before anything else goes on.
  void AddShadows() {
    Placements shadows;
    int64_t ps = 0;
    for (size_t layer = 0; layer < kLayers; ++layer) {
      shadows.push_back(
          FasterMoeShadows(contiguous_[layer], rows_[layer], bench_.topology(), bench_.costs()));
      ps += 2 * GatherPs(bench_.topology(), OwnersOnly(contiguous_[layer]), shadows.back(), bench_.costs());
    }
    total_[kFasterMoe] += bench_.StepNs(shadows, rows_, false) + static_cast<double>(ps) / kPsPerNs;
  }

  // The mean of the last steps.
  std::vector<int64_t> Expected(int layer) const {
    std::vector<int64_t> rows(by_rank_.Predicted(layer).begin(), by_rank_.Predicted(layer).end());
    for (int64_t& count : rows) count /= kFirst;
    return rows;
  }

  static Placements Owners(const OwnerMap& owners) {
    Placements placements;
    for (const std::vector<int>& layer : owners) placements.push_back(OwnersOnly(layer));
    return placements;
  }

  // Copies by cost, with one way to find owners.
  struct ByCost {
    System index;
    OwnerPolicy policy;
    Placements placements = {};
  };

  const Bench& bench_;
  RoutingTrace trace_;
  LoadWindow window_, by_rank_;  // Loads of experts, and rows of each rank for each.
  const OwnerMap contiguous_;
  OwnerMap smart_, hecate_;
  Placements replicas_, flexible_;  // Of EPLB and of FlexMoE.
  std::array<ByCost, 3> by_cost_ = {{{kByCost, OwnerPolicy::kHecate},
                                     {kByCostEplb, OwnerPolicy::kEplb},
                                     {kByCostTuned, OwnerPolicy::kTuned}}};
  Rows rows_;  // Of this step.
  int step_ = 0;
  double imbalance_ = 0;
  std::array<double, kSystems> total_ = {};
};

// Mean nanoseconds of a step over the same routing, with owners that stay.
struct CalibrationTimes {
  double none = 0, planned = 0, calibrated = 0;  // Without copies, with copies by cost, with calibration besides.
};

CalibrationTimes MeasureCalibration(const Bench& bench, double drift, int room) {
  const int ranks = bench.topology().ranks();
  RoutingTrace trace({.layers = kLayers,
                      .ranks = ranks,
                      .experts = kExperts,
                      .choices = 2,
                      .tokens_per_rank = bench.tokens(),
                      .drift = drift,
                      .seed = 1});
  LoadWindow window(kLayers, ranks * kExperts, kFirst);
  CopyOptions options = bench.copies();
  options.room = room;
  const Placements none(kLayers, OwnersOnly(ContiguousOwners(kExperts, ranks)));
  Placements planned = none;
  CalibrationTimes total;
  for (int step = 0; step < kSteps; ++step, trace.Advance()) {
    Rows rows;
    Placements calibrated;
    double exposed_ps = 0;
    for (size_t layer = 0; layer < kLayers; ++layer) {
      rows.push_back(trace.Rows(static_cast<int>(layer)));
      if (step < kFirst) continue;
      std::vector<int64_t> expected(window.Predicted(static_cast<int>(layer)).begin(),
                                    window.Predicted(static_cast<int>(layer)).end());
      for (int64_t& count : expected) count /= kFirst;
      planned[layer] =
          ChooseCopies(OwnersOf({planned[layer]})[0], expected, bench.topology(), options, planned[layer]);
      calibrated.push_back(Calibrate(planned[layer], rows[layer], bench.topology(),
                                     {.budget = {kExperts, room}, .costs = options.costs})
                               .placement);
      exposed_ps += static_cast<double>(GatherPs(bench.topology(), planned[layer], calibrated[layer], bench.costs()));
    }
    std::vector<int64_t> all;
    for (const std::vector<int64_t>& of_layer : rows) all.insert(all.end(), of_layer.begin(), of_layer.end());
    window.Add(all);
    if (step < kFirst) continue;
    total.none += bench.StepNs(none, rows, true);
    total.planned += bench.StepNs(planned, rows, true);
    // The experts wait for what calibration sends.
    total.calibrated += bench.StepNs(calibrated, rows, true) + exposed_ps / kPsPerNs;
  }
  return total;
}

}  // namespace

std::string CalibrationSweepReport() {
  std::string text =
      "What calibration gains (more copies when a step's rows are known) over copies by cost, in loads that drift:\n"
      "mean speed-up of whole layers over expert parallelism; 32 ranks on 4 hosts, GPT-MoE-S, sigma 1.0, 50 steps.\n"
      "drift: of the logarithm of an expert's popularity, what a step draws anew; 1: all of it.\n\n";
  absl::StrAppend(&text, absl::StrFormat("%-8s %6s %6s %9s %11s %6s\n", "cluster", "drift", "room", "planned", "calibrated", "gain"));
  for (const bool b : {false, true}) {
    const Bench bench(b);
    for (double drift : {0.03, 0.1, 0.3, 1.0}) {
      for (int room : {2, 16}) {
        const CalibrationTimes times = MeasureCalibration(bench, drift, room);
        absl::StrAppend(&text, absl::StrFormat("%-8s %6.2f %6d %9.2f %11.2f %5.1f%%\n", b ? "B" : "A", drift, room,
                                               times.none / times.planned, times.none / times.calibrated,
                                               100 * (times.planned / times.calibrated - 1)));
      }
    }
  }
  return text;
}

std::string HecateSweepReport() {
  std::string text =
      "Systems for unequal loads (Hecate, arXiv 2502.02581, section 5): mean speed-up of whole layers over "
      "expert parallelism, "
      "32\n"
      "ranks on 4 hosts, GPT-MoE-S, 50 steps, moves of owners included. The paper has 1.34 to 1.78 (A) and "
      "1.26 to 1.70 (B) for\n"
      "Hecate. \"by cost\": the copies that save most after what they cost, whether attention hides it or "
      "not;\n"
      "\"EPLB owners\" and \"tuned\": the same with other ways to find owners.\n"
      "\"balanced\": expert parallelism with equal loads.\n\n";
  absl::StrAppend(&text, absl::StrFormat("%-8s %6s %9s", "cluster", "sigma", "max/mean"));
  for (size_t i = 1; i < kSystems; ++i) absl::StrAppend(&text, absl::StrFormat(" %11s", kNames[i]));
  absl::StrAppend(&text, "\n");
  for (const bool b : {false, true}) {
    const Bench bench(b);
    for (double sigma : {0.0, 0.5, 1.0, 1.5}) {
      Run run(bench, sigma);
      const std::array<double, kSystems> times = run.Measure();
      absl::StrAppend(&text, absl::StrFormat("%-8s %6.1f %9.1f", b ? "B" : "A", sigma, run.max_over_mean()));
      for (size_t i = 1; i < kSystems; ++i)
        absl::StrAppend(&text, absl::StrFormat(" %11.2f", times[kEp] / times[i]));
      absl::StrAppend(&text, "\n");
    }
    absl::StrAppend(&text, absl::StrFormat("%-8s experts of a layer that travel behind its attention: %d\n",
                                           b ? "B" : "A", bench.overlap()));
  }
  return text;
}

}  // namespace shoal
