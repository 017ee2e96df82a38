#include "launch/bench/own_ranks.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "collectives/engine/tuning.h"
#include "launch/bench/sampling.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kMaxRanks = 256;
constexpr absl::Duration kTimeout = absl::Seconds(60);

// What the forked ranks tell each other outside of the communicator that they measure.
struct Shared {
  std::atomic<int> agreed[2];  // In turns: a slot is written again only when all have met since it was read.
  std::atomic<int64_t> wrong;
  double samples_us[kMaxRanks][kBenchMaxSamples];
};

struct RankBench {
  Communicator& group;
  const BenchCase& bench;
  const OwnOptions& options;
  Shared& shared;
  Tensor in, out;               // As large as the largest size needs.
  int64_t part = 0, whole = 0;  // Elements: of a rank's part, and of all parts.
  std::vector<int64_t> counts;
  std::function<Work(int root)> issue;
  int agreements = 0;
};

// Reads or writes an element as a double.
template <class T>
struct Element {
  static double Get(const void* data, int64_t i) {
    return static_cast<double>(static_cast<float>(static_cast<const T*>(data)[i]));
  }
  static void Set(void* data, int64_t i, double value) {
    static_cast<T*>(data)[i] = T(static_cast<float>(value));
  }
};
template <>
struct Element<double> {
  static double Get(const void* data, int64_t i) { return static_cast<const double*>(data)[i]; }
  static void Set(void* data, int64_t i, double value) { static_cast<double*>(data)[i] = value; }
};
// Whole numbers modulo their range.
template <class T>
struct IntegerElement {
  static double Get(const void* data, int64_t i) {
    return static_cast<double>(static_cast<const T*>(data)[i]);
  }
  static void Set(void* data, int64_t i, double value) {
    static_cast<T*>(data)[i] = static_cast<T>(static_cast<int64_t>(value));
  }
};

template <class Visitor>
void WithElement(DType dtype, const Visitor& visit) {
  switch (dtype) {
    case DType::kF32:
      return visit(Element<float>());
    case DType::kBF16:
      return visit(Element<BFloat16>());
    case DType::kF16:
      return visit(Element<_Float16>());
    case DType::kF64:
      return visit(Element<double>());
    case DType::kI8:
      return visit(IntegerElement<int8_t>());
    case DType::kU8:
      return visit(IntegerElement<uint8_t>());
    case DType::kI32:
      return visit(IntegerElement<int32_t>());
    case DType::kI64:
      return visit(IntegerElement<int64_t>());
  }
}

// How far an element may be from what is expected, as a share of the largest one of the result. As is, sums
// of small whole numbers are exact; products round, and quantised formats promise no more than their step.
double Tolerance(const OwnOptions& options) {
  switch (options.wire) {
    case WireFormat::kBf16:
      return 1.0 / 64;
    case WireFormat::kInt8:
      return 1.0 / 50;
    case WireFormat::kFp8:
      return 1.0 / 6;
    case WireFormat::kAsIs:
      break;
  }
  if (options.redop != ReduceOp::kProduct && options.redop != ReduceOp::kAverage) return 0;
  return SizeOf(options.dtype) >= 4 ? 1e-6 : 1.0 / 128;
}

void Fill(RankBench& rank) {
  const std::string& op = rank.bench.op;
  const int64_t given = op == "all_gather" || op == "gather" ? rank.part : rank.whole;
  const bool in_place = op == "all_reduce" && rank.bench.in_place;
  WithElement(rank.options.dtype, [&](auto element) {
    for (int64_t i = 0; i < rank.whole; ++i) element.Set(rank.out.raw(), i, 3);
    for (int64_t i = 0; i < given; ++i) {
      element.Set(in_place ? rank.out.raw() : rank.in.raw(), i, BenchInput(rank.group.index(), i));
    }
  });
}

int64_t CountWrong(const RankBench& rank) {
  const std::string& op = rank.bench.op;
  const int me = rank.group.index(), n = rank.group.size();
  const void* result = op == "broadcast" ? rank.in.raw() : rank.out.raw();
  const int64_t checked = CheckedElements(op, me, n, rank.part);
  int64_t wrong = 0;
  WithElement(rank.options.dtype, [&](auto element) {
    // Rounded, or wrapped, as the type does it.
    alignas(8) std::byte one[8];
    const auto expected = [&](int64_t i) {
      element.Set(one, 0, ExpectedElement(op, rank.options.redop, me, n, rank.part, i));
      return element.Get(one, 0);
    };
    double largest = 0;
    for (int64_t i = 0; i < std::min<int64_t>(checked, 7); ++i)
      largest = std::max(largest, std::abs(expected(i)));
    const double tolerance = Tolerance(rank.options) * largest;
    for (int64_t i = 0; i < checked; ++i)
      wrong += !(std::abs(element.Get(result, i) - expected(i)) <= tolerance);
  });
  return wrong;
}

// The operation at the present size.
std::function<Work(int root)> MakeIssue(RankBench& rank) {
  Communicator& group = rank.group;
  const std::string& op = rank.bench.op;
  const ReduceOp redop = rank.options.redop;
  const Tensor in = rank.in.Elements(0, {rank.whole}), out = rank.out.Elements(0, {rank.whole});
  const Tensor in_part = rank.in.Elements(0, {rank.part}), out_part = rank.out.Elements(0, {rank.part});
  const std::vector<int64_t>& counts = rank.counts;
  const OpOptions options = {.label = "bench",
                             .wire = rank.options.wire,
                             .order = rank.options.order,
                             .algorithm = rank.options.algorithm};
  const OpOptions exact = {
      .label = "bench", .order = rank.options.order, .algorithm = rank.options.algorithm};
  if (op == "all_reduce") {
    const Tensor from = rank.bench.in_place ? out : in;
    return [=, &group](int) { return group.AllReduce(from, out, redop, options); };
  }
  if (op == "reduce_scatter")
    return [=, &group](int) { return group.ReduceScatter(in, counts, out_part, redop, options); };
  if (op == "all_gather") return [=, &group](int) { return group.AllGather(in_part, counts, out, exact); };
  if (op == "all_to_all") return [=, &group](int) { return group.AllToAll(in, {}, out, {}, exact); };
  if (op == "broadcast") return [=, &group](int root) { return group.Broadcast(in, root, exact); };
  if (op == "reduce") return [=, &group](int root) { return group.Reduce(in, out, root, redop, exact); };
  if (op == "gather")
    return [=, &group](int root) { return group.Gather(in_part, counts, out, root, exact); };
  if (op == "scatter")
    return [=, &group](int root) { return group.Scatter(in, counts, out_part, root, exact); };
  if (op == "barrier") return [=, &group](int) { return group.Barrier(exact); };
  SHOAL_CHECK(op == "pingpong") << op;
  if (group.index() > 1) return [](int) { return Work(); };
  const auto check = [](const Work& work) { SHOAL_CHECK_OK(work.Await()); };
  if (group.index() == 0) {
    return [=, &group](int) {
      check(group.Send(in, 1, 7, exact));
      return group.Receive(out, 1, 7, exact);
    };
  }
  return [=, &group](int) {
    check(group.Receive(out, 0, 7, exact));
    return group.Send(out, 0, 7, exact);
  };
}

void Run(void* context, int call) {
  RankBench& rank = *static_cast<RankBench*>(context);
  SHOAL_CHECK_OK(rank.issue(call % rank.group.size()).Await());
}

void Meet(void* context) {
  SHOAL_CHECK_OK(static_cast<RankBench*>(context)->group.Barrier({.label = "bench"}).Await());
}

int Agree(void* context, int value) {
  RankBench& rank = *static_cast<RankBench*>(context);
  std::atomic<int>& agreed = rank.shared.agreed[rank.agreements++ % 2];
  if (rank.group.index() == 0) agreed = value;
  Meet(context);
  return agreed;
}

void Print(const RankBench& rank, int64_t bytes, int samples) {
  std::string line = absl::StrCat("result ", bytes, " ", rank.shared.wrong.load());
  for (int i = 0; i < samples; ++i) {
    double slowest = 0;
    for (int r = 0; r < rank.group.size(); ++r) slowest = std::max(slowest, rank.shared.samples_us[r][i]);
    absl::StrAppend(&line, " ", rank.bench.op == "pingpong" ? slowest / 2 : slowest);
  }
  printf("%s\n", line.c_str());
  fflush(stdout);
}

// What rank 0 chose for operations of this size.
void Explain(const RankBench& rank, int64_t bytes) {
  const auto micros = [](int64_t ns) { return static_cast<double>(ns) / 1e3; };
  bool any = false;
  for (const TuningRow& row : Tuning(rank.group)) {
    const std::string kind(OpKindName(row.kind));
    const bool any_size = row.size_class == 0 || row.kind == OpKind::kBarrier;
    const bool sized = any_size || (bytes >= row.size_class && bytes < 2 * row.size_class);
    if (kind != rank.bench.op || !sized || row.operations == 0) continue;
    any = true;
    const std::string pieces = row.piece_bytes > 0 ? absl::StrCat(" in pieces of ", row.piece_bytes) : "";
    printf("explain %s of %lld bytes: %s %s%s: predicted %.1f us, observed %.1f us in %lld operations; %s\n",
            kind.c_str(), static_cast<long long>(bytes), row.chosen ? "chose" : "tried", row.algorithm.c_str(),
            pieces.c_str(), micros(row.predicted_ns), micros(row.observed_ns), static_cast<long long>(row.operations),
            row.why.c_str());
  }
  if (!any) {
    printf("explain %s of %lld bytes: nothing was chosen: a tiny operation, or an algorithm was given\n",
           rank.bench.op.c_str(), static_cast<long long>(bytes));
  }
  fflush(stdout);
}

// Of the cores that this process may use, in turn. Threads that are started later inherit it.
void BindToCore(int index) {
  cpu_set_t usable, one;
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return;
  int left = index % std::max(CPU_COUNT(&usable), 1);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &usable) || left-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    (void)sched_setaffinity(0, sizeof one, &one);  // Where it is refused, the rank floats.
    return;
  }
}

int64_t PartElements(int64_t bytes, DType dtype, int ranks) {
  return std::max<int64_t>(bytes / SizeOf(dtype) / ranks, 1);
}

void MeasureSize(RankBench& rank, int64_t bytes) {
  const int me = rank.group.index();
  rank.part = PartElements(bytes, rank.options.dtype, rank.group.size());
  rank.whole = rank.part * rank.group.size();
  rank.counts.assign(rank.group.size(), rank.part);
  rank.issue = MakeIssue(rank);
  if (me == 0) {
    printf("begin %lld\n", static_cast<long long>(bytes));
    fflush(stdout);
    rank.shared.wrong = 0;
  }
  Fill(rank);
  Meet(&rank);
  Run(&rank, 0);
  rank.shared.wrong += CountWrong(rank);
  Meet(&rank);
  // So that thousands of sums in place stay finite.
  std::fill_n(static_cast<std::byte*>(rank.in.raw()), rank.whole * SizeOf(rank.options.dtype), std::byte{0});
  std::fill_n(static_cast<std::byte*>(rank.out.raw()), rank.whole * SizeOf(rank.options.dtype), std::byte{0});
  const BenchOperation operation = {&rank, Run, Meet, Agree};
  const int samples = BenchSample(&operation, rank.bench.seconds, rank.shared.samples_us[me]);
  Meet(&rank);
  if (me == 0 && rank.options.explain) Explain(rank, rank.whole * SizeOf(rank.options.dtype));
  if (me == 0) Print(rank, bytes, samples);
  Meet(&rank);
}

absl::Status RunRank(int index, const std::string& rendezvous, const BenchCase& bench,
                     const OwnOptions& options, absl::Span<const int64_t> sizes, Shared& shared) {
  if (options.bind) BindToCore(index);
  WorldOptions world;
  world.rank = index;
  world.size = bench.ranks;
  world.master_host = rendezvous;
  world.job_id = "bench";
  world.transport = bench.transport == "tcp" ? "tcp" : "auto";
  world.timeout = kTimeout;
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> group, ConnectWorld(world));
  const int64_t most =
      PartElements(*std::max_element(sizes.begin(), sizes.end()), options.dtype, bench.ranks) * bench.ranks;
  SHOAL_ASSIGN_OR_RETURN(const Tensor in, group->Allocate({most}, options.dtype));
  SHOAL_ASSIGN_OR_RETURN(const Tensor out, group->Allocate({most}, options.dtype));
  RankBench rank = {*group, bench, options, shared, in, out};
  for (int64_t bytes : sizes) MeasureSize(rank, bytes);
  return absl::OkStatus();
}

template <class Value>
absl::StatusOr<Value> OneOf(std::string_view what, std::string_view name,
                            std::initializer_list<std::pair<std::string_view, Value>> values) {
  std::string names;
  for (const auto& [known, value] : values) {
    if (name == known) return value;
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(known));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no ", std::string(what), " \"", std::string(name), "\": there are ", names));
}

}  // namespace

absl::StatusOr<DType> ParseDType(std::string_view name) {
  return OneOf<DType>("element type", name,
                      {{"f32", DType::kF32},
                       {"bf16", DType::kBF16},
                       {"f16", DType::kF16},
                       {"f64", DType::kF64},
                       {"i8", DType::kI8},
                       {"u8", DType::kU8},
                       {"i32", DType::kI32},
                       {"i64", DType::kI64}});
}

absl::StatusOr<ReduceOp> ParseRedop(std::string_view name) {
  return OneOf<ReduceOp>("reduction", name,
                         {{"sum", ReduceOp::kSum},
                          {"product", ReduceOp::kProduct},
                          {"min", ReduceOp::kMin},
                          {"max", ReduceOp::kMax},
                          {"average", ReduceOp::kAverage}});
}

absl::Status ParseOpOptions(std::string_view text, OwnOptions* options) {
  for (absl::string_view part :
       absl::StrSplit(absl::string_view(text.data(), text.size()), ',', absl::SkipEmpty())) {
    const std::pair<std::string, std::string> pair = absl::StrSplit(part, absl::MaxSplits('=', 1));
    const auto& [key, value] = pair;
    if (key == "wire") {
      SHOAL_ASSIGN_OR_RETURN(options->wire, OneOf<WireFormat>("wire format", value,
                                                              {{"as_is", WireFormat::kAsIs},
                                                               {"bf16", WireFormat::kBf16},
                                                               {"int8", WireFormat::kInt8},
                                                               {"fp8", WireFormat::kFp8}}));
    } else if (key == "order") {
      SHOAL_ASSIGN_OR_RETURN(
          options->order, OneOf<Order>("order", value, {{"fast", Order::kFast}, {"fixed", Order::kFixed}}));
    } else if (key == "algorithm") {
      options->algorithm = value;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("no option \"", key, "\" of an operation: there are wire, order and algorithm"));
    }
  }
  return absl::OkStatus();
}

double ExpectedElement(std::string_view op, ReduceOp redop, int rank, int ranks, int64_t part, int64_t i) {
  const auto reduced = [&](int64_t at) {
    const double first = BenchInput(0, at), sum = first * ranks * (ranks + 1) / 2;
    switch (redop) {
      case ReduceOp::kSum:
        return sum;
      case ReduceOp::kAverage:
        return sum / ranks;
      case ReduceOp::kMin:
        return first;
      case ReduceOp::kMax:
        return first * ranks;
      case ReduceOp::kProduct:
        break;
    }
    double product = 1;
    for (int r = 0; r < ranks; ++r) product *= BenchInput(r, at);
    return product;
  };
  if (op == "all_reduce" || op == "reduce") return reduced(i);
  if (op == "reduce_scatter") return reduced(rank * part + i);
  if (op == "all_gather" || op == "gather") return BenchInput(static_cast<int>(i / part), i % part);
  if (op == "all_to_all") return BenchInput(static_cast<int>(i / part), rank * part + i % part);
  if (op == "scatter") return BenchInput(0, rank * part + i);
  return BenchInput(0, i);
}

int64_t CheckedElements(std::string_view op, int rank, int ranks, int64_t part) {
  if (op == "barrier" || (op == "pingpong" && rank > 1)) return 0;
  if ((op == "reduce" || op == "gather") && rank != 0) return 0;
  return op == "reduce_scatter" || op == "scatter" ? part : part * ranks;
}

int RunOwnRanks(const BenchCase& bench, const OwnOptions& options, absl::Span<const int64_t> sizes) {
  SHOAL_CHECK_LE(bench.ranks, kMaxRanks);
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("shared page of the ranks");
    return 1;
  }
  Shared& shared = *static_cast<Shared*>(memory);  // All zero.
  const std::string rendezvous = absl::StrCat("unix:shoal-bench-", getpid());
  const pid_t parent = getpid();
  for (int index = 0; index < bench.ranks; ++index) {
    if (fork() != 0) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    const absl::Status status = RunRank(index, rendezvous, bench, options, sizes, shared);
    if (!status.ok()) fprintf(stderr, "rank %d: %s\n", index, status.ToString().c_str());
    _exit(status.ok() ? 0 : 1);
  }
  int wait_status = 0;
  bool failed = false;
  while (waitpid(-1, &wait_status, 0) > 0) failed |= wait_status != 0;
  return failed ? 1 : 0;
}

}  // namespace shoal
