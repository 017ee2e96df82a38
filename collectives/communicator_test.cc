// Every operation against a serial reference: sizes, transports, element types, counts, places of buffers.

#include "collectives/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "collectives/engine/tuning.h"
#include "runtime/base/mutex.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::Combine;
using ::testing::HasSubstr;
using ::testing::Values;

// A deterministic value in [-8, 8] that differs between ranks and elements; halves, so that sums of a few are
// exact in every floating-point type.
int64_t Halves(uint64_t seed, int rank, int64_t i) {
  uint64_t x = seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(rank) * 0xbf58476d1ce4e5b9u +
               static_cast<uint64_t>(i);
  x ^= x >> 31;
  x *= 0x94d049bb133111ebu;
  x ^= x >> 29;
  return static_cast<int64_t>(x % 33) - 16;
}

void SetElement(const Tensor& tensor, int64_t i, int64_t halves) {
  switch (tensor.dtype()) {
    case DType::kF32:
      tensor.data<float>()[i] = halves * 0.5f;
      break;
    case DType::kF64:
      tensor.data<double>()[i] = halves * 0.5;
      break;
    case DType::kBF16:
      tensor.data<BFloat16>()[i] = BFloat16(halves * 0.5f);
      break;
    case DType::kF16:
      SHOAL_CHECK(false) << "tested in reduce_test";
      break;
    case DType::kI8:
      tensor.data<int8_t>()[i] = static_cast<int8_t>(halves);
      break;
    case DType::kU8:
      tensor.data<uint8_t>()[i] = static_cast<uint8_t>(halves);
      break;
    case DType::kI32:
      tensor.data<int32_t>()[i] = static_cast<int32_t>(halves);
      break;
    case DType::kI64:
      tensor.data<int64_t>()[i] = halves;
      break;
  }
}

int64_t GetElement(const Tensor& tensor, int64_t i) {
  switch (tensor.dtype()) {
    case DType::kF32:
      return std::lround(tensor.data<float>()[i] * 2);
    case DType::kF64:
      return std::lround(tensor.data<double>()[i] * 2);
    case DType::kBF16:
      return std::lround(static_cast<float>(tensor.data<BFloat16>()[i]) * 2);
    case DType::kF16:
      SHOAL_CHECK(false) << "tested in reduce_test";
      break;
    case DType::kI8:
      return tensor.data<int8_t>()[i];
    case DType::kU8:
      return tensor.data<uint8_t>()[i];
    case DType::kI32:
      return tensor.data<int32_t>()[i];
    case DType::kI64:
      return tensor.data<int64_t>()[i];
  }
  return 0;
}

// The value of an element as the type can hold it.
int64_t Wrap(DType dtype, int64_t value) {
  if (dtype == DType::kI8) return static_cast<int8_t>(value);
  if (dtype == DType::kU8) return static_cast<uint8_t>(value);
  if (dtype == DType::kI32) return static_cast<int32_t>(value);
  return value;
}

int64_t Reduced(DType dtype, ReduceOp op, uint64_t seed, int ranks, int64_t i) {
  int64_t result = Wrap(dtype, Halves(seed, 0, i));
  for (int rank = 1; rank < ranks; ++rank) {
    const int64_t next = Wrap(dtype, Halves(seed, rank, i));
    if (op == ReduceOp::kSum) result = Wrap(dtype, result + next);
    if (op == ReduceOp::kProduct) result = Wrap(dtype, result * next);
    if (op == ReduceOp::kMin) result = std::min(result, next);
    if (op == ReduceOp::kMax) result = std::max(result, next);
  }
  return result;
}

int64_t Sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

std::vector<int64_t> Begins(const std::vector<int64_t>& counts) {
  std::vector<int64_t> begins(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), begins.begin() + 1);
  return begins;
}

// The first element that is not as expected, or "".
std::string Differences(const Tensor& tensor, const std::function<int64_t(int64_t)>& expected) {
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    if (GetElement(tensor, i) != expected(i)) {
      return absl::StrCat("element ", i, " of ", tensor.elements(), ": ", GetElement(tensor, i), ", want ",
                          expected(i));
    }
  }
  return "";
}

// Where buffers lie: from Allocate, elsewhere, or one on even and the other on odd ranks.
enum class Place { kShared, kPrivate, kMixed };

// Runs operations of one group and checks each result against the reference.
class Checker {
 public:
  Checker(Communicator& group, Place place) : group_(group), place_(place) {}

  Tensor Buffer(int64_t elements, DType dtype) {
    const bool shared = place_ == Place::kShared || (place_ == Place::kMixed && group_.index() % 2 == 0);
    if (!shared) return Zeros({elements}, dtype);
    absl::StatusOr<Tensor> tensor = group_.Allocate({elements}, dtype);
    SHOAL_CHECK(tensor.ok()) << tensor.status().ToString();
    return *tensor;
  }

  void Fill(const Tensor& tensor, uint64_t seed, int rank, int64_t begin) {
    for (int64_t i = 0; i < tensor.elements(); ++i) SetElement(tensor, i, Halves(seed, rank, begin + i));
  }

  void AllReduce(int64_t elements, DType dtype, ReduceOp op, uint64_t seed) {
    const Tensor data = Buffer(elements, dtype);
    Fill(data, seed, group_.index(), 0);
    EXPECT_EQ(group_.AllReduce(data, data, op, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(data, [&](int64_t i) { return Reduced(dtype, op, seed, group_.size(), i); }), "");
  }

  void ReduceScatter(const std::vector<int64_t>& counts, DType dtype, ReduceOp op, bool in_place,
                     uint64_t seed) {
    const int me = group_.index();
    const int64_t begin = Begins(counts)[me];
    const Tensor in = Buffer(Sum(counts), dtype);
    Fill(in, seed, me, 0);
    const Tensor out = in_place ? in.Elements(begin, {counts[me]}) : Buffer(counts[me], dtype);
    EXPECT_EQ(group_.ReduceScatter(in, counts, out, op, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out, [&](int64_t i) { return Reduced(dtype, op, seed, group_.size(), begin + i); }),
              "");
    // The other parts are as they were.
    EXPECT_EQ(Differences(in,
                          [&](int64_t i) {
                            const bool own = in_place && i >= begin && i < begin + counts[me];
                            return own ? GetElement(in, i) : Wrap(dtype, Halves(seed, me, i));
                          }),
              "");
  }

  void AllGather(const std::vector<int64_t>& counts, DType dtype, bool in_place, uint64_t seed) {
    const int me = group_.index();
    const std::vector<int64_t> begins = Begins(counts);
    const Tensor out = Buffer(Sum(counts), dtype);
    const Tensor in = in_place ? out.Elements(begins[me], {counts[me]}) : Buffer(counts[me], dtype);
    Fill(in, seed, me, begins[me]);
    EXPECT_EQ(group_.AllGather(in, counts, out, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out,
                          [&](int64_t i) {
                            const int from =
                                static_cast<int>(std::upper_bound(begins.begin(), begins.end(), i) -
                                                 begins.begin()) -
                                1;
                            return Wrap(dtype, Halves(seed, from, i));
                          }),
              "");
  }

  // matrix[i][j]: elements from i to j.
  void AllToAll(const std::vector<std::vector<int64_t>>& matrix, DType dtype, uint64_t seed) {
    const int me = group_.index();
    std::vector<int64_t> receive;
    for (int from = 0; from < group_.size(); ++from) receive.push_back(matrix[from][me]);
    const Tensor in = Buffer(Sum(matrix[me]), dtype);
    const Tensor out = Buffer(Sum(receive), dtype);
    Fill(in, seed, me, 0);
    EXPECT_EQ(group_.AllToAll(in, matrix[me], out, receive, {}).Await().ToString(), "OK");
    const std::vector<int64_t> begins = Begins(receive);
    EXPECT_EQ(Differences(
                  out,
                  [&](int64_t i) {
                    const int from =
                        static_cast<int>(std::upper_bound(begins.begin(), begins.end(), i) - begins.begin()) -
                        1;
                    return Wrap(dtype, Halves(seed, from, Begins(matrix[from])[me] + i - begins[from]));
                  }),
              "");
  }

  void Reduce(int64_t elements, DType dtype, ReduceOp op, int root, bool in_place, uint64_t seed) {
    const bool is_root = group_.index() == root;
    const Tensor in = Buffer(elements, dtype);
    Fill(in, seed, group_.index(), 0);
    const Tensor out = !is_root ? Tensor() : in_place ? in : Buffer(elements, dtype);
    EXPECT_EQ(group_.Reduce(in, out, root, op, {}).Await().ToString(), "OK");
    if (is_root) {
      EXPECT_EQ(Differences(out, [&](int64_t i) { return Reduced(dtype, op, seed, group_.size(), i); }), "");
    }
    if (is_root && in_place) return;
    EXPECT_EQ(Differences(in, [&](int64_t i) { return Wrap(dtype, Halves(seed, group_.index(), i)); }), "");
  }

  void Gather(const std::vector<int64_t>& counts, DType dtype, int root, bool in_place, uint64_t seed) {
    const int me = group_.index();
    const std::vector<int64_t> begins = Begins(counts);
    const Tensor out = me == root ? Buffer(Sum(counts), dtype) : Tensor();
    const Tensor in = me == root && in_place ? out.Elements(begins[me], {counts[me]}) : Buffer(counts[me], dtype);
    Fill(in, seed, 0, begins[me]);
    EXPECT_EQ(group_.Gather(in, counts, out, root, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out, [&](int64_t i) { return Wrap(dtype, Halves(seed, 0, i)); }), "");
  }

  void Scatter(const std::vector<int64_t>& counts, DType dtype, int root, bool in_place, uint64_t seed) {
    const int me = group_.index();
    const std::vector<int64_t> begins = Begins(counts);
    const Tensor in = me == root ? Buffer(Sum(counts), dtype) : Tensor();
    Fill(in, seed, 0, 0);
    const Tensor out = me == root && in_place ? in.Elements(begins[me], {counts[me]}) : Buffer(counts[me], dtype);
    EXPECT_EQ(group_.Scatter(in, counts, out, root, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out, [&](int64_t i) { return Wrap(dtype, Halves(seed, 0, begins[me] + i)); }), "");
  }

  // Every rank sends to every other one, and receives in another order than the messages were sent in.
  void Exchange(int64_t elements, DType dtype, uint64_t seed) {
    const int me = group_.index();
    std::vector<Work> works;
    std::vector<std::pair<int, Tensor>> received;
    for (int step = 1; step < group_.size(); ++step) {
      const int to = (me + step) % group_.size(), from = (me + 2 * group_.size() - step) % group_.size();
      const Tensor out = Buffer(elements, dtype);
      Fill(out, seed, me * 100 + to, 0);
      works.push_back(group_.Send(out, to, 7, {}));
      received.emplace_back(from, Buffer(elements, dtype));
    }
    for (size_t i = received.size(); i-- > 0;) {
      works.push_back(group_.Receive(received[i].second, received[i].first, 7, {}));
    }
    for (const Work& work : works) EXPECT_EQ(work.Await().ToString(), "OK");
    for (const auto& [from, tensor] : received) {
      EXPECT_EQ(Differences(tensor, [&](int64_t i) { return Wrap(dtype, Halves(seed, from * 100 + me, i)); }), "");
    }
  }

  // Chunk c belongs to rank c % size; the odd ones are held by all, the even ones by the next rank.
  void Sparse(int64_t elements, DType dtype, uint64_t seed) {
    const int n = group_.size(), me = group_.index();
    constexpr int kChunks = 5;
    std::vector<SparseMove> moves;
    std::vector<Tensor> chunks(kChunks);
    for (int c = 0; c < kChunks; ++c) {
      SparseMove move = {c, c % n, {}};
      for (int r = 0; r < n; ++r) {
        if (r != move.owner && (c % 2 == 1 || r == (move.owner + 1) % n)) move.holders.push_back(r);
      }
      const bool holds = std::count(move.holders.begin(), move.holders.end(), me) > 0;
      if (holds || move.owner == me) chunks[c] = Buffer(elements + c, dtype);
      Fill(chunks[c], seed + c, me, 0);
      moves.push_back(move);
    }
    EXPECT_EQ(group_.SparseReduceScatter(chunks, moves, ReduceOp::kSum, {}).Await().ToString(), "OK");
    for (const SparseMove& move : moves) {
      EXPECT_EQ(Differences(chunks[move.chunk], [&](int64_t i) { return SparseSum(move, dtype, seed, i); }), "");
    }
    EXPECT_EQ(group_.SparseAllGather(chunks, moves, {}).Await().ToString(), "OK");
    for (SparseMove move : moves) {
      EXPECT_EQ(Differences(chunks[move.chunk], [&](int64_t i) { return OwnersSum(move, dtype, seed, i); }), "");
    }
  }

  // What this rank has of a chunk after the reduction, and what its owner has.
  int64_t SparseSum(const SparseMove& move, DType dtype, uint64_t seed, int64_t i) const {
    if (move.owner != group_.index()) return Wrap(dtype, Halves(seed + move.chunk, group_.index(), i));
    return OwnersSum(move, dtype, seed, i);
  }
  static int64_t OwnersSum(const SparseMove& move, DType dtype, uint64_t seed, int64_t i) {
    int64_t sum = Wrap(dtype, Halves(seed + move.chunk, move.owner, i));
    for (int holder : move.holders) sum = Wrap(dtype, sum + Wrap(dtype, Halves(seed + move.chunk, holder, i)));
    return sum;
  }

  void OutOfPlace(int64_t elements, DType dtype, ReduceOp op, uint64_t seed) {
    const Tensor in = Buffer(elements, dtype), out = Buffer(elements, dtype);
    Fill(in, seed, group_.index(), 0);
    EXPECT_EQ(group_.AllReduce(in, out, op, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out, [&](int64_t i) { return Reduced(dtype, op, seed, group_.size(), i); }), "");
    EXPECT_EQ(Differences(in, [&](int64_t i) { return Wrap(dtype, Halves(seed, group_.index(), i)); }), "");
  }

  void EvenAllToAll(int64_t part, DType dtype, uint64_t seed) {
    const int me = group_.index();
    const Tensor in = Buffer(part * group_.size(), dtype), out = Buffer(part * group_.size(), dtype);
    Fill(in, seed, me, 0);
    EXPECT_EQ(group_.AllToAll(in, {}, out, {}, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(out,
                          [&](int64_t i) {
                            return Wrap(dtype, Halves(seed, static_cast<int>(i / part), me * part + i % part));
                          }),
              "");
  }

  void Broadcast(int64_t elements, DType dtype, int root, uint64_t seed) {
    const Tensor data = Buffer(elements, dtype);
    if (group_.index() == root) Fill(data, seed, root, 0);
    EXPECT_EQ(group_.Broadcast(data, root, {}).Await().ToString(), "OK");
    EXPECT_EQ(Differences(data, [&](int64_t i) { return Wrap(dtype, Halves(seed, root, i)); }), "");
  }

 private:
  Communicator& group_;
  const Place place_;
};

// Counts that differ, one of them zero, about `total` in all.
std::vector<int64_t> UnevenCounts(int ranks, int64_t total) {
  std::vector<int64_t> counts;
  for (int rank = 0; rank < ranks; ++rank) counts.push_back(rank == 1 ? 0 : total / ranks + rank * 7);
  return counts;
}

std::vector<std::vector<int64_t>> UnevenMatrix(int ranks, int64_t total) {
  std::vector<std::vector<int64_t>> matrix(ranks, std::vector<int64_t>(ranks));
  for (int from = 0; from < ranks; ++from) {
    for (int to = 0; to < ranks; ++to)
      matrix[from][to] = (from + 2 * to) % 3 == 1 ? 0 : total / ranks + from * 5 + to;
  }
  return matrix;
}

constexpr DType kTypes[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kI8,
                            DType::kU8,  DType::kI32, DType::kI64};
constexpr ReduceOp kReductions[] = {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax};

class Operations : public ::testing::TestWithParam<std::tuple<int, std::string, Place>> {
 protected:
  void Run(const std::function<void(Checker&, Communicator&)>& body) {
    const auto& [size, transport, place] = GetParam();
    RunRanks(size, transport, [&, place = place](Communicator& group) {
      Checker checker(group, place);
      body(checker, group);
    });
  }
};

TEST_P(Operations, EqualTheReferenceForEveryTypeAndReduction) {
  Run([](Checker& checker, Communicator& group) {
    for (int64_t elements : {0, 1, 37, 1500, 9001}) {
      for (DType dtype : kTypes) {
        for (ReduceOp op : kReductions) {
          checker.AllReduce(elements, dtype, op, elements);
          checker.ReduceScatter(UnevenCounts(group.size(), elements), dtype, op, elements % 2 == 0, elements);
        }
        checker.AllGather(UnevenCounts(group.size(), elements), dtype, elements % 2 == 1, elements);
        checker.AllToAll(UnevenMatrix(group.size(), elements), dtype, elements);
        checker.Broadcast(elements, dtype, static_cast<int>(elements) % group.size(), elements);
      }
    }
  });
}

TEST_P(Operations, OfOneRootOfPairsAndOfChunksEqualTheReference) {
  Run([](Checker& checker, Communicator& group) {
    for (int64_t elements : {0, 1, 37, 9001, 70'001}) {
      const DType dtype = kTypes[elements % std::size(kTypes)];
      const int root = static_cast<int>(elements) % group.size();
      const bool in_place = elements % 2 == 0;
      checker.Reduce(elements, dtype, ReduceOp::kSum, root, in_place, elements);
      checker.Reduce(elements, DType::kI64, ReduceOp::kProduct, root, !in_place, elements);
      checker.Gather(UnevenCounts(group.size(), elements), dtype, root, in_place, elements);
      checker.Scatter(UnevenCounts(group.size(), elements), dtype, root, in_place, elements);
      checker.Exchange(elements, dtype, elements);
      checker.Sparse(elements, dtype, elements);
      checker.OutOfPlace(elements, dtype, ReduceOp::kMax, elements);
      checker.OutOfPlace(elements, DType::kI32, ReduceOp::kProduct, elements);
      if (elements > 0) checker.EvenAllToAll(elements, dtype, elements);
    }
  });
}

TEST_P(Operations, EqualTheReferenceWhenLarge) {
  Run([](Checker& checker, Communicator& group) {
    constexpr int64_t kElements = (8 << 20) / 4 + 3;
    checker.AllReduce(kElements, DType::kF32, ReduceOp::kSum, 1);
    checker.ReduceScatter(UnevenCounts(group.size(), kElements), DType::kF32, ReduceOp::kSum, true, 2);
    checker.ReduceScatter(UnevenCounts(group.size(), kElements), DType::kBF16, ReduceOp::kMax, false, 3);
    checker.AllGather(UnevenCounts(group.size(), kElements), DType::kF32, true, 4);
    checker.AllGather(UnevenCounts(group.size(), kElements), DType::kBF16, false, 5);
    checker.AllToAll(UnevenMatrix(group.size(), kElements), DType::kF32, 6);
    checker.Broadcast(kElements, DType::kF32, group.size() - 1, 7);
  });
}

std::string PlaceName(Place place) {
  return place == Place::kShared ? "shared" : place == Place::kPrivate ? "private" : "mixed";
}

INSTANTIATE_TEST_SUITE_P(All, Operations,
                         Combine(Values(1, 2, 3, 4, 8), Values("auto", "tcp"),
                                 Values(Place::kShared, Place::kPrivate, Place::kMixed)),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param), "_",
                                               PlaceName(std::get<2>(info.param)));
                         });

class Transports : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Transports, Values("auto", "tcp"), [](const auto& info) { return info.param; });

TEST_P(Transports, SumsOfRoundingDataAreBitIdenticalOnAllRanks) {
  constexpr int kRanks = 3;
  constexpr int64_t kElements = 100'003;
  for (Order order : {Order::kFast, Order::kFixed}) {
    std::vector<std::vector<float>> results(kRanks);
    RunRanks(kRanks, GetParam(), [&](Communicator& group) {
      const Tensor data = *group.Allocate({kElements}, DType::kF32);
      std::mt19937 random(group.index());
      std::normal_distribution<float> normal;
      for (float& x : data.span<float>()) x = normal(random);
      ASSERT_TRUE(group.AllReduce(data, data, ReduceOp::kSum, {.order = order}).Await().ok());
      results[group.index()].assign(data.data<float>(), data.data<float>() + kElements);
    });
    for (int rank = 1; rank < kRanks; ++rank) {
      EXPECT_EQ(0, std::memcmp(results[0].data(), results[rank].data(), kElements * sizeof(float))) << rank;
    }
    if (order == Order::kFast) continue;
    // Index order: ((a + b) + c).
    std::vector<std::mt19937> randoms = {std::mt19937(0), std::mt19937(1), std::mt19937(2)};
    std::vector<std::normal_distribution<float>> normals(kRanks);
    for (int64_t i = 0; i < kElements; ++i) {
      float sum = normals[0](randoms[0]);
      sum += normals[1](randoms[1]);
      sum += normals[2](randoms[2]);
      ASSERT_EQ(sum, results[0][i]) << i;
    }
  }
}

// Past the points where ranks exchange what they observed, with operations whose best algorithm is not certain.
TEST_P(Transports, ResultsStayRightWhileAlgorithmsAreTried) {
  constexpr int kRanks = 5;
  RunRanks(kRanks, GetParam(), [&](Communicator& group) {
    for (int64_t elements : {2'000, 20'000}) {
      const Tensor data = Zeros({elements}, DType::kF32);
      for (int i = 0; i < 300; ++i) {
        std::fill_n(data.data<float>(), elements, static_cast<float>(group.index() + i));
        ASSERT_EQ(group.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
        const float sum = kRanks * (kRanks - 1) / 2 + kRanks * i;
        ASSERT_TRUE(std::all_of(data.data<float>(), data.data<float>() + elements, [&](float x) { return x == sum; }));
      }
    }
    const std::vector<TuningRow> rows = Tuning(group);
    ASSERT_FALSE(rows.empty());
    for (const TuningRow& row : rows) EXPECT_GT(row.observed_ns, 0) << row.algorithm;
  });
}

TEST_P(Transports, APieceOfAnAlgorithmMayBeForced) {
  RunRanks(3, GetParam(), [&](Communicator& group) {
    const Tensor data = Zeros({10'000}, DType::kF32);
    std::fill_n(data.data<float>(), 10'000, 1.0f);
    EXPECT_EQ(group.AllReduce(data, data, ReduceOp::kSum, {.algorithm = "ring:4096"}).Await().ToString(), "OK");
    EXPECT_EQ(data.data<float>()[9'999], 3.0f);
    EXPECT_TRUE(absl::IsInvalidArgument(group.AllReduce(data, data, ReduceOp::kSum, {.algorithm = "ring:x"}).Await()));
  });
}

TEST_P(Transports, AveragesDivideInThePrecisionOfTheSum) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    const Tensor floats = Zeros({1000}, DType::kF32), ints = Zeros({1000}, DType::kI32);
    std::fill_n(floats.data<float>(), 1000, static_cast<float>(group.index() * 2));
    std::fill_n(ints.data<int32_t>(), 1000, -group.index() - 1);
    EXPECT_EQ(group.AllReduce(floats, floats, ReduceOp::kAverage, {}).Await().ToString(), "OK");
    EXPECT_EQ(group.AllReduce(ints, ints, ReduceOp::kAverage, {}).Await().ToString(), "OK");
    EXPECT_EQ(floats.data<float>()[999], 2.0f);
    EXPECT_EQ(ints.data<int32_t>()[999], -2);
  });
}

TEST_P(Transports, WireFormatsGiveEqualBitsOnAllRanksAndSmallErrors) {
  constexpr int kRanks = 3;
  constexpr int64_t kElements = 100'003;
  for (WireFormat wire : {WireFormat::kBf16, WireFormat::kInt8, WireFormat::kFp8}) {
    std::vector<std::vector<float>> results(kRanks), inputs(kRanks);
    RunRanks(kRanks, GetParam(), [&](Communicator& group) {
      const Tensor data = *group.Allocate({kElements}, DType::kF32), out = *group.Allocate({kElements}, DType::kF32);
      std::mt19937 random(group.index());
      std::normal_distribution<float> normal;
      for (float& x : data.span<float>()) x = normal(random);
      ASSERT_EQ(group.AllReduce(data, out, ReduceOp::kSum, {.wire = wire}).Await().ToString(), "OK");
      inputs[group.index()].assign(data.data<float>(), data.data<float>() + kElements);
      results[group.index()].assign(out.data<float>(), out.data<float>() + kElements);
    });
    for (int64_t i = 0; i < kElements; ++i) {
      ASSERT_NEAR(results[0][i], inputs[0][i] + inputs[1][i] + inputs[2][i], 1.5) << i;
      for (int rank = 1; rank < kRanks; ++rank) ASSERT_EQ(results[0][i], results[rank][i]) << i;
    }
  }
}

TEST_P(Transports, AFixedOrderRepeatsItsBits) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    constexpr int64_t kElements = 50'000;
    const Tensor in = Zeros({kElements}, DType::kF32), first = Zeros({kElements}, DType::kF32),
                 again = Zeros({kElements}, DType::kF32);
    std::mt19937 random(group.index());
    std::normal_distribution<float> normal;
    for (float& x : in.span<float>()) x = normal(random);
    const OpOptions fixed = {.order = Order::kFixed};
    ASSERT_TRUE(group.AllReduce(in, first, ReduceOp::kSum, fixed).Await().ok());
    for (int i = 0; i < 5; ++i) {
      ASSERT_TRUE(group.AllReduce(in, again, ReduceOp::kSum, fixed).Await().ok());
      ASSERT_EQ(std::memcmp(first.raw(), again.raw(), first.bytes()), 0);
    }
  });
}

TEST_P(Transports, ManyOperationsInFlightEndInOrder) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    constexpr int kOperations = 200;
    std::vector<Tensor> tensors;
    std::vector<Work> works;
    for (int i = 0; i < kOperations; ++i) {
      tensors.push_back(*group.Allocate({i * 11}, DType::kI64));
      std::fill_n(tensors[i].data<int64_t>(), i * 11, group.index() + i);
      works.push_back(group.AllReduce(tensors[i], tensors[i], ReduceOp::kSum, {}));
    }
    for (int i = kOperations - 1; i >= 0; --i) {
      ASSERT_EQ(works[i].Await().ToString(), "OK");
      for (int64_t value : tensors[i].span<int64_t>()) ASSERT_EQ(value, 3 * i + 3);
      for (int before = 0; before < i; ++before) ASSERT_TRUE(works[before].Done());
      if (i % 50 != 0) works.resize(i);
    }
  });
}

TEST_P(Transports, GroupsRunIndependentlyFromDifferentThreads) {
  RunRanks(4, GetParam(), [](Communicator& world) {
    const int me = world.index();
    const std::vector<int> pair = me < 2 ? std::vector<int>{0, 1} : std::vector<int>{2, 3};
    const std::vector<int> stripe = {me % 2, me % 2 + 2};
    std::unique_ptr<Communicator> pairs = *world.Split(pair);
    std::unique_ptr<Communicator> stripes = *world.Split(stripe);
    std::unique_ptr<Communicator> again = *world.Split(stripe);
    EXPECT_EQ(pairs->size(), 2);
    EXPECT_EQ(pairs->index(), me % 2);
    const auto work = [](Communicator* group, Place place, uint64_t seed) {
      Checker checker(*group, place);
      for (int i = 0; i < 40; ++i) {
        checker.AllReduce(i * 997, DType::kF32, ReduceOp::kSum, seed + i);
        checker.AllGather(UnevenCounts(group->size(), i * 500), DType::kI32, true, seed + i);
        checker.AllToAll(UnevenMatrix(group->size(), i * 300), DType::kBF16, seed + i);
      }
    };
    std::thread a(work, pairs.get(), Place::kShared, 1 + me / 2 * 1000);
    std::thread b(work, stripes.get(), Place::kPrivate, 2 + me % 2 * 1000);
    std::thread c(work, again.get(), Place::kMixed, 3 + me % 2 * 1000);
    work(&world, Place::kShared, 4);
    a.join();
    b.join();
    c.join();
  });
}

TEST_P(Transports, DifferentGroupsInDifferentOrderDoNotBlockEachOther) {
  RunRanks(2, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> other = *world.Split({0, 1});
    constexpr int64_t kElements = 1 << 20;
    const Tensor a = Zeros({kElements}, DType::kF32), b = Zeros({kElements}, DType::kF32);
    std::fill_n(a.data<float>(), kElements, 1.0f);
    std::fill_n(b.data<float>(), kElements, 2.0f);
    Communicator* first = world.index() == 0 ? &world : other.get();
    Communicator* second = world.index() == 0 ? other.get() : &world;
    const Work one = first->AllReduce(world.index() == 0 ? a : b, world.index() == 0 ? a : b, ReduceOp::kSum, {});
    const Work two = second->AllReduce(world.index() == 0 ? b : a, world.index() == 0 ? b : a, ReduceOp::kSum, {});
    EXPECT_EQ(two.Await().ToString(), "OK");
    EXPECT_EQ(one.Await().ToString(), "OK");
    EXPECT_EQ(a.data<float>()[kElements - 1], 2.0f);
    EXPECT_EQ(b.data<float>()[0], 4.0f);
  });
}

TEST_P(Transports, AGroupOfOneInsideALargerJobIsLocal) {
  RunRanks(2, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> self = *world.Split({world.index()});
    Checker checker(*self, Place::kShared);
    checker.AllReduce(1000, DType::kF32, ReduceOp::kSum, 1);
    checker.AllGather({1000}, DType::kF32, false, 1);
  });
}

// The same sequence of operations on every rank, from one seed. SHOAL_TEST_SEED replays.
TEST_P(Transports, RandomSequencesEqualTheReference) {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  SCOPED_TRACE(absl::StrCat("SHOAL_TEST_SEED=", seed));
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  const int size = 2 + static_cast<int>(seed % 3);
  RunRanks(size, GetParam(), [&](Communicator& group) {
    std::mt19937_64 random(seed);
    for (int i = 0; i < 150; ++i) {
      Checker checker(group, static_cast<Place>(random() % 3));
      const DType dtype = kTypes[random() % std::size(kTypes)];
      const ReduceOp op = kReductions[random() % 3];
      const int64_t scale = int64_t{1} << random() % 18;
      const bool in_place = random() % 2 == 0;
      std::vector<int64_t> counts(size);
      for (int64_t& count : counts) count = random() % 4 == 0 ? 0 : random() % scale;
      std::vector<std::vector<int64_t>> matrix(size, counts);
      for (auto& row : matrix) std::shuffle(row.begin(), row.end(), random);
      const uint64_t values = random();
      switch (random() % 6) {
        case 0:
          checker.AllReduce(counts[0], dtype, op, values);
          break;
        case 1:
          checker.ReduceScatter(counts, dtype, op, in_place, values);
          break;
        case 2:
          checker.AllGather(counts, dtype, in_place, values);
          break;
        case 3:
          checker.AllToAll(matrix, dtype, values);
          break;
        case 4:
          checker.Broadcast(counts[0], dtype, static_cast<int>(values % size), values);
          break;
        case 5:
          EXPECT_TRUE(group.Barrier({}).Await().ok());
          break;
      }
      if (::testing::Test::HasFailure()) return;
    }
  });
}

TEST_P(Transports, BadArgumentsEndTheWorkAndNotTheEpoch) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor four = Zeros({4}, DType::kF32), two = Zeros({2}, DType::kF32),
                 ints = Zeros({2}, DType::kI32);
    const std::vector<Work> bad = {
        group.ReduceScatter(four, {2, 1}, two, ReduceOp::kSum, {}),
        group.ReduceScatter(four, {2, 2}, ints, ReduceOp::kSum, {}),
        group.ReduceScatter(four, {2, 2}, four.Elements(1, {2}), ReduceOp::kSum, {}),
        group.AllGather(two, {2, 2, 0}, four, {}),
        group.AllGather(two, {6, -2}, four, {}),
        group.AllGather(four.Elements(1, {2}), {2, 2}, four, {}),
        group.AllToAll(four, {2, 2}, four, {2, 2}, {}),
        group.Broadcast(four, 2, {}),
        group.AllReduce(four, two, ReduceOp::kSum, {}),
        group.AllReduce(four.Elements(0, {3}), four.Elements(1, {3}), ReduceOp::kSum, {}),
        group.AllReduce(ints, ints, ReduceOp::kSum, {.wire = WireFormat::kInt8}),
        group.AllReduce(four, four, ReduceOp::kSum, {.algorithm = "no such"}),
        group.AllReduce(four, four, ReduceOp::kSum, {.wire = WireFormat::kBf16, .algorithm = "fused"}),
        group.Reduce(four, four, -1, ReduceOp::kSum, {}),
        group.Gather(two, {1, 1}, four, 0, {}),
        group.Scatter(four, {3, 3}, two, 0, {}),
        group.Send(four, group.index(), 0, {}),
        group.Receive(four, 2, 0, {}),
        group.SparseAllGather({four}, {{0, 0, {0}}}, {}),
        group.SparseAllGather({four}, {{1, 0, {1}}}, {}),
    };
    for (const Work& work : bad) EXPECT_TRUE(absl::IsInvalidArgument(work.Await())) << work.Await();
    // Needs memory that peers can write to.
    const absl::Status fused = group.AllReduce(four, four, ReduceOp::kSum, {.algorithm = "fused"}).Await();
    EXPECT_TRUE(GetParam() == "tcp" ? absl::IsInvalidArgument(fused) : fused.ok()) << fused;
    EXPECT_FALSE(group.Split({1, 0}).ok());
    EXPECT_FALSE(group.Split({1 - group.index()}).ok());
    EXPECT_TRUE(group.status().ok());
    EXPECT_EQ(group.Barrier({}).Await().ToString(), "OK");
  });
}

TEST_P(Transports, DifferentOperationsEndTheEpochAndNameBoth) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({8}, DType::kF32);
    const absl::Status status = group.index() == 0
                                    ? group.AllReduce(data, data, ReduceOp::kSum, {.label = "grads"}).Await()
                                    : group.Broadcast(data, 0, {.label = "weights"}).Await();
    EXPECT_TRUE(absl::IsAborted(status)) << status;
    EXPECT_THAT(std::string(group.status().message()), HasSubstr("all_reduce"));
    EXPECT_THAT(std::string(group.status().message()), HasSubstr("broadcast"));
  });
}

TEST_P(Transports, AnEarlyDeadlineOfAwaitLeavesTheOperationRunning) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    std::unique_ptr<Communicator> side = *group.Split({0, 1});
    if (group.index() == 0) {
      const Work work = group.Barrier({});
      EXPECT_TRUE(absl::IsDeadlineExceeded(work.Await(absl::Now() + absl::Milliseconds(20))));
      EXPECT_FALSE(work.Done());
      EXPECT_TRUE(side->Barrier({}).Await().ok());  // Only now the other one comes.
      EXPECT_TRUE(work.Await().ok());
    } else {
      EXPECT_TRUE(side->Barrier({}).Await().ok());
      EXPECT_TRUE(group.Barrier({}).Await().ok());
    }
  });
}

TEST_P(Transports, CallbacksRunOnceAndMayIssueMore) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({100}, DType::kF32);
    std::fill_n(data.data<float>(), 100, 1.0f);
    std::atomic<int> calls{0};
    Work second;
    Mutex mutex;
    CondVar done;
    group.AllReduce(data, data, ReduceOp::kSum, {}).OnDone([&](const absl::Status& status) {
      EXPECT_TRUE(status.ok());
      group.AllReduce(data, data, ReduceOp::kSum, {}).OnDone([&](const absl::Status& again) {
        EXPECT_TRUE(again.ok());
        MutexLock lock(&mutex);
        ++calls;
        done.NotifyAll();
      });
    });
    MutexLock lock(&mutex);
    while (calls == 0) done.Wait(&mutex);
    EXPECT_EQ(data.data<float>()[99], 4.0f);
  });
}

TEST(Allocate, TooMuchIsResourceExhaustedAndSaysHowMuch) {
  RunRanks(2, "auto", [](Communicator& group) {
    const absl::StatusOr<Tensor> tensor = group.Allocate({int64_t{1} << 43}, DType::kF32);
    EXPECT_TRUE(absl::IsResourceExhausted(tensor.status())) << tensor.status();
    EXPECT_THAT(std::string(tensor.status().message()), HasSubstr("35184372088832"));
    EXPECT_TRUE(group.Barrier({}).Await().ok());
  });
}

TEST(Allocate, MemoryIsZeroedAndOutlivesTheCommunicator) {
  std::vector<Tensor> kept(2);
  RunRanks(2, "auto", [&](Communicator& group) {
    for (int64_t elements : {0, 1, 1000, 1 << 20}) {
      const Tensor tensor = *group.Allocate({elements}, DType::kI64);
      for (int64_t value : tensor.span<int64_t>()) ASSERT_EQ(value, 0);
      kept[group.index()] = tensor;
    }
    std::fill_n(kept[group.index()].data<int64_t>(), 1 << 20, 7);
    EXPECT_TRUE(group.Barrier({}).Await().ok());
  });
  for (const Tensor& tensor : kept) {
    EXPECT_EQ(tensor.data<int64_t>()[0] + tensor.data<int64_t>()[(1 << 20) - 1], 14);
  }
}

// More than the descriptors that a process may have at a time would ever allow if they leaked.
TEST(Allocate, MemoryIsGivenBackHereAndAtThePeers) {
  RunRanks(2, "auto", [](Communicator& group) {
    for (int i = 0; i < 1500; ++i) {
      const Tensor tensor = *group.Allocate({100'000}, DType::kF32);
      tensor.data<float>()[99'999] = 1.0f;
      ASSERT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await().ToString(), "OK");
      ASSERT_EQ(tensor.data<float>()[99'999], 2.0f);
    }
  });
}

TEST(Split, GroupsMayComeAndGoManyTimes) {
  RunRanks(3, "auto", [](Communicator& world) {
    for (int i = 0; i < 400; ++i) {
      std::unique_ptr<Communicator> group = *world.Split({0, 1, 2});
      if (i % 7 == 0) {
        ASSERT_TRUE(group->Barrier({}).Await().ok());
      }
    }
  });
}

}  // namespace
}  // namespace shoal
