// Collectives between emulated hosts with rate-limited cables (tests/process/network_hosts.h), beside what the cables allow.
// Needs root and iproute2.
//
//   bench_links [--hosts 2,4] [--mbit 200,1000,4000] [--kib 64,1024,8192,32768] [--small-kib 1]
//               [--ranks-per-host 1] [--algorithms ring,ring2,halving_doubling] [--verbose]
//
// Three tables for each number of hosts and rate:
//   operations   medians of the slowest rank's time, alone. Limit: the bytes that the busiest cable must carry in one
//                direction, with headers of frames and packets left out, over the rate. all_reduce also by each of
//                the `algorithms`.
//   together     two operations at once, of two groups over the same ranks: their time beside the sum of each alone.
//   beside bulk  a small operation of one group while another group moves 16 MiB: its time, and without the bulk.
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "collectives/communicator.h"
#include "collectives/engine/tuning.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/process/network_hosts.h"

namespace shoal {
namespace {

using testing::NetworkHosts;

constexpr int kPort = 29500;
constexpr int64_t kBulkBytes = 16 << 20;

struct Options {
  std::vector<int64_t> hosts = {2, 4}, mbit = {200, 1000, 4000}, kib = {64, 1024, 8192, 32768};
  int64_t small_kib = 1;
  int64_t ranks_per_host = 1;
  std::vector<std::string> algorithms;
  bool verbose = false;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double CpuSeconds() {
  rusage used = {};
  (void)getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) { return time.tv_sec + 1e-6 * time.tv_usec; };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

// One rank's side of the measurements.
class Bench {
 public:
  Bench(const Options& options, Communicator& world, int64_t mbit)
      : options_(options), world_(world), mbit_(mbit), size_(world.size()) {
    std::vector<int> all(size_);
    std::iota(all.begin(), all.end(), 0);
    bulk_ = Must(world.Split(all));
    other_ = Must(world.Split(all));
  }

  void Run() {
    Verify();
    Operations();
    Together();
    BesideBulk();
    if (options_.verbose && world_.index() == 0) Explain();
  }

 private:
  // Element counts are of f32; every rank gives or gets `bytes` / size of it per peer.
  struct Operation {
    std::string name;
    double cable_share;  // Bytes of the busiest cable in one direction, of a rank's bytes, with one rank per host.
    std::function<Work(Communicator&, const Tensor&, const Tensor&, int64_t)> start;
  };

  template <class T>
  static T Must(absl::StatusOr<T> value) {
    SHOAL_CHECK(value.ok()) << value.status().ToString();
    return *std::move(value);
  }

  std::vector<int64_t> Counts(int64_t elements) const { return std::vector<int64_t>(size_, elements / size_); }

  // A chunk per rank, which all others hold.
  std::vector<SparseMove> Moves() const {
    std::vector<SparseMove> moves;
    for (int chunk = 0; chunk < size_; ++chunk) {
      moves.push_back({chunk, chunk, {}});
      for (int rank = 0; rank < size_; ++rank) {
        if (rank != chunk) moves.back().holders.push_back(rank);
      }
    }
    return moves;
  }
  std::vector<Tensor> Chunks(const Tensor& whole, int64_t elements) const {
    std::vector<Tensor> chunks;
    for (int c = 0; c < size_; ++c) chunks.push_back(whole.Elements(c * (elements / size_), {elements / size_}));
    return chunks;
  }

  std::vector<Operation> All() const {
    const double others = (size_ - 1.0) / size_;
    using C = Communicator;
    using T = Tensor;
    std::vector<Operation> all = {
        {"all_reduce", 2 * others,
         [](C& c, const T& in, const T& out, int64_t n) {
           return c.AllReduce(in.Elements(0, {n}), out.Elements(0, {n}), ReduceOp::kSum, {});
         }},
        {"reduce_scatter", others,
         [this](C& c, const T& in, const T& out, int64_t n) {
           return c.ReduceScatter(in.Elements(0, {n}), Counts(n), out.Elements(0, {n / size_}), ReduceOp::kSum, {});
         }},
        {"all_gather", others,
         [this](C& c, const T& in, const T& out, int64_t n) {
           return c.AllGather(in.Elements(0, {n / size_}), Counts(n), out.Elements(0, {n}), {});
         }},
        {"all_to_all", others,
         [](C& c, const T& in, const T& out, int64_t n) {
           return c.AllToAll(in.Elements(0, {n}), {}, out.Elements(0, {n}), {}, {});
         }},
        {"all_to_all_v", others,
         [this](C& c, const T& in, const T& out, int64_t n) {
           return c.AllToAll(in.Elements(0, {n}), Counts(n), out.Elements(0, {n}), Counts(n), {});
         }},
        {"sparse_all_gather", others,
         [this](C& c, const T&, const T& out, int64_t n) {
           return c.SparseAllGather(Chunks(out, n), Moves(), {});
         }},
        {"sparse_reduce_scatter", others,
         [this](C& c, const T& in, const T&, int64_t n) {
           return c.SparseReduceScatter(Chunks(in, n), Moves(), ReduceOp::kSum, {});
         }},
    };
    for (const std::string& algorithm : options_.algorithms) {
      all.push_back({"all_reduce by " + algorithm, 2 * others, [algorithm](C& c, const T& in, const T& out, int64_t n) {
                       return c.AllReduce(in.Elements(0, {n}), out.Elements(0, {n}), ReduceOp::kSum, {.algorithm = algorithm});
                     }});
    }
    return all;
  }

  void Await(const Work& work) {
    const absl::Status status = work.Await();
    SHOAL_CHECK(status.ok()) << status.ToString();
  }

  // Seconds of the slowest rank.
  double Slowest(double seconds) {
    const Tensor mine = Zeros({1}, DType::kF32);
    mine.data<float>()[0] = static_cast<float>(seconds);
    Await(world_.AllReduce(mine, mine, ReduceOp::kMax, {}));
    return mine.data<float>()[0];
  }

  double Timed(int repeats, const std::function<void()>& body) {
    std::vector<double> seconds;
    for (int i = 0; i <= repeats; ++i) {
      Await(world_.Barrier({}));
      const int64_t begin_ns = NowNs();
      body();
      const double slowest = Slowest((NowNs() - begin_ns) * 1e-9);
      if (i > 0) seconds.push_back(slowest);
    }
    return Median(seconds);
  }

  double LimitSeconds(double cable_bytes) const { return cable_bytes * options_.ranks_per_host * 8 / (mbit_ * 1e6); }
  int Repeats(double limit_seconds) const { return std::clamp(static_cast<int>(1.5 / limit_seconds), 3, 15); }

  void Verify() {
    const int64_t n = 1 << 18;
    const Tensor in = Zeros({n}, DType::kF32), out = Zeros({n}, DType::kF32);
    const float sum = size_ * (size_ + 1) / 2.0F;
    for (const Operation& operation : All()) {
      std::fill_n(in.data<float>(), n, static_cast<float>(world_.index() + 1));
      Await(operation.start(*bulk_, in, out, n));
      const std::string& name = operation.name;
      if (name.starts_with("all_reduce") || name == "reduce_scatter") SHOAL_CHECK_EQ(out.data<float>()[n / size_ - 1], sum);
      if (name == "all_gather" || name == "all_to_all") SHOAL_CHECK_EQ(out.data<float>()[n - 1], size_);
    }
  }

  void Operations() {
    if (world_.index() == 0)
      std::printf("%-32s %9s %10s %10s %7s %9s\n", "operation", "KiB", "limit ms", "ms", "ratio", "cpu s/GB");
    for (const Operation& operation : All()) {
      for (const int64_t kib : options_.kib) {
        const int64_t n = kib * 256;
        const Tensor in = Zeros({n}, DType::kF32), out = Zeros({n}, DType::kF32);
        const double cable_bytes = kib * 1024 * operation.cable_share, limit = LimitSeconds(cable_bytes);
        const int repeats = Repeats(limit);
        const double cpu_begin = CpuSeconds();
        const double seconds = Timed(repeats, [&] { Await(operation.start(*bulk_, in, out, n)); });
        const double cpu = (CpuSeconds() - cpu_begin) / (repeats + 1) / (cable_bytes * 1e-9);
        if (world_.index() != 0) continue;
        std::printf("%-32s %9lld %10.3f %10.3f %7.2f %9.2f\n", operation.name.c_str(), static_cast<long long>(kib), limit * 1e3,
                    seconds * 1e3, seconds / limit, cpu);
        std::fflush(stdout);
      }
    }
  }

  void Together() {
    const int64_t n = (8 << 20) / 4;
    const Tensor in = Zeros({n}, DType::kF32), out = Zeros({n}, DType::kF32), out2 = Zeros({n}, DType::kF32);
    const std::vector<Operation> all = All();
    const Operation &gather = all[2], &exchange = all[3];
    const int repeats = Repeats(2 * LimitSeconds(n * 4 * gather.cable_share));
    const double first = Timed(repeats, [&] { Await(gather.start(*bulk_, in, out, n)); });
    const double second = Timed(repeats, [&] { Await(exchange.start(*other_, in, out2, n)); });
    const double both = Timed(repeats, [&] {
      const Work a = gather.start(*bulk_, in, out, n), b = exchange.start(*other_, in, out2, n);
      Await(a);
      Await(b);
    });
    if (world_.index() == 0)
      std::printf("together: all_gather %.3f ms, all_to_all %.3f ms, both at once %.3f ms, %.2f of their sum\n",
                  first * 1e3, second * 1e3, both * 1e3, both / (first + second));
  }

  void BesideBulk() {
    const int64_t n = kBulkBytes / 4, small = options_.small_kib * 256;
    const Tensor in = Zeros({n}, DType::kF32), out = Zeros({n}, DType::kF32);
    const Tensor word = Zeros({small}, DType::kF32), words = Zeros({small * size_}, DType::kF32);
    const std::vector<int64_t> counts(size_, small);
    const auto small_one = [&] { Await(other_->AllGather(word, counts, words, {})); };
    const double alone = Timed(15, small_one);
    const Operation exchange = All()[3];
    const double bulk_alone = Timed(3, [&] { Await(exchange.start(*bulk_, in, out, n)); });
    std::vector<double> times;
    double bulk_seconds = 0;
    for (int round = 0; round < 4; ++round) {
      Await(world_.Barrier({}));
      const int64_t begin_ns = NowNs();
      const Work bulk = exchange.start(*bulk_, in, out, n);
      // As many on all ranks, spread over the bulk's time. Ranks wake at somewhat different times, which is part of what is measured.
      for (int i = 0; i < 15; ++i) {
        (void)usleep(static_cast<useconds_t>(bulk_alone * 1e6 / 20));
        const bool beside = !bulk.Done();
        const int64_t small_ns = NowNs();
        small_one();
        if (round > 0 && beside) times.push_back((NowNs() - small_ns) * 1e-9);
      }
      Await(bulk);
      bulk_seconds = (NowNs() - begin_ns) * 1e-9;
    }
    std::sort(times.begin(), times.end());
    if (world_.index() == 0)
      std::printf("beside bulk: %lld KiB all_gather alone %.3f ms; beside 16 MiB all_to_all median %.3f, longest %.3f ms; bulk "
                  "%.1f ms, alone %.1f\n", static_cast<long long>(options_.small_kib), alone * 1e3, times[times.size() / 2] * 1e3, times.back() * 1e3,
                  bulk_seconds * 1e3, bulk_alone * 1e3);
  }

  void Explain() const {
    for (const TuningRow& row : Tuning(*bulk_)) {
      std::printf("  kind %d %lld B: %s piece %lld predicted %.3f ms observed %.3f ms (%lld) %s\n", static_cast<int>(row.kind),
                  static_cast<long long>(row.size_class), row.algorithm.c_str(), static_cast<long long>(row.piece_bytes),
                  row.predicted_ns * 1e-6, row.observed_ns * 1e-6, static_cast<long long>(row.operations), row.why.c_str());
    }
  }

  const Options options_;
  Communicator& world_;
  const int64_t mbit_;
  const int size_;
  std::unique_ptr<Communicator> bulk_, other_;
};

void RunRank(const Options& options, const NetworkHosts& network, int rank, int64_t mbit) {
  const int host = rank / static_cast<int>(options.ranks_per_host);
  SHOAL_CHECK_OK(network.Enter(host));
  WorldOptions world_options;
  world_options.rank = rank;
  world_options.size = network.hosts() * static_cast<int>(options.ranks_per_host);
  world_options.master_host = network.Address(0);
  world_options.master_port = kPort;
  const auto world = ConnectWorld(world_options);
  SHOAL_CHECK(world.ok()) << world.status().ToString();
  Bench(options, **world, mbit).Run();
  std::fflush(stdout);
}

// Whether all ranks ended well.
bool RunCluster(const Options& options, NetworkHosts& network, int64_t mbit) {
  for (int host = 0; host < network.hosts(); ++host) SHOAL_CHECK_OK(network.SetRate(host, mbit * 1'000'000));
  std::printf("\n%d hosts, %lld Mbit/s, ranks per host: %lld\n", network.hosts(), static_cast<long long>(mbit),
              static_cast<long long>(options.ranks_per_host));
  std::fflush(stdout);
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < network.hosts() * options.ranks_per_host; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() != 0) continue;
    RunRank(options, network, rank, mbit);
    _exit(0);
  }
  bool good = true;
  for (const pid_t rank : ranks) {
    int status = 0;
    (void)waitpid(rank, &status, 0);
    good = good && status == 0;
  }
  return good;
}

std::vector<int64_t> Numbers(const std::string& list) {
  std::vector<int64_t> numbers;
  for (const auto& word : absl::StrSplit(list, ',')) {
    numbers.emplace_back();
    SHOAL_CHECK(absl::SimpleAtoi(word, &numbers.back()) && numbers.back() > 0) << "not a list of numbers: " << list;
  }
  return numbers;
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--verbose") {
      options.verbose = true;
      continue;
    }
    SHOAL_CHECK(i + 1 < argc) << flag << ": unknown, or without a value";
    if (flag == "--algorithms") {
      options.algorithms = absl::StrSplit(argv[++i], ',');
      continue;
    }
    const std::vector<int64_t> numbers = Numbers(argv[++i]);
    if (flag == "--hosts") options.hosts = numbers;
    else if (flag == "--mbit") options.mbit = numbers;
    else if (flag == "--kib") options.kib = numbers;
    else if (flag == "--small-kib") options.small_kib = numbers[0];
    else if (flag == "--ranks-per-host") options.ranks_per_host = numbers[0];
    else SHOAL_CHECK(false) << "unknown flag " << flag;
  }
  for (const int64_t hosts : options.hosts) {
    const auto network = NetworkHosts::Create(static_cast<int>(hosts));
    if (!network.ok()) {
      std::fprintf(stderr, "%s\n", network.status().ToString().c_str());
      return 1;
    }
    for (const int64_t mbit : options.mbit) {
      if (!RunCluster(options, **network, mbit)) return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc, argv); }
