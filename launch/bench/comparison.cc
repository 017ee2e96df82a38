#include "launch/bench/comparison.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "launch/bench/child_process.h"
#include "launch/bench/sampling.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kProbeRoundTrips = 20'000;
constexpr absl::Duration kFarewell = absl::Seconds(5);  // To end on its own after the last size.

// What one library has done with one operation.
struct SizeResult {
  std::vector<std::vector<double>> rounds_us;
  int64_t wrong = 0;
  std::string failure;
};
struct ContenderResult {
  Contender contender;
  std::map<int64_t, SizeResult> sizes;
};

void PinTo(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  (void)pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);  // Where it is refused, the two float.
}

// Prints the one-way latency of a cache line between the first two cores, in ns.
int PrintCoreLatency() {
  alignas(64) std::atomic<int> turn{0};
  std::thread other([&] {
    PinTo(1);
    for (int i = 0; i < kProbeRoundTrips; ++i) {
      while (turn.load(std::memory_order_acquire) != 2 * i + 1) {
      }
      turn.store(2 * i + 2, std::memory_order_release);
    }
  });
  PinTo(0);
  const double begin = BenchNowUs();
  for (int i = 0; i < kProbeRoundTrips; ++i) {
    turn.store(2 * i + 1, std::memory_order_release);
    while (turn.load(std::memory_order_acquire) != 2 * i + 2) {
    }
  }
  printf("%.0f\n", (BenchNowUs() - begin) * 1e3 / (2 * kProbeRoundTrips));
  other.join();
  fflush(stdout);
  return 0;
}

std::string ProbeText() {
  if (std::thread::hardware_concurrency() < 2) return "one core, no latency between cores";
  std::string line;
  const auto child = ChildProcess::Start(PrintCoreLatency);
  if (!child.ok() || (*child)->ReadLine(absl::Seconds(10), &line) != ChildProcess::Read::kLine)
    return "probe failed";
  return absl::StrCat("core to core ", line, " ns");
}

// One run of one library over several sizes. Fills `result`; a size that ends the run gets a failure.
class ContenderRun {
 public:
  ContenderRun(const ComparisonOptions& options, const BenchCase& bench, ContenderResult* result)
      : options_(options), bench_(bench), result_(*result) {}

  // Starts again behind a size that hung or failed, and leaves out sizes that did so before.
  absl::Status Run() {
    std::vector<int64_t> left;
    for (const auto& [bytes, size] : result_.sizes) {
      if (size.failure.empty()) left.push_back(bytes);
    }
    while (!left.empty()) {
      SHOAL_ASSIGN_OR_RETURN(const size_t done, RunOnce(left));
      left.erase(left.begin(), left.begin() + done);
    }
    return absl::OkStatus();
  }

 private:
  // How many of `sizes` need no other run.
  absl::StatusOr<size_t> RunOnce(const std::vector<int64_t>& sizes) {
    const Contender& contender = result_.contender;
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<ChildProcess> child, ChildProcess::Start([&] {
                             if (contender.library == "shoal")
                               return RunOwnRanks(bench_, options_.own, sizes);
                             return Execute(CommandOf(contender, bench_, sizes, options_.folder));
                           }));
    const absl::Duration patience = options_.patience + absl::Seconds(10 * options_.seconds);
    size_t done = 0;
    bool begun = false;
    std::string line;
    while (done < sizes.size()) {
      const ChildProcess::Read read = child->ReadLine(patience, &line);
      if (read == ChildProcess::Read::kLine) {
        begun |= absl::StartsWith(line, "begin ");
        if (absl::StartsWith(line, "explain ")) options_.say(line.substr(8));
        if (TakeResult(line, sizes[done])) ++done;
        continue;
      }
      const bool hung = read == ChildProcess::Read::kTimeout;
      const std::string cause = hung ? "no word" : child->Result();
      const bool unknown = contender.library == "limit" && cause.empty();
      if (!unknown)
        options_.say(absl::StrCat(Name(), ", ", bench_.op, ", ", SizeName(sizes[done]), ": ",
                                  cause.empty() ? "no result" : cause));
      // A library that does not even start would fail at every size.
      const size_t lost = begun ? done + 1 : sizes.size();
      for (; done < lost; ++done) result_.sizes[sizes[done]].failure = hung ? "hung" : "failed";
      return done;
    }
    while (child->ReadLine(kFarewell, &line) == ChildProcess::Read::kLine) {
    }
    return done;
  }

  bool TakeResult(const std::string& line, int64_t bytes) {
    const std::vector<std::string> fields = absl::StrSplit(line, ' ', absl::SkipEmpty());
    int64_t said = 0, wrong = 0;
    if (fields.size() < 4 || fields[0] != "result" || !absl::SimpleAtoi(fields[1], &said) || said != bytes ||
        !absl::SimpleAtoi(fields[2], &wrong)) {
      return false;
    }
    SizeResult& size = result_.sizes[bytes];
    std::vector<double> samples;
    for (size_t i = 3; i < fields.size(); ++i) {
      double us = 0;
      if (absl::SimpleAtod(fields[i], &us)) samples.push_back(us);
    }
    if (samples.empty()) return false;
    if (wrong > 0)
      options_.say(
          absl::StrCat(Name(), ", ", bench_.op, ", ", SizeName(bytes), ": ", wrong, " wrong elements"));
    size.wrong += wrong;
    size.rounds_us.push_back(std::move(samples));
    return true;
  }

  std::string Name() const {
    const Contender& contender = result_.contender;
    return contender.algorithm.empty() ? contender.library
                                       : absl::StrCat(contender.library, " ", contender.algorithm);
  }

  const ComparisonOptions& options_;
  const BenchCase& bench_;
  ContenderResult& result_;
};

BenchRow MakeRow(const BenchCase& bench, const ContenderResult& result, int64_t bytes) {
  BenchRow row;
  row.library = result.contender.library;
  row.algorithm = result.contender.algorithm;
  row.transport = bench.transport;
  row.op = bench.op;
  row.bytes = bytes;
  row.ranks = bench.ranks;
  const SizeResult& size = result.sizes.at(bytes);
  row.wrong = size.wrong;
  row.failure = size.failure;
  const double none = std::numeric_limits<double>::quiet_NaN();
  // A time that was taken before it failed once is no time to count on.
  row.us = row.failure.empty() ? Summarise(size.rounds_us) : Spread{none, none, none};
  return row;
}

// Of one library's algorithms the fastest right one stands for it at each size.
std::vector<BenchRow> MakeRows(const BenchCase& bench, const std::vector<ContenderResult>& results) {
  const auto better = [](const BenchRow& a, const BenchRow& b) {
    const auto rank = [](const BenchRow& row) {
      return std::tuple(!row.failure.empty(), row.wrong > 0, row.us.median);
    };
    return rank(a) < rank(b);
  };
  std::vector<BenchRow> rows;
  for (const ContenderResult& result : results) {
    for (const auto& [bytes, unused] : result.sizes) {
      BenchRow row = MakeRow(bench, result, bytes);
      if (row.library == "limit" && !row.failure.empty()) continue;
      const auto same = std::find_if(rows.begin(), rows.end(), [&](const BenchRow& other) {
        return other.library == row.library && other.bytes == row.bytes;
      });
      if (same == rows.end()) {
        rows.push_back(std::move(row));
      } else if (better(row, *same)) {
        *same = std::move(row);
      }
    }
  }
  return rows;
}

absl::StatusOr<std::vector<BenchRow>> CompareCase(const ComparisonOptions& options, const BenchCase& bench) {
  const std::vector<int64_t> sizes = bench.op == "barrier" ? std::vector<int64_t>{0} : options.sizes;
  std::vector<Contender> contenders = PeerContenders(options.peers, bench.op);
  contenders.insert(contenders.begin(), {"shoal", ""});
  if (options.limits) contenders.push_back({"limit", ""});
  std::vector<ContenderResult> results;
  for (const Contender& contender : contenders) {
    results.push_back({contender});
    for (int64_t bytes : sizes) results.back().sizes[bytes] = {};
  }
  for (int round = 0; round < options.rounds; ++round) {
    options.say(absl::StrFormat("%s, %d ranks, %s: round %d of %d%s", bench.op, bench.ranks, bench.transport,
                                round + 1, options.rounds, options.probe ? ", " + ProbeText() : ""));
    for (size_t turn = 0; turn < results.size(); ++turn) {
      // Nobody always follows the same other.
      ContenderResult& result = results[round % 2 == 0 ? turn : results.size() - 1 - turn];
      SHOAL_RETURN_IF_ERROR(ContenderRun(options, bench, &result).Run());
    }
  }
  return MakeRows(bench, results);
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> Compare(const ComparisonOptions& options) {
  std::vector<BenchRow> all;
  for (const std::string& transport : options.transports) {
    for (int ranks : options.ranks) {
      for (const std::string& op : options.ops) {
        if (op == "pingpong" && ranks != 2) continue;
        const BenchCase bench = {op, transport, ranks, options.seconds, options.in_place};
        SHOAL_ASSIGN_OR_RETURN(const std::vector<BenchRow> rows, CompareCase(options, bench));
        SHOAL_RETURN_IF_ERROR(options.on_rows(rows));
        all.insert(all.end(), rows.begin(), rows.end());
      }
    }
  }
  return all;
}

}  // namespace shoal
