// Rates of collectives on device tensors between processes: bench_gpu_collectives [--emulated] [--seconds S] [--ranks N]. Ranks have
// GPUs by turns, so that they share one where there is one; each way (peers, staged) does the same operations, whose results are
// checked first. Prints one line of JSON for each, as rank 0 sees it; exits with 1 when one failed. --emulated: on emulated devices of
// tests, at small sizes, where times mean nothing.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/peer_group.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/backend/staged_group.h"
#include "nlohmann/json.hpp"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/device/device.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal::gpu_bench {
namespace {

using nlohmann::json;
using Say = RankProcesses::Say;

struct Options {
  bool emulated = false;
  double seconds = 0.3;  // For each case.
  std::vector<int> ranks = {2, 4};
  std::vector<int64_t> bytes = {64 << 10, 1 << 20, 16 << 20, 256 << 20};
};

// An operation in place on `whole`, all ranks' parts of the result.
struct Case {
  std::string name;
  DType dtype;
  std::function<Work(Communicator& group, const Tensor& whole)> issue;
  std::function<float(int ranks, int64_t part)> expected;  // From ranks that have rank + 1 everywhere, in their part of the tensor.
  double moved;  // Bytes that a rank must at least take in for each byte of the tensor, times n / (n - 1).
};

Tensor Part(const Communicator& group, const Tensor& whole) {
  const int64_t count = whole.elements() / group.size();
  return whole.Elements(group.index() * count, {count});
}

std::vector<Case> Cases() {
  return {{"all_reduce", DType::kF32,
           [](Communicator& group, const Tensor& whole) { return group.AllReduce(whole, whole, ReduceOp::kSum, {}); },
           [](int ranks, int64_t) { return static_cast<float>(ranks * (ranks + 1) / 2); }, 2},
          {"all_gather", DType::kBF16,
           [](Communicator& group, const Tensor& whole) {
             const Tensor part = Part(group, whole);
             return group.AllGather(part, std::vector<int64_t>(static_cast<size_t>(group.size()), part.elements()), whole, {});
           },
           [](int, int64_t part) { return static_cast<float>(part + 1); }, 1}};
}

// Whether the operation gives what it should.
absl::Status Verify(const Case& c, Communicator& group, const Tensor& whole, Stream& stream) {
  const Tensor host = EmptyHost(whole.shape(), c.dtype, stream);
  const float own = static_cast<float>(group.index() + 1);
  for (int64_t i = 0; i < host.elements(); ++i) {
    if (c.dtype == DType::kF32) host.data<float>()[i] = own;
    if (c.dtype == DType::kBF16) host.data<BFloat16>()[i] = BFloat16(own);
  }
  Copy(host, whole, stream);
  SHOAL_RETURN_IF_ERROR(stream.Wait());
  SHOAL_RETURN_IF_ERROR(c.issue(group, whole).Await());
  SHOAL_ASSIGN_OR_RETURN(const Tensor got, Download(whole, stream));
  const int64_t part = got.elements() / group.size();
  for (int64_t i = 0; i < got.elements(); ++i) {
    const float value = c.dtype == DType::kF32 ? got.data<float>()[i] : static_cast<float>(got.data<BFloat16>()[i]);
    if (value == c.expected(group.size(), i / part)) continue;
    return absl::InternalError(absl::StrCat("element ", i, " is ", value, ", want ", c.expected(group.size(), i / part)));
  }
  return absl::OkStatus();
}

absl::StatusOr<double> RunOnceMs(const Case& c, Communicator& group, const Tensor& whole) {
  const auto begin = std::chrono::steady_clock::now();
  SHOAL_RETURN_IF_ERROR(c.issue(group, whole).Await());
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

absl::StatusOr<json> Measure(const Case& c, Communicator& group, const Tensor& whole, double seconds) {
  double warm_ms = 0;
  for (int run = 0; run < 3; ++run) {
    SHOAL_ASSIGN_OR_RETURN(warm_ms, RunOnceMs(c, group, whole));
  }
  // As many on all ranks: the largest of their wishes, by a message of the host.
  const int64_t wish = seconds == 0 ? 2 : std::clamp<int64_t>(static_cast<int64_t>(seconds * 1e3 / warm_ms), 10, 500);
  const Tensor runs(const_cast<int64_t*>(&wish), {1}, DType::kI64);
  const Tensor agreed = Zeros({1}, DType::kI64);
  SHOAL_RETURN_IF_ERROR(group.AllReduce(runs, agreed, ReduceOp::kMax, {}).Await());
  std::vector<double> ms;
  for (int64_t run = 0; run < agreed.data<int64_t>()[0]; ++run) {
    SHOAL_ASSIGN_OR_RETURN(ms.emplace_back(), RunOnceMs(c, group, whole));
  }
  std::sort(ms.begin(), ms.end());
  const double median = ms[ms.size() / 2], n = group.size();
  return json{{"ms", median}, {"ms_p10", ms[ms.size() / 10]}, {"ms_p90", ms[ms.size() * 9 / 10]},
              {"gb_s", c.moved * (n - 1) / n * static_cast<double>(whole.bytes()) / (median * 1e6)}};
}

absl::StatusOr<json> RunCase(const Case& c, int64_t bytes, Communicator& group, Device& device, double seconds) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(const Tensor whole, group.Allocate({bytes / SizeOf(c.dtype)}, c.dtype));
  SHOAL_RETURN_IF_ERROR(Verify(c, group, whole, *stream), c.name);
  return Measure(c, group, whole, seconds);
}

absl::StatusOr<std::unique_ptr<Communicator>> Connect(const std::string& way, Communicator& world, Device& device) {
  std::vector<int> all(static_cast<size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> host, world.Split(all));
  if (way == "staged") return StageThroughHost(std::move(host), device);
  SHOAL_ASSIGN_OR_RETURN(const std::string obstacle, FindPeerObstacle(*host, device, absl::Now() + absl::Seconds(60)));
  if (!obstacle.empty()) return absl::FailedPreconditionError(obstacle);
  return ConnectPeers(std::move(host), device);
}

void RunRank(const Options& options, Communicator& world, Device& device, int devices, const Say& say) {
  for (const std::string way : {"peers", "staged"}) {
    const auto group = Connect(way, world, device);
    for (const Case& c : Cases()) {
      for (const int64_t bytes : options.bytes) {
        json line = {{"way", way}, {"op", c.name}, {"dtype", Name(c.dtype)}, {"bytes", bytes}, {"ranks", world.size()}, {"devices", devices}};
        const absl::StatusOr<json> result = group.ok() ? RunCase(c, bytes, **group, device, options.seconds) : group.status();
        if (result.ok()) {
          line.update(*result);
        } else {
          line["error"] = result.status().ToString();
        }
        if (world.index() == 0) say(line.dump());
      }
    }
  }
  if (world.index() == 0) say("end");
}

// The first device for rank 0, and so on.
absl::StatusOr<Device*> DeviceOf(int rank, bool emulated, int32_t* devices) {
  *devices = 1;
  if (emulated) return &kernels::testing::TestDevice();
  SHOAL_ASSIGN_OR_RETURN(Device* const first, LoadDevice("cuda", 0));
  SHOAL_RETURN_IF_ERROR(first->StatusOf(first->api().count(devices), "counting devices"));
  return LoadDevice("cuda", rank % *devices);
}

// On `size` processes that each have a device.
void RunProcesses(const Options& options, int size, const std::function<void(const std::string&)>& print) {
  RankProcesses processes(RankOptions(0, size, "auto", UniqueRendezvous()), [&](Communicator& world, const Say& say) {
    int32_t devices = 0;
    const absl::StatusOr<Device*> device = DeviceOf(world.index(), options.emulated, &devices);
    if (!device.ok()) return say(json{{"error", device.status().ToString()}}.dump());
    RunRank(options, world, **device, devices, say);
  });
  std::string line;
  while (line = processes.Line(0), line != "end") {
    print(line.empty() ? json{{"error", "rank 0 ended, or said nothing for a minute"}}.dump() : line);
    if (line.empty() || !json::parse(line).contains("way")) return;
  }
}

int Main(const Options& options) {
  bool failed = false;
  const auto print = [&](const std::string& line) {
    failed = failed || json::parse(line).contains("error");
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  };
  for (const int size : options.ranks) RunProcesses(options, size, print);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace shoal::gpu_bench

int main(int argc, char** argv) {
  shoal::gpu_bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--emulated") {
      options.emulated = true;
      options.seconds = 0;
      options.bytes = {4 << 10, 64 << 10};
    } else if (flag == "--seconds" && i + 1 < argc) {
      options.seconds = std::atof(argv[++i]);
    } else if (flag == "--ranks" && i + 1 < argc) {
      options.ranks = {std::atoi(argv[++i])};
    } else {
      std::fprintf(stderr, "bench_gpu_collectives: what is \"%s\"? Wanted --emulated, --seconds S, --ranks N\n", argv[i]);
      return 2;
    }
  }
  return shoal::gpu_bench::Main(options);
}
