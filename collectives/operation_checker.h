// A serial reference for the operations of a communicator, for tests.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "runtime/base/check.h"

namespace shoal {

// A deterministic value in [-8, 8] that differs between ranks and elements; halves, so that sums of a few are
// exact in every floating-point type.
inline int64_t Halves(uint64_t seed, int rank, int64_t i) {
  uint64_t x = seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(rank) * 0xbf58476d1ce4e5b9u +
               static_cast<uint64_t>(i);
  x ^= x >> 31;
  x *= 0x94d049bb133111ebu;
  x ^= x >> 29;
  return static_cast<int64_t>(x % 33) - 16;
}

inline void SetElement(const Tensor& tensor, int64_t i, int64_t halves) {
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

inline int64_t GetElement(const Tensor& tensor, int64_t i) {
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
inline int64_t Wrap(DType dtype, int64_t value) {
  if (dtype == DType::kI8) return static_cast<int8_t>(value);
  if (dtype == DType::kU8) return static_cast<uint8_t>(value);
  if (dtype == DType::kI32) return static_cast<int32_t>(value);
  return value;
}

inline int64_t Reduced(DType dtype, ReduceOp op, uint64_t seed, int ranks, int64_t i) {
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

inline int64_t Sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

inline std::vector<int64_t> Begins(const std::vector<int64_t>& counts) {
  std::vector<int64_t> begins(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), begins.begin() + 1);
  return begins;
}

// The first element that is not as expected, or "".
inline std::string Differences(const Tensor& tensor, const std::function<int64_t(int64_t)>& expected) {
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

  // Awaited in the opposite order of their issue.
  void ManyInFlight(int count) {
    std::vector<Tensor> tensors;
    std::vector<Work> works;
    for (int i = 0; i < count; ++i) {
      tensors.push_back(Buffer(64, DType::kI64));
      for (int64_t& value : tensors.back().span<int64_t>()) value = i;
      works.push_back(group_.AllReduce(tensors.back(), tensors.back(), ReduceOp::kSum, {.label = "one of many"}));
    }
    for (size_t i = works.size(); i-- > 0;) {
      EXPECT_EQ(works[i].Await().ToString(), "OK");
      EXPECT_EQ(tensors[i].data<int64_t>()[63], static_cast<int64_t>(i) * group_.size());
    }
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
inline std::vector<int64_t> UnevenCounts(int ranks, int64_t total) {
  std::vector<int64_t> counts;
  for (int rank = 0; rank < ranks; ++rank) counts.push_back(rank == 1 ? 0 : total / ranks + rank * 7);
  return counts;
}

inline std::vector<std::vector<int64_t>> UnevenMatrix(int ranks, int64_t total) {
  std::vector<std::vector<int64_t>> matrix(ranks, std::vector<int64_t>(ranks));
  for (int from = 0; from < ranks; ++from) {
    for (int to = 0; to < ranks; ++to)
      matrix[from][to] = (from + 2 * to) % 3 == 1 ? 0 : total / ranks + from * 5 + to;
  }
  return matrix;
}

// Each kind of operation but sparse ones, once or more.
inline void CheckDenseOperations(Communicator& group, Place place, int64_t elements, DType dtype) {
  Checker checker(group, place);
  const int n = group.size(), root = static_cast<int>(elements) % n;
  for (const bool in_place : {false, true}) {
    for (const std::vector<int64_t>& counts : {std::vector<int64_t>(n, elements), UnevenCounts(n, elements)}) {
      checker.ReduceScatter(counts, dtype, ReduceOp::kSum, in_place, 1);
      checker.AllGather(counts, dtype, in_place, 2);
      checker.Gather(counts, dtype, root, in_place, 3);
      checker.Scatter(counts, dtype, root, in_place, 4);
    }
    checker.Reduce(elements, dtype, ReduceOp::kSum, root, in_place, 5);
  }
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) checker.AllReduce(elements, dtype, op, 6);
  checker.OutOfPlace(elements, dtype, ReduceOp::kSum, 7);
  checker.AllToAll(UnevenMatrix(n, elements), dtype, 8);
  checker.EvenAllToAll(elements, dtype, 9);
  checker.Broadcast(elements, dtype, root, 10);
  checker.Exchange(elements, dtype, 11);
}

// A member that closes a group ends what is pending on those that have issued it. Of three ranks.
inline void CheckClosingEndsWhatIsPending(Communicator& group) {
  auto part = group.Split({0, 1, 2});
  ASSERT_TRUE(part.ok()) << part.status();
  const Tensor tensor = *group.Allocate({64}, DType::kBF16);
  ASSERT_EQ((*part)->Barrier({}).Await(), absl::OkStatus());  // All have connected.
  Work work;
  if (group.index() != 1) work = (*part)->AllReduce(tensor, tensor, ReduceOp::kSum, {});
  if (group.index() == 0) part->reset();
  EXPECT_EQ(work.Await().code(), group.index() == 1 ? absl::StatusCode::kOk : absl::StatusCode::kAborted);
  if (group.index() == 1) part->reset();
  EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
}

}  // namespace shoal
