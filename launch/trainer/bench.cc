#include "launch/trainer/bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "launch/trainer/device.h"
#include "launch/trainer/session.h"
#include "models/data/batches.h"
#include "runtime/device/cpu.h"
#include "runtime/device/memory.h"
#include "runtime/kernels/matmul.h"
#include "runtime/metrics/process.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

struct Measured {
  std::vector<double> seconds;
  StepResult phases;  // Sums over the measured steps.
  double first_loss = 0, last_loss = 0;
};

// All ranks' sum of one number.
absl::StatusOr<double> SumOverRanks(Communicator& world, double value) {
  const Tensor sum = Empty({1}, DType::kF64);
  sum.data<double>()[0] = value;
  SHOAL_RETURN_IF_ERROR(world.AllReduce(sum, sum, ReduceOp::kSum, {.label = "bench"}).Await());
  return sum.data<double>()[0];
}

// The same batch in every step, so that a step that computes nonsense is noticed.
absl::StatusOr<std::vector<Tensor>> OneBatch(const Config& config, const RankModel& model) {
  const int64_t seq = config.train().seq_length(), batch = config.train().global_batch_size();
  SHOAL_ASSIGN_OR_RETURN(const Dataset data, OpenDataset({.kind = DataKind::kRandom,
                                                          .seed = config.run().seed(),
                                                          .vocab_size = config.model().vocab_size(),
                                                          .seq = seq,
                                                          .global_batch = batch}));
  const int64_t parts = config.train().gradient_accumulation_steps();
  const Range mine = model.RowsOf(batch / parts);
  std::vector<Tensor> tensors;
  for (int64_t part = 0; part < parts; ++part) {
    tensors.push_back(Empty({mine.count, seq + 1}, DType::kI32));
    SHOAL_RETURN_IF_ERROR(data.train->ReadRows(0, part * (batch / parts) + mine.begin, tensors.back()));
  }
  return tensors;
}

absl::StatusOr<Measured> MeasureSteps(const Config& config, const BenchOptions& options, RankModel& model,
                                      Communicator& world) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Tensor> batch, OneBatch(config, model));
  Measured measured;
  for (int64_t step = 0; step < options.warmup + options.steps; ++step) {
    if (step == options.warmup) HostMemory::Get().ResetPeak();
    SHOAL_RETURN_IF_ERROR(world.Barrier({.label = "bench"}).Await());
    const Clock::time_point begin = Clock::now();
    SHOAL_ASSIGN_OR_RETURN(const StepResult result, model.Train(batch, config.optimizer().lr(), step + 1));
    SHOAL_RETURN_IF_ERROR(world.Barrier({.label = "bench"}).Await());
    if (!result.finite) return absl::InternalError(absl::StrCat("step ", step, ": loss ", result.loss, " is not finite"));
    if (step == 0) measured.first_loss = result.loss;
    measured.last_loss = result.loss;
    if (step < options.warmup) continue;
    measured.seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    measured.phases.forward_seconds += result.forward_seconds;
    measured.phases.backward_seconds += result.backward_seconds;
    measured.phases.reduce_seconds += result.reduce_seconds;
    measured.phases.update_seconds += result.update_seconds;
  }
  if (measured.last_loss > measured.first_loss + 0.1) {
    return absl::InternalError(absl::StrFormat("the loss of one batch rose from %.4f to %.4f: this step learns nothing",
                                               measured.first_loss, measured.last_loss));
  }
  return measured;
}

void Print(const Config& config, const RankModel& model, const BenchOptions& options, const Measured& measured,
           double peak_gflops, int ranks) {
  const StepTimes times = Summarize(measured.seconds);
  const double tokens = static_cast<double>(config.train().global_batch_size() * config.train().seq_length());
  const double flops =
      tokens * static_cast<double>(TrainFlopsPerToken(ModelConfigOf(config), config.train().seq_length()));
  const double gflops = flops / times.median / 1e9;
  const ParameterStore::Memory memory = model.store().memory();
  const double mib = 1.0 / (1 << 20), steps = static_cast<double>(measured.seconds.size());
  const double resident = static_cast<double>(ReadProcessUsage().peak_resident_bytes) * mib;
  const double activations = static_cast<double>(HostMemory::Get().stats().peak_bytes) * mib;
  if (options.json) {
    absl::PrintF("{\"config\":\"%s\",\"precision\":\"%s\",\"ranks\":%d,\"threads\":%d,\"step_ms_median\":%.2f,"
                 "\"step_ms_best\":%.2f,\"tokens_per_s_median\":%.1f,\"tokens_per_s_best\":%.1f,\"gflops_median\":%.1f,"
                 "\"step_ms_p10\":%.2f,\"step_ms_p90\":%.2f,\"gemm_peak_gflops\":%.1f,\"peak_memory_mib\":%.0f,"
                 "\"weights_mib\":%.2f,\"gradients_mib\":%.2f,\"state_mib\":%.2f,\"private_tensors_mib\":%.2f}\n",
                 config.run().name(), config.train().precision(), ranks, Threads(), times.median * 1e3, times.best * 1e3,
                 tokens / times.median, tokens / times.best, gflops, times.p10 * 1e3, times.p90 * 1e3, peak_gflops, resident,
                 static_cast<double>(memory.weights_bytes) * mib, static_cast<double>(memory.gradients_bytes) * mib,
                 static_cast<double>(memory.state_bytes) * mib, activations);
    return;
  }
  absl::PrintF("%s, %s, %d rank%s x %d thread%s, %d steps\n", config.run().name(), config.train().precision(), ranks,
               ranks == 1 ? "" : "s", Threads(), Threads() == 1 ? "" : "s", measured.seconds.size());
  absl::PrintF("  step         median %8.2f ms   p10 %8.2f   p90 %8.2f   best %8.2f\n", times.median * 1e3, times.p10 * 1e3,
               times.p90 * 1e3, times.best * 1e3);
  absl::PrintF("  tokens/s     median %8.0f      best %8.0f\n", tokens / times.median, tokens / times.best);
  absl::PrintF("  GFLOP/s      median %8.1f      %.1f %% of the GEMM peak of %.1f measured in this run\n", gflops,
               100 * gflops / peak_gflops, peak_gflops);
  absl::PrintF("  phases       forward %.1f ms, backward %.1f, gradient reduction %.1f, update %.1f (means)\n",
               1e3 * measured.phases.forward_seconds / steps, 1e3 * measured.phases.backward_seconds / steps,
               1e3 * measured.phases.reduce_seconds / steps, 1e3 * measured.phases.update_seconds / steps);
  absl::PrintF("  schedule     %s\n", Describe(model.schedule()));
  absl::PrintF("  memory       rank 0 peak %.0f MiB resident: weights %.0f, gradients %.0f, optimizer state %.0f; private "
               "tensors at most %.0f\n",
               resident, static_cast<double>(memory.weights_bytes) * mib, static_cast<double>(memory.gradients_bytes) * mib,
               static_cast<double>(memory.state_bytes) * mib, activations);
  absl::PrintF("  loss         %.4f on the first step, %.4f on the last, of one batch\n", measured.first_loss,
               measured.last_loss);
}

}  // namespace

StepTimes Summarize(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(seconds.size() - 1);
    const size_t below = static_cast<size_t>(std::floor(place));
    const size_t above = std::min(below + 1, seconds.size() - 1);
    return seconds[below] + (seconds[above] - seconds[below]) * (place - std::floor(place));
  };
  return {at(0.5), at(0.1), at(0.9), seconds.front()};
}

absl::Status BenchRank(const LoadedConfig& loaded, const RankEnvironment& environment, const BenchOptions& options) {
  const Config& config = loaded.config;
  SetThreads(ThreadsPerRank(config, environment));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, ConnectWorld(WorldOptionsFor(environment, config)));
  SHOAL_ASSIGN_OR_RETURN(Device* const device, DeviceFor(config, environment));
  RankModel::Options emulation{.host = environment.node_rank, .device = device};
  if (options.device.has_value()) emulation.pace = PaceOf(*options.device, ModelConfigOf(config), config.train().seq_length());
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<RankModel> model,
                         RankModel::Create(config, ModelConfigOf(config), *world, emulation));
  SHOAL_RETURN_IF_ERROR(LoadWeights({.seed = config.run().seed()}, *model));
  const DType compute = config.train().precision() == "bf16" ? DType::kBF16 : DType::kF32;
  // The peak before and after, on all ranks at once: the better one counts.
  SHOAL_RETURN_IF_ERROR(world->Barrier({.label = "bench"}).Await());
  SHOAL_ASSIGN_OR_RETURN(const double before, SumOverRanks(*world, kernels::MeasureMatMulPeak(compute, 0.3, model->stream())));
  SHOAL_ASSIGN_OR_RETURN(const Measured measured, MeasureSteps(config, options, *model, *world));
  SHOAL_ASSIGN_OR_RETURN(const double after, SumOverRanks(*world, kernels::MeasureMatMulPeak(compute, 0.3, model->stream())));
  if (environment.rank == 0) Print(config, *model, options, measured, std::max(before, after), world->size());
  return absl::OkStatus();
}

}  // namespace shoal
