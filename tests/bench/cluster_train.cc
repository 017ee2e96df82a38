// Training steps on an emulated cluster, several layouts and schedules in alternation in one job. Links are the emulated cluster's
// (tests/cluster/emulate), devices are emulated too: a compute task takes at least what its FLOPs take at --gflops, so that two
// cores can stand for many devices; the arithmetic is done all the same.
//
//   tests/cluster/emulate run --hosts 4 --rate 200mbit -- shoal launch bench_cluster_train overlap [flags]
//
//   overlap  no overlap (one wave, one chunk) against fixed schedules and against the chosen one, with the bound
//            max(computation, communication). The last line is a row of the table that tests/cluster/sweep makes of many rates.
//   skew     static expert parallelism against sparse experts, with routers biased so that the logarithms of expert loads have
//            the standard deviation --sigma (0: even loads); compares the bytes that tasks moved with the formulas of the planner.
//            --drift D: biases change from step to step, by D of their spread (1: drawn anew); then copies with and without
//            calibration instead of other owners, and formulas are those of the copies planned for the next step.
//   relink   as overlap, step by step: for rates that change while it runs (it says "ready" and goes on for --steps).
//
// --lock FILE: rank 0 holds a lock on FILE while steps run, given up for others every minute. For machines that are not ours alone.
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/environment.h"
#include "launch/config/config.h"
#include "launch/trainer/emulated_device.h"
#include "launch/trainer/session.h"
#include "launch/trainer/step.h"
#include "models/data/batches.h"
#include "parallel/schedule/step_summary.h"
#include "runtime/device/cpu.h"

namespace shoal {
namespace {

// Without skew biases move by so much in a step, until loads are even.
constexpr double kBalanceRate = 0.002;
constexpr int kBalanceSteps = 40;

struct BenchOptions {
  std::string scenario;
  double gflops = 4;        // Of an emulated device.
  double task_us = 300;     // Fixed cost of a compute task.
  double sigma = 1.0;
  double drift = 0;
  int64_t width = 128, inner = 256, experts = 16, layers = 4, rows = 4, seq = 128, vocab = 64;
  int64_t warmup = 70, steps = 20;
  int64_t seed = 1;
  int64_t waves = 1;   // Of skew; 0: schedules are chosen.
  int64_t copies = 0;  // Of skew: room of a rank; 0: half of the experts.
  int64_t grid = 1;    // 0: of fixed schedules only those of one chunk.
  std::string lock;
};

// Turns of a machine that is shared with other programs.
class MachineLock {
 public:
  MachineLock(const std::string& path, Communicator& world) : world_(world) {
    if (!path.empty() && world.index() == 0) file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  }
  // Collective, before each round of steps; returns when the machine is ours.
  absl::Status Renew() {
    const auto now = std::chrono::steady_clock::now();
    if (file_ >= 0 && (!held_ || now - since_ > kTurn)) {
      if (held_) {
        flock(file_, LOCK_UN);
        std::this_thread::sleep_for(kPause);
      }
      flock(file_, LOCK_EX);
      held_ = true;
      since_ = std::chrono::steady_clock::now();
    }
    return world_.Barrier({.label = "bench"}).Await();
  }

 private:
  static constexpr std::chrono::seconds kTurn{50};
  static constexpr std::chrono::milliseconds kPause{500};
  Communicator& world_;
  int file_ = -1;  // Of rank 0; closed, and so given up, when the program ends.
  bool held_ = false;
  std::chrono::steady_clock::time_point since_;
};

struct Variant {
  std::string name;
  Config config;
  std::unique_ptr<RankModel> model;
  std::vector<double> seconds;
  std::vector<double> warmup_seconds;
};

Config BaseConfig(const BenchOptions& o, int ranks) {
  Config config;
  Model& model = *config.mutable_model();
  model.set_vocab_size(o.vocab);
  model.set_hidden_size(o.width);
  model.set_intermediate_size(o.inner);
  model.set_num_hidden_layers(static_cast<int>(o.layers));
  model.set_num_attention_heads(4);
  model.set_num_local_experts(static_cast<int>(o.experts));
  model.set_num_experts_per_tok(2);
  model.set_router("sigmoid_bias");  // Its biases make any skew.
  model.set_bias_update_rate(o.scenario == "skew" && o.sigma > 0 ? 0 : kBalanceRate);
  config.mutable_data()->set_kind("random");
  config.mutable_train()->set_global_batch_size(o.rows * ranks);
  config.mutable_train()->set_seq_length(o.seq);
  config.mutable_train()->set_threads(1);
  config.mutable_parallel()->set_expert(ranks);
  return config;
}

void SetSchedule(Config* config, int waves, int chunks) {
  StepSchedule& schedule = *config->mutable_schedule();
  schedule.set_waves(waves);
  schedule.set_chunks_forward(chunks);
  schedule.set_chunks_backward(chunks);
  schedule.set_gradient_slices("plain");
}

absl::Status Add(const std::string& name, Config config, const BenchOptions& o, const RankEnvironment& environment, Communicator& world,
                 std::vector<Variant>* variants) {
  ResolveConfig(&config);
  Variant variant{name, config, nullptr, {}};
  SHOAL_ASSIGN_OR_RETURN(variant.model, RankModel::Create(config, ModelConfigOf(config), world,
                                                          {.host = environment.node_rank,
                                                           .pace = PaceOf(EmulatedDevice{o.gflops, o.task_us}, ModelConfigOf(config), o.seq)}));
  SHOAL_RETURN_IF_ERROR(LoadWeights({.seed = 3}, *variant.model));
  variants->push_back(std::move(variant));
  return absl::OkStatus();
}

// One step, as the slowest rank sees it. The learning rate is 0: routing stays as it is.
absl::StatusOr<double> Step(Variant& variant, const Tensor& rows, Communicator& world) {
  SHOAL_RETURN_IF_ERROR(world.Barrier({.label = "bench"}).Await());
  SHOAL_RETURN_IF_ERROR(variant.model->Train({rows}, 0.0, 1).status(), variant.name);
  const StepRecord& record = variant.model->record();
  const Tensor seconds = Empty({1}, DType::kF64);
  seconds.data<double>()[0] = static_cast<double>(record.end_ns - record.begin_ns) * 1e-9;
  SHOAL_RETURN_IF_ERROR(world.AllReduce(seconds, seconds, ReduceOp::kMax, {.label = "bench"}).Await());
  return seconds.data<double>()[0];
}

double At(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(std::llround(share * static_cast<double>(values.size() - 1)))];
}

// Seconds that a lane's tasks took in the last step, on the rank where that is most: of communication what its profiler knows, which
// is without the wait for other ranks.
absl::StatusOr<double> LaneSeconds(RankModel& model, Lane lane, Communicator& world) {
  double ns = 0;
  if (IsCommunication(lane)) {
    for (const CostEstimate& cost : model.tuner()->profiler().profile().costs) ns += cost.key.lane == lane ? cost.step_ns : 0;
  } else {
    ns = static_cast<double>(Summarise(model.graph(), model.record()).busy_ns[static_cast<size_t>(lane)]);
  }
  const Tensor most = Empty({1}, DType::kF64);
  most.data<double>()[0] = ns * 1e-9;
  SHOAL_RETURN_IF_ERROR(world.AllReduce(most, most, ReduceOp::kMax, {.label = "bench"}).Await());
  return most.data<double>()[0];
}

absl::StatusOr<Tensor> Rows(const BenchOptions& o, RankModel& model) {
  const Range mine = model.RowsOf(o.rows * model.topology().ranks());
  Tensor rows = Empty({mine.count, o.seq + 1}, DType::kI32);
  std::mt19937 random(static_cast<uint32_t>(o.seed * 1000 + mine.begin));
  for (int32_t& id : rows.span<int32_t>()) id = static_cast<int32_t>(random() % static_cast<uint64_t>(o.vocab));
  return rows;
}

// Even loads for all, found by the first.
absl::Status Balance(std::vector<Variant>& variants, const Tensor& rows, Communicator& world) {
  for (int step = 0; step < kBalanceSteps; ++step) SHOAL_RETURN_IF_ERROR(Step(variants.front(), rows, world).status());
  const std::vector<Router*> from = variants.front().model->decoder().routers();
  for (size_t i = 1; i < variants.size(); ++i) {
    const std::vector<Router*> to = variants[i].model->decoder().routers();
    for (size_t layer = 0; layer < to.size(); ++layer) {
      std::memcpy(to[layer]->state().raw(), from[layer]->state().raw(), static_cast<size_t>(from[layer]->state().bytes()));
    }
  }
  return absl::OkStatus();
}

// Biases of routers by which the logarithms of experts' loads are nearly normal, and drift.
class Loads {
 public:
  Loads(const BenchOptions& o, size_t layers) : drift_(o.drift) {
    for (size_t layer = 0; layer < layers; ++layer) {
      random_.emplace_back(static_cast<uint32_t>(o.seed) * 100 + static_cast<uint32_t>(layer));
      of_layer_.emplace_back(static_cast<size_t>(o.experts));
      for (double& load : of_layer_.back()) load = normal_(random_.back());
    }
  }
  void set_scale(double scale) { scale_ = scale; }
  // To the next step.
  void Advance() {
    for (size_t layer = 0; drift_ > 0 && layer < of_layer_.size(); ++layer) {
      for (double& load : of_layer_[layer]) load = std::sqrt(1 - drift_ * drift_) * load + drift_ * normal_(random_[layer]);
    }
  }
  void Set(RankModel& model) const {
    size_t layer = 0;
    for (Router* router : model.decoder().routers()) {
      const Tensor bias = router->state();
      for (size_t e = 0; e < of_layer_[layer].size(); ++e) bias.data<float>()[e] = static_cast<float>(scale_ * of_layer_[layer][e]);
      ++layer;
    }
  }

 private:
  const double drift_;
  double scale_ = 0;
  std::vector<std::mt19937> random_;
  std::normal_distribution<double> normal_;
  std::vector<std::vector<double>> of_layer_;  // By layer and expert.
};

// `loads`, if any, go on by a step in each.
absl::Status WarmUp(std::vector<Variant>& variants, const BenchOptions& o, const Tensor& rows, Communicator& world, MachineLock* lock,
                    Loads* loads = nullptr) {
  for (Variant& variant : variants) {
    const bool fixed = variant.config.schedule().waves() > 0 && variant.config.parallel().experts() != "sparse";
    for (int64_t step = 0; step < (fixed ? 3 : o.warmup); ++step) {
      SHOAL_RETURN_IF_ERROR(lock->Renew());
      if (loads != nullptr) {
        loads->Advance();
        loads->Set(*variant.model);
      }
      SHOAL_ASSIGN_OR_RETURN(const double seconds, Step(variant, rows, world));
      variant.warmup_seconds.push_back(seconds);
    }
  }
  return absl::OkStatus();
}

absl::Status Measure(std::vector<Variant>& variants, const BenchOptions& o, const Tensor& rows, Communicator& world,
                     Loads* loads = nullptr) {
  MachineLock lock(o.lock, world);
  SHOAL_RETURN_IF_ERROR(WarmUp(variants, o, rows, world, &lock, loads));
  for (int64_t step = 0; step < o.steps; ++step) {
    if (loads != nullptr) loads->Advance();
    for (Variant& variant : variants) {
      SHOAL_RETURN_IF_ERROR(lock.Renew());
      if (loads != nullptr) loads->Set(*variant.model);
      SHOAL_ASSIGN_OR_RETURN(const double seconds, Step(variant, rows, world));
      variant.seconds.push_back(seconds);
    }
  }
  return absl::OkStatus();
}

void Print(std::vector<Variant>& variants) {
  const double base = At(variants.front().seconds, 0.5);
  absl::PrintF("%-18s %9s %9s %9s %8s %18s  %s\n", "", "median ms", "p10", "p90", "speed", "compute + exposed", "schedule");
  for (Variant& variant : variants) {
    const double median = At(variant.seconds, 0.5);
    const StepSummary last = Summarise(variant.model->graph(), variant.model->record());
    absl::PrintF("%-18s %9.1f %9.1f %9.1f %7.2fx %9.1f + %6.1f  %s\n", variant.name, 1e3 * median, 1e3 * At(variant.seconds, 0.1),
                 1e3 * At(variant.seconds, 0.9), base / median, static_cast<double>(last.busy_ns[0]) * 1e-6,
                 static_cast<double>(last.exposed_ns + last.overhead_ns) * 1e-6, Describe(variant.model->schedule()));
  }
}

// The first is without overlap, the last chosen while training.
absl::Status AddSchedules(const BenchOptions& o, const RankEnvironment& environment, Communicator& world, std::vector<Variant>* variants) {
  for (auto [waves, chunks] : {std::pair{1, 1}, {1, 2}, {1, 4}, {2, 1}, {2, 2}, {2, 4}, {4, 1}, {4, 2}, {4, 4}}) {
    if (o.grid == 0 && chunks > 1) continue;
    Config config = BaseConfig(o, world.size());
    SetSchedule(&config, waves, chunks);
    SHOAL_RETURN_IF_ERROR(Add(absl::StrFormat("%d wave%s, %d chunk%s", waves, waves > 1 ? "s" : "", chunks, chunks > 1 ? "s" : ""),
                              config, o, environment, world, variants));
  }
  for (int waves : {4, 8}) {
    if (waves > o.rows) continue;
    Config config = BaseConfig(o, world.size());
    SetSchedule(&config, waves, 1);
    config.mutable_schedule()->set_wave_order("apart");
    SHOAL_RETURN_IF_ERROR(Add(absl::StrFormat("%d waves apart", waves), config, o, environment, world, variants));
  }
  return Add("chosen", BaseConfig(o, world.size()), o, environment, world, variants);
}

// Computation, communication, no overlap, the best fixed schedule, the chosen one: milliseconds and ratios.
void PrintRow(const std::vector<Variant>& variants, double compute, double inter) {
  const Variant& plain = variants.front();
  const Variant& chosen = variants.back();
  const Variant& best = *std::min_element(variants.begin(), variants.end() - 1, [](const Variant& a, const Variant& b) {
    return At(a.seconds, 0.5) < At(b.seconds, 0.5);
  });
  const double bound = std::max(compute, inter), own = At(chosen.seconds, 0.5), fixed = At(best.seconds, 0.5);
  const double probing = std::accumulate(chosen.warmup_seconds.begin(), chosen.warmup_seconds.end(), 0.0) /
                         static_cast<double>(chosen.warmup_seconds.size());
  absl::PrintF("computation %.1f ms, communication %.1f ms: bound %.1f ms, of which the chosen schedule reaches %.0f %%; its %d steps "
               "before those measured took %.1f ms (mean)\n",
               1e3 * compute, 1e3 * inter, 1e3 * bound, 100 * bound / own, static_cast<int>(chosen.warmup_seconds.size()), 1e3 * probing);
  absl::PrintF("row | %.0f | %.0f | %.0f | %.0f (%s) | %.0f | %.2fx | %.2fx | %.0f %% | %s |\n", 1e3 * compute, 1e3 * inter,
               1e3 * At(plain.seconds, 0.5), 1e3 * fixed, best.name, 1e3 * own, At(plain.seconds, 0.5) / own, fixed / own,
               100 * bound / own, Describe(chosen.model->schedule()));
}

absl::Status RunOverlap(const BenchOptions& o, const RankEnvironment& environment, Communicator& world) {
  std::vector<Variant> variants;
  SHOAL_RETURN_IF_ERROR(AddSchedules(o, environment, world, &variants));
  SHOAL_ASSIGN_OR_RETURN(const Tensor rows, Rows(o, *variants.front().model));
  SHOAL_RETURN_IF_ERROR(Balance(variants, rows, world));
  SHOAL_RETURN_IF_ERROR(Measure(variants, o, rows, world));
  RankModel& plain = *variants.front().model;
  SHOAL_ASSIGN_OR_RETURN(const double compute, LaneSeconds(plain, Lane::kCompute, world));
  SHOAL_ASSIGN_OR_RETURN(const double inter, LaneSeconds(plain, Lane::kInter, world));
  if (environment.rank != 0) return absl::OkStatus();
  Print(variants);
  PrintRow(variants, compute, inter);
  return absl::OkStatus();
}

// Standard deviation of the logarithms of expert loads over a step, mean over layers.
double SigmaOf(const RankModel& model, const Decoder& decoder) {
  double sum = 0;
  const size_t experts = static_cast<size_t>(model.model().num_local_experts);
  for (const std::vector<int64_t>& rows : decoder.rows_by_rank()) {
    std::vector<double> logs(experts);
    for (size_t i = 0; i < rows.size(); ++i) logs[i % experts] += static_cast<double>(rows[i]);
    double mean = 0, squares = 0;
    for (double& load : logs) mean += (load = std::log(load + 0.5)) / static_cast<double>(experts);
    for (double load : logs) squares += (load - mean) * (load - mean) / static_cast<double>(experts);
    sum += std::sqrt(squares);
  }
  return sum / static_cast<double>(decoder.rows_by_rank().size());
}

// Finds the scale of biases that gives the wanted spread of loads.
absl::Status FindScale(Variant& variant, const BenchOptions& o, const Tensor& rows, Communicator& world, Loads* loads) {
  double low = 0, high = 1;
  for (int trial = 0; trial < 10; ++trial) {
    const double scale = (low + high) / 2;
    loads->set_scale(scale);
    loads->Set(*variant.model);
    SHOAL_RETURN_IF_ERROR(Step(variant, rows, world).status());
    (SigmaOf(*variant.model, variant.model->decoder()) < o.sigma ? low : high) = scale;
  }
  loads->set_scale((low + high) / 2);
  return absl::OkStatus();
}

// Bytes that this rank's tasks moved in the last step, by operation, and by the planner's formulas.
std::map<std::string, std::pair<double, double>> BytesMoved(RankModel& model) {
  std::map<std::string, std::pair<double, double>> bytes;
  Graph expected = model.graph();
  FillUnits(model.workload(), model.topology(), model.schedule(), model.rank(), &expected);
  for (size_t i = 0; i < expected.tasks.size(); ++i) {
    const Task& task = expected.tasks[i];
    if (task.lane != Lane::kInter && task.lane != Lane::kIntra) continue;
    auto& [moved, formula] = bytes[absl::StrCat(AbslSv(Name(task.op)), " ", AbslSv(Name(task.lane)))];
    moved += model.record().tasks[i].units;
    formula += task.units;
  }
  return bytes;
}

absl::Status AddPlacements(const BenchOptions& o, const RankEnvironment& environment, Communicator& world,
                           std::vector<Variant>* variants) {
  // One wave and one chunk, as in the paper: then the bytes of a task are those of the formula, and not of pieces, of which each
  // counts what is more, sent or received.
  Config grouped = BaseConfig(o, world.size());
  if (o.waves > 0) SetSchedule(&grouped, static_cast<int>(o.waves), 1);
  SHOAL_RETURN_IF_ERROR(Add("expert parallel", grouped, o, environment, world, variants));
  Config sparse = grouped;
  sparse.mutable_parallel()->set_experts("sparse");
  sparse.mutable_parallel()->set_expert(1);
  sparse.mutable_parallel()->set_expert_copies(static_cast<int>(o.copies > 0 ? o.copies : o.experts / 2));
  sparse.mutable_parallel()->set_reshard_interval(20);
  Config copies = sparse;
  copies.mutable_parallel()->set_reshard_interval(0);
  SHOAL_RETURN_IF_ERROR(Add("sparse, copies", copies, o, environment, world, variants));
  if (o.drift == 0) return Add("sparse", sparse, o, environment, world, variants);
  copies.mutable_parallel()->set_calibrate(true);
  return Add("sparse, calibrated", copies, o, environment, world, variants);
}

absl::Status RunSkew(const BenchOptions& o, const RankEnvironment& environment, Communicator& world) {
  std::vector<Variant> variants;
  SHOAL_RETURN_IF_ERROR(AddPlacements(o, environment, world, &variants));
  SHOAL_ASSIGN_OR_RETURN(const Tensor rows, Rows(o, *variants.front().model));
  if (o.sigma == 0) {
    SHOAL_RETURN_IF_ERROR(Balance(variants, rows, world));
    SHOAL_RETURN_IF_ERROR(Measure(variants, o, rows, world));
  } else {
    Loads loads(o, variants.front().model->decoder().routers().size());
    SHOAL_RETURN_IF_ERROR(FindScale(variants.front(), o, rows, world, &loads));
    for (Variant& variant : variants) loads.Set(*variant.model);
    SHOAL_RETURN_IF_ERROR(Measure(variants, o, rows, world, &loads));
  }
  const double sigma = SigmaOf(*variants.front().model, variants.front().model->decoder());
  if (environment.rank == 0) {
    absl::PrintF("sigma of the logarithms of loads: %.2f\n", sigma);
    Print(variants);
  }
  for (Variant& variant : variants) {
    for (const auto& [name, both] : BytesMoved(*variant.model)) {
      const auto [moved, formula] = both;
      if (environment.rank == 0 && moved + formula > 0) {
        absl::PrintF("  %-16s %-24s moved %10.0f bytes, formula %10.0f\n", variant.name, name, moved, formula);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RunRelink(const BenchOptions& o, const RankEnvironment& environment, Communicator& world) {
  std::vector<Variant> variants;
  SHOAL_RETURN_IF_ERROR(AddSchedules(o, environment, world, &variants));
  SHOAL_ASSIGN_OR_RETURN(const Tensor rows, Rows(o, *variants.front().model));
  SHOAL_RETURN_IF_ERROR(Balance(variants, rows, world));
  MachineLock lock(o.lock, world);
  SHOAL_RETURN_IF_ERROR(WarmUp(variants, o, rows, world, &lock));
  if (environment.rank == 0) absl::PrintF("ready\n");
  std::fflush(stdout);
  for (int64_t step = 0; step < o.steps; ++step) {
    SHOAL_RETURN_IF_ERROR(lock.Renew());
    std::string line = absl::StrFormat("%3d", step);
    for (Variant& variant : variants) {
      SHOAL_ASSIGN_OR_RETURN(const double seconds, Step(variant, rows, world));
      absl::StrAppendFormat(&line, " %7.1f", 1e3 * seconds);
    }
    if (environment.rank == 0) absl::PrintF("%s  %s\n", line, Describe(variants.back().model->schedule()));
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

absl::Status RunScenario(const BenchOptions& o) {
  SetThreads(1);
  SHOAL_ASSIGN_OR_RETURN(std::optional<RankEnvironment> environment, DetectEnvironment(ProcessEnv));
  if (!environment.has_value()) return absl::InvalidArgumentError("not started by a launcher: shoal launch bench_cluster_train ...");
  const Config config = BaseConfig(o, environment->world_size);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, ConnectWorld(WorldOptionsFor(*environment, config)));
  if (o.scenario == "overlap") return RunOverlap(o, *environment, *world);
  if (o.scenario == "skew") return RunSkew(o, *environment, *world);
  if (o.scenario == "relink") return RunRelink(o, *environment, *world);
  return absl::InvalidArgumentError("scenario: overlap, skew or relink");
}

bool Parse(int argc, char** argv, BenchOptions* o) {
  if (argc < 2) return false;
  o->scenario = argv[1];
  const std::map<std::string, double*> doubles = {{"--gflops", &o->gflops}, {"--task-us", &o->task_us}, {"--sigma", &o->sigma},
                                                 {"--drift", &o->drift}};
  const std::map<std::string, int64_t*> integers = {
      {"--width", &o->width}, {"--inner", &o->inner},   {"--experts", &o->experts}, {"--layers", &o->layers}, {"--rows", &o->rows},
      {"--seq", &o->seq},     {"--warmup", &o->warmup}, {"--steps", &o->steps},     {"--seed", &o->seed},
      {"--waves", &o->waves}, {"--grid", &o->grid},     {"--vocab", &o->vocab}, {"--copies", &o->copies}};
  for (int i = 2; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--lock") == 0) {
      o->lock = argv[i + 1];
      continue;
    }
    const auto number = doubles.find(argv[i]);
    const auto integer = integers.find(argv[i]);
    if (number != doubles.end() ? !absl::SimpleAtod(argv[i + 1], number->second)
                                : integer == integers.end() || !absl::SimpleAtoi(argv[i + 1], integer->second)) {
      return false;
    }
  }
  return argc % 2 == 0;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) {
  shoal::BenchOptions options;
  if (!shoal::Parse(argc, argv, &options)) {
    std::fprintf(stderr, "usage: bench_cluster_train overlap|skew|relink [--gflops G] [--rows N] ...: see the source\n");
    return 2;
  }
  const absl::Status status = shoal::RunScenario(options);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
