// Collectives between two processes of this host: verified, then timed. Prints per operation and size the
// median, the 10th and 90th percentile, and, measured in the same run, what one core's memcpy of as many
// bytes takes.
//
//   bench_collectives [auto|tcp] [ranks]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "absl/strings/str_format.h"
#include "collectives/communicator.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/harness/ranks.h"

#ifndef __OPTIMIZE__
#error "a benchmark without optimisation measures nothing"
#endif

namespace shoal {
namespace {

constexpr int64_t kSizes[] = {32,      1 << 10, 16 << 10, 64 << 10, 256 << 10,
                              1 << 20, 4 << 20, 16 << 20, 64 << 20};
constexpr int64_t kBudgetNs = 200'000'000;  // Per line.

struct Times {
  double p10_us, median_us, p90_us;
};

Times Percentiles(std::vector<int64_t> samples_ns) {
  std::sort(samples_ns.begin(), samples_ns.end());
  const auto at = [&](double share) {
    return samples_ns[static_cast<size_t>(share * (samples_ns.size() - 1))] * 1e-3;
  };
  return {at(0.1), at(0.5), at(0.9)};
}

// Every rank takes the same number of samples, so the count depends on the size alone.
int Samples(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>(kBudgetNs / (3'000 + bytes / 4), 5, 3'000));
}

template <class Body>
Times Measure(int64_t bytes, const Body& body) {
  for (int i = 0; i < 3; ++i) body();
  std::vector<int64_t> samples;
  for (int i = 0; i < Samples(bytes); ++i) {
    const int64_t begin = NowNs();
    body();
    samples.push_back(NowNs() - begin);
  }
  return Percentiles(std::move(samples));
}

// One operation at one size: `bytes` is the whole buffer of a rank.
struct Case {
  const char* name;
  Tensor in, out;
  std::function<Work()> issue;
  std::function<float(int64_t)> expected;  // Of `out`, when rank r's input is r + 1 everywhere.
};

std::vector<Case> Cases(Communicator& group, int64_t bytes) {
  const int n = group.size();
  const int64_t part = std::max<int64_t>(bytes / 4 / n, 1), whole = part * n;
  const std::vector<int64_t> counts(n, part);
  const auto buffer = [&](int64_t elements) {
    absl::StatusOr<Tensor> tensor = group.Allocate({elements}, DType::kF32);
    SHOAL_CHECK(tensor.ok()) << tensor.status().ToString();
    return *tensor;
  };
  const Tensor a = buffer(whole), b = buffer(whole);
  const Tensor mine = a.Elements(part * group.index(), {part});
  const float sum = n * (n + 1) / 2;
  return {{"all_reduce", a, a, [=, &group] { return group.AllReduce(a, a, ReduceOp::kSum, {}); },
           [=](int64_t) { return sum; }},
          {"reduce_scatter", a, mine,
           [=, &group] { return group.ReduceScatter(a, counts, mine, ReduceOp::kSum, {}); },
           [=](int64_t) { return sum; }},
          {"all_gather", mine, a, [=, &group] { return group.AllGather(mine, counts, a, {}); },
           [=](int64_t i) { return static_cast<float>(i / part + 1); }},
          {"all_to_all", a, b, [=, &group] { return group.AllToAll(a, counts, b, counts, {}); },
           [=](int64_t i) { return static_cast<float>(i / part + 1); }}};
}

void Verify(Communicator& group, const Case& item) {
  std::fill_n(item.in.data<float>(), item.in.elements(), group.index() + 1.0f);
  SHOAL_CHECK_OK(item.issue().Await());
  for (int64_t i = 0; i < item.out.elements(); ++i) {
    SHOAL_CHECK(item.out.data<float>()[i] == item.expected(i)) << item.name << " element " << i;
  }
  // So that thousands of sums stay finite.
  std::fill_n(item.in.data<float>(), item.in.elements(), 0.0f);
}

Times MeasureCopy(int64_t bytes) {
  std::vector<char> from(bytes, 1), to(bytes);
  return Measure(bytes, [&] {
    std::memcpy(to.data(), from.data(), bytes);
    asm volatile("" : : "r"(to.data()) : "memory");
  });
}

void RunRank(Communicator& group, const RankProcesses::Say& say) {
  for (int64_t bytes : kSizes) {
    for (const Case& item : Cases(group, bytes)) {
      Verify(group, item);
      const Times times = Measure(bytes, [&] { SHOAL_CHECK_OK(item.issue().Await()); });
      const Times copy = group.index() == 0 ? MeasureCopy(bytes) : Times{};
      SHOAL_CHECK_OK(group.Barrier({}).Await());
      if (group.index() != 0) continue;
      say(absl::StrFormat("%-15s %10d %11.2f %11.2f %11.2f %9.2f %12.2f", item.name, bytes, times.median_us,
                          times.p10_us, times.p90_us, bytes / times.median_us * 1e-3, copy.median_us));
    }
  }
}

int Main(int argc, char** argv) {
  const std::string transport = argc > 1 ? argv[1] : "auto";
  const int size = argc > 2 ? std::atoi(argv[2]) : 2;
  RankProcesses ranks(RankOptions(0, size, transport, UniqueRendezvous()), RunRank);
  std::printf("%d processes, transport %s, f32, buffers from Allocate, in place where possible\n", size,
              transport.c_str());
  std::printf("%-15s %10s %11s %11s %11s %9s %12s\n", "operation", "bytes", "median us", "p10 us", "p90 us",
              "GB/s", "memcpy us");
  for (std::string line = ranks.Line(0); !line.empty(); line = ranks.Line(0)) {
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc, argv); }
