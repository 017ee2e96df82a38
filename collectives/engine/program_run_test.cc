// Every algorithm of every kind, run by the engine's state machine over messages that arrive in random order, against a
// plain reference in double precision. SHOAL_TEST_SEED replays.

#include "collectives/engine/program_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "collectives/engine/memory_channel.h"
#include "collectives/engine/quantise.h"
#include "collectives/program/algorithms.h"

namespace shoal {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kF16,
                            DType::kI8,  DType::kU8,  DType::kI32,  DType::kI64};
constexpr ReduceOp kReductions[] = {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax,
                                    ReduceOp::kAverage};

uint64_t Seed() {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// Round to nearest binary16; normal numbers and zero only.
uint16_t ToHalf(double value) {
  if (value == 0) return 0;
  int exponent = std::ilogb(value);
  auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(std::abs(value), 10 - exponent)));
  if (mantissa == 2048) {
    mantissa = 1024;
    ++exponent;
  }
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 15) << 10) | (mantissa - 1024));
}

double FromHalf(uint16_t bits) {
  if ((bits & 0x7fff) == 0) return 0;
  const double value = std::ldexp(1024 + (bits & 0x3ff), ((bits >> 10) & 31) - 25);
  return (bits & 0x8000) != 0 ? -value : value;
}

// Stores the value as the type can hold it: integers modulo their range.
void Set(DType dtype, std::byte* at, double value) {
  const auto put = [at](auto x) { std::memcpy(at, &x, sizeof x); };
  switch (dtype) {
    case DType::kF32: return put(static_cast<float>(value));
    case DType::kF64: return put(value);
    case DType::kBF16: return put(BFloat16(static_cast<float>(value)));
    case DType::kF16: return put(ToHalf(static_cast<float>(value)));
    case DType::kI8: return put(static_cast<int8_t>(static_cast<int64_t>(value)));
    case DType::kU8: return put(static_cast<uint8_t>(static_cast<int64_t>(value)));
    case DType::kI32: return put(static_cast<int32_t>(static_cast<int64_t>(value)));
    case DType::kI64: return put(static_cast<int64_t>(value));
  }
}

double Get(DType dtype, const std::byte* at) {
  const auto take = [at](auto x) {
    std::memcpy(&x, at, sizeof x);
    return x;
  };
  switch (dtype) {
    case DType::kF32: return take(float{});
    case DType::kF64: return take(double{});
    case DType::kBF16: return static_cast<float>(take(BFloat16()));
    case DType::kF16: return FromHalf(take(uint16_t{}));
    case DType::kI8: return take(int8_t{});
    case DType::kU8: return take(uint8_t{});
    case DType::kI32: return take(int32_t{});
    case DType::kI64: return static_cast<double>(take(int64_t{}));
  }
  return 0;
}

double Rounded(DType dtype, double value) {
  std::byte bytes[8];
  Set(dtype, bytes, value);
  return Get(dtype, bytes);
}

double Combine(DType dtype, ReduceOp op, double a, double b) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAverage: return Rounded(dtype, a + b);
    case ReduceOp::kProduct: return Rounded(dtype, a * b);
    case ReduceOp::kMin: return std::min(a, b);
    case ReduceOp::kMax: return std::max(a, b);
  }
  return 0;
}

bool IsInteger(DType dtype) {
  return dtype == DType::kI8 || dtype == DType::kU8 || dtype == DType::kI32 || dtype == DType::kI64;
}

// One operation of a group: all ranks' problems and values, and what each must get.
struct Case {
  OpKind kind = OpKind::kBarrier;
  int size = 1;
  int root = 0;
  bool in_place = false;
  DType dtype = DType::kF32;
  ReduceOp reduce = ReduceOp::kSum;
  int64_t piece = 0;
  int64_t elements = 0;
  std::vector<int64_t> counts;
  std::vector<std::vector<int64_t>> matrix;  // all_to_all: [from][to].
  std::vector<SparseMove> moves;
  std::vector<std::vector<double>> in;  // By rank.

  int64_t Sum() const { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }
  int64_t Begin(int rank) const { return std::accumulate(counts.begin(), counts.begin() + rank, int64_t{0}); }
  bool sparse() const { return kind == OpKind::kSparseAllGather || kind == OpKind::kSparseReduceScatter; }
  std::vector<int64_t> Received(int rank) const {
    std::vector<int64_t> received;
    for (int from = 0; from < size; ++from) received.push_back(matrix[from][rank]);
    return received;
  }

  Problem ProblemOf(int rank) const {
    Problem problem;
    problem.kind = kind;
    problem.rank = rank;
    problem.size = size;
    problem.root = root;
    problem.elements = elements;
    problem.counts = counts;
    if (kind == OpKind::kAllToAll) {
      problem.counts = matrix[rank];
      problem.recv_counts = Received(rank);
    }
    problem.in_place = in_place;
    problem.lending = true;
    problem.moves = moves;
    problem.piece = piece;
    return problem;
  }

  int64_t InElements(int rank) const {
    switch (kind) {
      case OpKind::kAllReduce:
      case OpKind::kReduce: return elements;
      case OpKind::kBroadcast: return rank == root ? elements : 0;
      case OpKind::kReduceScatter: return Sum();
      case OpKind::kAllGather:
      case OpKind::kGather: return counts[rank];
      case OpKind::kScatter: return rank == root ? Sum() : 0;
      case OpKind::kAllToAll: return std::accumulate(matrix[rank].begin(), matrix[rank].end(), int64_t{0});
      case OpKind::kSparseAllGather:
      case OpKind::kSparseReduceScatter: return Sum();
      default: return 0;
    }
  }

  double Reduced(const std::vector<int>& ranks, int64_t i) const {
    double result = Rounded(dtype, in[ranks[0]][i]);
    for (size_t r = 1; r < ranks.size(); ++r) {
      result = Combine(dtype, reduce, result, Rounded(dtype, in[ranks[r]][i]));
    }
    if (reduce != ReduceOp::kAverage) return result;
    if (IsInteger(dtype)) return std::trunc(result / size);
    return dtype == DType::kF64 ? result / size : Rounded(dtype, static_cast<float>(result) / static_cast<float>(size));
  }

  std::vector<int> AllRanks() const {
    std::vector<int> ranks(size);
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
  }

  // What `rank` must have in kOut; sparse: in all chunks.
  std::vector<double> Expected(int rank) const {
    std::vector<double> out;
    const auto append = [&](int from, int64_t begin, int64_t count) {
      for (int64_t i = 0; i < count; ++i) out.push_back(Rounded(dtype, in[from][begin + i]));
    };
    switch (kind) {
      case OpKind::kAllReduce:
        for (int64_t i = 0; i < elements; ++i) out.push_back(Reduced(AllRanks(), i));
        break;
      case OpKind::kReduce:
        for (int64_t i = 0; i < elements && rank == root; ++i) out.push_back(Reduced(AllRanks(), i));
        break;
      case OpKind::kReduceScatter:
        for (int64_t i = 0; i < counts[rank]; ++i) out.push_back(Reduced(AllRanks(), Begin(rank) + i));
        break;
      case OpKind::kBroadcast: append(root, 0, elements); break;
      case OpKind::kScatter: append(root, Begin(rank), counts[rank]); break;
      case OpKind::kAllGather:
      case OpKind::kGather:
        for (int from = 0; from < size && (kind == OpKind::kAllGather || rank == root); ++from) {
          append(from, 0, counts[from]);
        }
        break;
      case OpKind::kAllToAll:
        for (int from = 0; from < size; ++from) {
          append(from, std::accumulate(matrix[from].begin(), matrix[from].begin() + rank, int64_t{0}),
                 matrix[from][rank]);
        }
        break;
      case OpKind::kSparseAllGather:
      case OpKind::kSparseReduceScatter: return ExpectedChunks(rank);
      default: break;
    }
    return out;
  }

  std::vector<double> ExpectedChunks(int rank) const {
    std::vector<double> out;
    for (double value : in[rank]) out.push_back(Rounded(dtype, value));
    for (const SparseMove& move : moves) {
      const bool holds = std::find(move.holders.begin(), move.holders.end(), rank) != move.holders.end();
      std::vector<int> all = move.holders;
      all.push_back(move.owner);
      std::sort(all.begin(), all.end());
      for (int64_t i = Begin(move.chunk); i < Begin(move.chunk) + counts[move.chunk]; ++i) {
        if (kind == OpKind::kSparseAllGather && holds) out[i] = Rounded(dtype, in[move.owner][i]);
        if (kind == OpKind::kSparseReduceScatter && rank == move.owner) out[i] = Reduced(all, i);
      }
    }
    return out;
  }

  // Where kIn begins in kOut when both are the same memory.
  int64_t InShift(int rank) const {
    if (kind == OpKind::kAllGather || kind == OpKind::kGather) return Begin(rank);
    return 0;
  }
  // Where kOut begins in kIn.
  int64_t OutShift(int rank) const {
    if (kind == OpKind::kReduceScatter || kind == OpKind::kScatter) return Begin(rank);
    return 0;
  }

  std::string Text() const {
    return absl::StrCat("kind ", static_cast<int>(kind), " size ", size, " root ", root, " in_place ", in_place,
                        " dtype ", static_cast<int>(dtype), " reduce ", static_cast<int>(reduce), " elements ",
                        elements, " piece ", piece);
  }
};

// One rank's memory.
struct Buffers {
  std::vector<std::byte> in, out;  // In place: `in` alone, as large as both need.
  std::vector<std::vector<std::byte>> chunks;
  Operands operands;
};

Buffers Prepare(const Case& c, int rank, int64_t out_elements) {
  Buffers buffers;
  const int64_t width = SizeOf(c.dtype);
  buffers.operands.dtype = c.dtype;
  buffers.operands.reduce = c.reduce;
  buffers.operands.group_size = c.size;
  if (c.sparse()) {
    buffers.operands.chunk_begins.push_back(0);
    for (size_t chunk = 0; chunk < c.counts.size(); ++chunk) {
      const int64_t begin = buffers.operands.chunk_begins.back();
      buffers.chunks.emplace_back(c.counts[chunk] * width + 1);
      for (int64_t i = 0; i < c.counts[chunk]; ++i) {
        Set(c.dtype, buffers.chunks.back().data() + i * width, c.in[rank][begin + i]);
      }
      buffers.operands.chunk_begins.push_back(begin + c.counts[chunk]);
    }
    for (auto& chunk : buffers.chunks) buffers.operands.chunks.push_back(chunk.data());
    return buffers;
  }
  const int64_t in_elements = c.InElements(rank);
  const int64_t room = std::max(in_elements + c.InShift(rank), out_elements + c.OutShift(rank));
  buffers.in.resize((c.in_place ? room : in_elements) * width + 1);
  if (!c.in_place) buffers.out.resize(out_elements * width + 1);
  std::byte* const in = buffers.in.data() + (c.in_place ? c.InShift(rank) * width : 0);
  for (int64_t i = 0; i < in_elements; ++i) Set(c.dtype, in + i * width, c.in[rank][i]);
  buffers.operands.in = in;
  buffers.operands.out = c.in_place ? buffers.in.data() + c.OutShift(rank) * width : buffers.out.data();
  return buffers;
}

// Runs all ranks to their ends; the steps are interleaved at random.
void RunAll(std::vector<ProgramRun>& runs, std::vector<std::unique_ptr<Channel>>& channels, std::mt19937_64& random) {
  std::vector<Channel::Event> events;
  for (int step = 0; step < 2'000'000; ++step) {
    if (std::all_of(runs.begin(), runs.end(), [](const ProgramRun& run) { return run.Done(); })) return;
    const size_t rank = random() % runs.size();
    if (random() % 2 == 0) {
      (void)runs[rank].Step();
      continue;
    }
    events.clear();
    ASSERT_TRUE(channels[rank]->Poll(&events).ok());
    for (const Channel::Event& event : events) runs[rank].OnEvent(event);
  }
  FAIL() << "no end";
}

void Check(const Case& c, const Algorithm& algorithm, uint64_t seed) {
  SCOPED_TRACE(absl::StrCat(std::string(algorithm.name), " ", c.Text()));
  std::mt19937_64 random(seed);
  MemoryNetwork network(c.size, seed);
  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<ProgramRun> runs(c.size);
  std::vector<Buffers> buffers;
  for (int rank = 0; rank < c.size; ++rank) {
    buffers.push_back(Prepare(c, rank, static_cast<int64_t>(c.Expected(rank).size())));
    channels.push_back(network.Open(rank));
  }
  for (int rank = 0; rank < c.size; ++rank) {
    const Problem problem = c.ProblemOf(rank);
    runs[rank].Start(std::make_shared<PreparedProgram>(algorithm.make(problem)), buffers[rank].operands,
                     channels[rank].get(), {7, 0, 9}, 1000);
  }
  ASSERT_NO_FATAL_FAILURE(RunAll(runs, channels, random));
  const int64_t width = SizeOf(c.dtype);
  for (int rank = 0; rank < c.size; ++rank) {
    const std::vector<double> want = c.Expected(rank);
    std::vector<std::byte> flat;
    for (const auto& chunk : buffers[rank].chunks) flat.insert(flat.end(), chunk.begin(), chunk.end() - 1);
    const std::byte* const got = c.sparse() ? flat.data() : buffers[rank].operands.out;
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(Get(c.dtype, got + i * width), want[i]) << "rank " << rank << " element " << i;
    }
  }
  // Events of sends that nobody awaits any more do not exist: a run ends when all of its own have come.
  EXPECT_TRUE(network.Empty());
}

Case RandomCase(std::mt19937_64& random) {
  constexpr OpKind kKinds[] = {OpKind::kAllReduce, OpKind::kReduceScatter, OpKind::kAllGather, OpKind::kAllToAll,
                               OpKind::kBroadcast, OpKind::kReduce,        OpKind::kGather,    OpKind::kScatter,
                               OpKind::kBarrier,   OpKind::kSparseAllGather, OpKind::kSparseReduceScatter};
  Case c;
  c.kind = kKinds[random() % std::size(kKinds)];
  c.size = 1 + static_cast<int>(random() % 6);
  c.root = static_cast<int>(random() % c.size);
  c.dtype = kTypes[random() % std::size(kTypes)];
  c.reduce = kReductions[random() % std::size(kReductions)];
  const bool can_be_in_place = !c.sparse() && c.kind != OpKind::kAllToAll && c.kind != OpKind::kBarrier;
  c.in_place = c.sparse() || c.kind == OpKind::kBroadcast || (can_be_in_place && random() % 2 == 0);
  const auto count = [&] { return random() % 4 == 0 ? 0 : static_cast<int64_t>(random() % (random() % 8 == 0 ? 3000 : 90)); };
  c.elements = count();
  const int parts = c.sparse() ? 5 : c.size;
  for (int i = 0; i < parts; ++i) c.counts.push_back(count());
  for (int from = 0; from < c.size; ++from) {
    c.matrix.emplace_back();
    for (int to = 0; to < c.size; ++to) c.matrix[from].push_back(count());
  }
  c.piece = random() % 3 == 0 ? 64 * (1 + random() % 4) : 0;
  for (int chunk = 0; chunk < parts && c.sparse(); ++chunk) {
    if (random() % 4 == 0) continue;
    SparseMove move = {chunk, static_cast<int>(random() % c.size), {}};
    for (int rank = 0; rank < c.size; ++rank) {
      if (rank != move.owner && random() % 2 == 0) move.holders.push_back(rank);
    }
    c.moves.push_back(move);
  }
  for (int rank = 0; rank < c.size; ++rank) {
    c.in.emplace_back();
    for (int64_t i = 0; i < c.InElements(rank); ++i) c.in.back().push_back(static_cast<double>(random() % 6) - 2);
  }
  return c;
}

TEST(ProgramRun, EveryAlgorithmEqualsTheReferenceInAnyOrderOfArrival) {
  const uint64_t seed = Seed();
  for (uint64_t round = 0; round < 1500 && !::testing::Test::HasFailure(); ++round) {
    std::mt19937_64 random(seed + round);
    const Case c = RandomCase(random);
    for (const Algorithm& algorithm : Algorithms()) {
      if (!algorithm.applies(c.ProblemOf(0))) continue;
      Check(c, algorithm, seed + round);
    }
  }
}

// All ranks run with the wire format; returns their results.
std::vector<std::vector<float>> RunWire(OpKind kind, WireFormat wire, const std::vector<std::vector<float>>& in,
                                        ReduceOp op, uint64_t seed, int64_t piece = 0) {
  Case c;
  c.kind = kind;
  c.size = static_cast<int>(in.size());
  c.reduce = op;
  c.piece = piece;
  c.elements = static_cast<int64_t>(in[0].size());
  for (int rank = 0; rank < c.size; ++rank) {
    c.counts.push_back(c.elements / c.size + (rank + 1 == c.size ? c.elements % c.size : 0));
    c.in.emplace_back(in[rank].begin(), in[rank].end());
  }
  std::mt19937_64 random(seed);
  MemoryNetwork network(c.size, seed);
  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<ProgramRun> runs(c.size);
  std::vector<std::vector<float>> results;
  for (int rank = 0; rank < c.size; ++rank) {
    channels.push_back(network.Open(rank));
    results.emplace_back(kind == OpKind::kAllReduce ? c.elements : c.counts[rank]);
  }
  for (int rank = 0; rank < c.size; ++rank) {
    Operands operands;
    operands.in = reinterpret_cast<const std::byte*>(in[rank].data());
    operands.out = reinterpret_cast<std::byte*>(results[rank].data());
    operands.reduce = op;
    operands.group_size = c.size;
    const Problem problem = c.ProblemOf(rank);
    const absl::StatusOr<const Algorithm*> direct = FindAlgorithm("direct", problem);
    SHOAL_CHECK(direct.ok());
    runs[rank].Start(std::make_shared<PreparedProgram>((*direct)->make(problem), wire), operands,
                     channels[rank].get(), {7, 0, 9}, 0);
  }
  RunAll(runs, channels, random);
  EXPECT_TRUE(network.Empty());
  return results;
}

std::vector<std::vector<float>> Gaussian(int ranks, int64_t elements, uint64_t seed) {
  std::vector<std::vector<float>> in(ranks);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (auto& values : in) {
    for (int64_t i = 0; i < elements; ++i) values.push_back(normal(random));
  }
  return in;
}

// The largest error of one quantisation of values that are no larger than `largest`.
double Bound(WireFormat wire, double largest) {
  switch (wire) {
    case WireFormat::kAsIs: return 0;
    case WireFormat::kBf16: return largest / 256;
    case WireFormat::kInt8: return largest / 254;
    case WireFormat::kFp8: return largest / 16;
  }
  return 0;
}

TEST(WireFormats, ErrorsAreWithinTwoQuantisationsAndBitsAreEqualOnAllRanks) {
  const uint64_t seed = Seed();
  for (WireFormat wire : {WireFormat::kAsIs, WireFormat::kBf16, WireFormat::kInt8, WireFormat::kFp8}) {
    for (int ranks : {1, 2, 3, 5}) {
      for (int64_t elements : {0, 1, 255, 1000, 70'001}) {
        for (int64_t piece : {0, 512}) {
          const auto in = Gaussian(ranks, elements, seed);
          for (OpKind kind : {OpKind::kAllReduce, OpKind::kReduceScatter}) {
            const auto out = RunWire(kind, wire, in, ReduceOp::kSum, seed, piece);
            double largest = 0;
            for (const auto& values : in) {
              for (float x : values) largest = std::max(largest, std::abs(double{x}));
            }
            int64_t begin = 0;
            for (int rank = 0; rank < ranks; ++rank) {
              for (size_t i = 0; i < out[rank].size(); ++i) {
                double want = 0;
                for (const auto& values : in) want += values[begin + i];
                const double bound = Bound(wire, largest) * ranks + Bound(wire, largest * ranks * 1.1);
                ASSERT_NEAR(out[rank][i], want, bound + 1e-5) << static_cast<int>(wire) << " " << ranks << " " << i;
              }
              if (kind == OpKind::kAllReduce) {
                ASSERT_TRUE(elements == 0 || std::memcmp(out[0].data(), out[rank].data(), elements * 4) == 0);
              } else {
                begin += static_cast<int64_t>(out[rank].size());
              }
            }
          }
        }
      }
    }
  }
}

TEST(WireFormats, AveragesAndNaNs) {
  auto in = Gaussian(3, 2000, 5);
  const auto sum = RunWire(OpKind::kAllReduce, WireFormat::kBf16, in, ReduceOp::kSum, 1);
  const auto average = RunWire(OpKind::kAllReduce, WireFormat::kBf16, in, ReduceOp::kAverage, 1);
  for (int i = 0; i < 2000; ++i) ASSERT_NEAR(average[0][i], sum[0][i] / 3, std::abs(sum[0][i]) / 3 / 100 + 1e-6);
  in[1][700] = std::numeric_limits<float>::quiet_NaN();
  for (WireFormat wire : {WireFormat::kBf16, WireFormat::kInt8, WireFormat::kFp8}) {
    const auto out = RunWire(OpKind::kAllReduce, wire, in, ReduceOp::kSum, 2);
    for (const auto& values : out) {
      EXPECT_TRUE(std::isnan(values[700]));
      EXPECT_FALSE(std::isnan(values[0]) || std::isnan(values[1500]));
    }
  }
}

// The table of docs/collectives.md: relative root-mean-square error of sums of Gaussian data.
TEST(WireFormats, MeasuredErrorsOfGaussianSums) {
  constexpr int64_t kElements = 1 << 16;
  std::printf("relative RMS error   n=2       n=4       n=8\n");
  constexpr std::pair<WireFormat, const char*> kFormats[] = {
      {WireFormat::kBf16, "bf16"}, {WireFormat::kInt8, "int8"}, {WireFormat::kFp8, "fp8 "}};
  for (const auto& [wire, name] : kFormats) {
    std::printf("%s              ", name);
    for (int ranks : {2, 4, 8}) {
      const auto in = Gaussian(ranks, kElements, 11);
      const auto out = RunWire(OpKind::kAllReduce, wire, in, ReduceOp::kSum, 3);
      double error = 0, size = 0;
      for (int64_t i = 0; i < kElements; ++i) {
        double want = 0;
        for (const auto& values : in) want += values[i];
        error += (out[0][i] - want) * (out[0][i] - want);
        size += want * want;
      }
      const double relative = std::sqrt(error / size);
      std::printf("  %.2e", relative);
      EXPECT_LT(relative, wire == WireFormat::kBf16 ? 0.004 : wire == WireFormat::kInt8 ? 0.015 : 0.05);
    }
    std::printf("\n");
  }
}

}  // namespace
}  // namespace shoal
