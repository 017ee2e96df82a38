// Rates of kernels on a GPU: bench_gpu_kernels [--emulated] [--seconds S] [--filter TEXT]. Each case is compared with the CPU's kernel
// at a small size, then measured by events of the device at the sizes of two models. Prints one line of JSON for the device and one per
// case, as soon as it is known; exits with 1 when a case failed. --emulated: on the emulated device of tests, at small sizes, where
// times mean nothing.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "nlohmann/json.hpp"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/device/device.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/gpu/kernel_cases.h"

namespace shoal::gpu_bench {
namespace {

using nlohmann::json;

struct Options {
  bool emulated = false;
  double seconds = 0.2;  // For each case.
  std::string filter;
  int runs = 20;  // At once.
};

double At(const Tensor& t, int64_t i) {
  switch (t.dtype()) {
    case DType::kBF16: return static_cast<float>(t.data<BFloat16>()[i]);
    case DType::kF32: return t.data<float>()[i];
    case DType::kF64: return t.data<double>()[i];
    default: return t.data<int32_t>()[i];
  }
}

// The Frobenius norm of the difference, relative to that of the CPU's. 2^-7 is twice what rounding to bf16 changes, 2^-12 far more than
// orders of f32 sums do.
absl::Status Compare(const Case& which, Device& device) {
  Stream cpu;
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.NewStream());
  const Prepared want = which.prepare(TinySizes(), cpu), got = which.prepare(TinySizes(), *stream);
  want.run();
  got.run();
  for (size_t i = 0; i < want.outputs.size(); ++i) {
    SHOAL_ASSIGN_OR_RETURN(const Tensor host, Download(got.outputs[i], *stream));
    double difference = 0, norm = 0;
    for (int64_t at = 0; at < host.elements(); ++at) {
      const double expected = At(want.outputs[i], at), error = At(host, at) - expected;
      difference += error * error;
      norm += expected * expected;
    }
    const double bound = host.dtype() == DType::kBF16 ? 0x1p-7 : 0x1p-12;
    if (std::sqrt(difference) <= bound * std::sqrt(norm)) continue;  // NaN is not.
    return absl::InternalError(absl::StrCat("output ", i, " differs from the CPU's by ", std::sqrt(difference / norm),
                                            " of its norm, more than ", bound));
  }
  return stream->Wait();
}

// Milliseconds of `runs` runs, all of them put on the stream at once: so the device never waits for the host between them.
absl::Status TimeRuns(const Prepared& prepared, int runs, Stream& stream, std::vector<double>* times) {
  std::vector<Event> marks;
  marks.push_back(stream.Record(Timing::kYes));
  for (int run = 0; run < runs; ++run) {
    prepared.run();
    marks.push_back(stream.Record(Timing::kYes));
  }
  SHOAL_RETURN_IF_ERROR(stream.Wait());
  for (size_t run = 1; run < marks.size(); ++run) {
    SHOAL_ASSIGN_OR_RETURN(const double milliseconds, Event::Milliseconds(marks[run - 1], marks[run]));
    times->push_back(milliseconds);
  }
  return absl::OkStatus();
}

// Sorted milliseconds.
absl::StatusOr<std::vector<double>> Measure(const Case& which, const Sizes& sizes, const Options& options, Prepared* prepared,
                                            Stream& stream) {
  using Clock = std::chrono::steady_clock;
  constexpr size_t kRunsMax = 2000;
  *prepared = which.prepare(sizes, stream);
  for (int warmup = 0; warmup < (options.emulated ? 1 : 5); ++warmup) prepared->run();
  SHOAL_RETURN_IF_ERROR(stream.Wait());
  const Clock::time_point start = Clock::now();
  std::vector<double> times;
  do {
    SHOAL_RETURN_IF_ERROR(TimeRuns(*prepared, options.runs, stream, &times));
  } while (times.size() < kRunsMax && std::chrono::duration<double>(Clock::now() - start).count() < options.seconds);
  std::sort(times.begin(), times.end());
  return times;
}

class Bench {
 public:
  Bench(Device& device, const Options& options) : device_(device), options_(options) {}

  void Run(const Case& which, const std::string& model, const Sizes& sizes) {
    const std::string key = model + ": " + which.name;
    const bool wanted = key.find(options_.filter) != std::string::npos;
    if (!wanted && !which.rate_of.empty()) return;  // What others are compared with always runs.
    json line = {{"case", which.name}, {"model", model}};
    if (const absl::Status status = RunInto(which, model, sizes, &line); !status.ok()) {
      line["error"] = status.ToString();
      ++failed_;
    }
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
  }

  int failed() const { return failed_; }

 private:
  absl::Status RunInto(const Case& which, const std::string& model, const Sizes& sizes, json* line) {
    SHOAL_RETURN_IF_ERROR(Compare(which, device_), "comparing with the CPU");
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device_.NewStream());
    Prepared prepared;
    SHOAL_ASSIGN_OR_RETURN(const std::vector<double> times, Measure(which, sizes, options_, &prepared, *stream), "measuring");
    const double median = times[times.size() / 2];
    const double gb_s = static_cast<double>(prepared.bytes) / median * 1e-6, tflops = prepared.flops / median * 1e-9;
    line->update({{"ms", median}, {"ms_p10", times[times.size() / 10]}, {"ms_p90", times[times.size() * 9 / 10]},
                  {"runs", times.size()}, {"bytes", prepared.bytes}, {"gb_s", gb_s}});
    if (prepared.flops > 0) line->update({{"tflops", tflops}});
    const double rate = prepared.flops > 0 ? tflops : gb_s;
    rates_[model + which.name] = rate;
    if (!which.rate_of.empty() && rates_.count(model + which.rate_of) > 0) {
      (*line)["of"] = which.rate_of;
      (*line)["fraction"] = rate / rates_[model + which.rate_of];
    }
    return absl::OkStatus();
  }

  Device& device_;
  const Options options_;
  std::map<std::string, double> rates_;
  int failed_ = 0;
};

int Main(const Options& options) {
  Device* device = nullptr;
  if (options.emulated) {
    device = &kernels::testing::TestDevice();
  } else {
    const absl::StatusOr<Device*> loaded = LoadDevice("cuda", 0);
    if (!loaded.ok()) {
      std::fprintf(stderr, "bench_gpu_kernels: %s\n", loaded.status().ToString().c_str());
      return 1;
    }
    device = *loaded;
  }
  const DeviceProperties& of = device->properties();
  std::printf("%s\n", json({{"device", of.name},
                            {"compute", std::to_string(of.compute_major) + "." + std::to_string(of.compute_minor)},
                            {"multiprocessors", of.multiprocessors},
                            {"memory_bytes", of.memory_bytes},
                            {"emulated", options.emulated}}).dump().c_str());
  std::fflush(stdout);
  Bench bench(*device, options);
  const std::vector<std::pair<std::string, Sizes>> models =
      options.emulated ? std::vector<std::pair<std::string, Sizes>>{{"tiny", TinySizes()}}
                       : std::vector<std::pair<std::string, Sizes>>{{"fine", FineSizes()}, {"coarse", CoarseSizes()}};
  for (const auto& [name, sizes] : models) {
    for (const auto& cases : {MemoryCases(), ProductCases(), AttentionCases()}) {
      for (const Case& which : cases) bench.Run(which, name, sizes);
    }
  }
  return bench.failed() > 0 ? 1 : 0;
}

}  // namespace
}  // namespace shoal::gpu_bench

int main(int argc, char** argv) {
  shoal::gpu_bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--emulated") {
      options.emulated = true;
      options.runs = 2;
      options.seconds = 0;
    } else if (flag == "--seconds" && i + 1 < argc) {
      options.seconds = std::atof(argv[++i]);
    } else if (flag == "--filter" && i + 1 < argc) {
      options.filter = argv[++i];
    } else {
      std::fprintf(stderr, "bench_gpu_kernels: what is \"%s\"? Wanted --emulated, --seconds S, --filter TEXT\n", argv[i]);
      return 2;
    }
  }
  return shoal::gpu_bench::Main(options);
}
