// Kernels that move the rows of tokens: embedding.h, permute.h and the order of rows by expert.
#include <algorithm>
#include <numeric>
#include <utility>

#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/router.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

TEST(CudaEmbedding, LooksUpRows) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const auto& [T, V, D] : {std::tuple(0, 3, 8), {1, 1, 1}, {20, 5, 33}, {300, 7, 64}, {41, 256, 1028}}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const Tensor table = Random({V, D}, dtype, 1), ids = RandomIds({T}, V, 2), want = Empty({T, D}, DType::kF32);
      ref::Embedding(table, ids, want, cpu);
      for (const bool odd : {false, true}) {
        const Tensor out = Empty({T, D}, DType::kF32, *stream);
        Embedding(odd ? ToOddAddress(table, *stream) : ToDevice(table, *stream), ToDevice(ids, *stream), out, *stream);
        ExpectSameBits(ToHost(out, *stream), want, "out");
      }
    }
  }
}

void ExpectEmbeddingBackwardMatches(const Tensor& ids, int64_t V, int64_t D, bool odd) {
  SCOPED_TRACE(ShapeString({ids.dim(0), V, D}));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor dout = Random({ids.dim(0), D}, DType::kF32, 1), before = Random({V, D}, DType::kF32, 3), want = Copy(before);
  // In f32 the reference rounds after each token, so that the order decides the bits.
  ref::EmbeddingBackward(dout, ids, want, cpu);
  const Tensor dtable = odd ? ToOddAddress(before, *stream) : ToDevice(before, *stream);
  EmbeddingBackward(ToDevice(dout, *stream), ToDevice(ids, *stream), dtable, *stream);
  ExpectSameBits(ToHost(dtable, *stream), want, "dtable");
}

TEST(CudaEmbeddingBackward, AddsTokensInAscendingOrder) {
  for (const auto& [T, V, D] : {std::tuple(0, 3, 8), {1, 1, 1}, {33, 2, 17}, {300, 7, 132}, {700, 1500, 4}, {2500, 3, 1}}) {
    ExpectEmbeddingBackwardMatches(RandomIds({T}, V, 2), V, D, /*odd=*/D == 132);
  }
  // One id has most tokens, and ids need digits of every size.
  const Tensor ids = RandomIds({600}, 5000, 2);
  for (int64_t i = 0; i < 600; ++i) ids.data<int32_t>()[i] = i % 3 == 0 ? ids.data<int32_t>()[i] : 4999;
  ExpectEmbeddingBackwardMatches(ids, 5000, 8, /*odd=*/false);
  for (int64_t i = 0; i < 600; ++i) ids.data<int32_t>()[i] = static_cast<int32_t>(i * 7919 % (1 << 21));
  ExpectEmbeddingBackwardMatches(ids, 1 << 21, 1, /*odd=*/false);
}

struct Case {
  int64_t T, D, K;
};
const Case kCases[] = {{0, 8, 2}, {1, 1, 1}, {5, 16, 2}, {7, 33, 3}, {9, 100, 1}, {40, 257, 2}, {11, 520, 9}};

TEST(CudaGatherRows, CopiesRows) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const Case& c : kCases) {
    for (const DType act : {DType::kF32, DType::kBF16}) {
      for (const bool odd : {false, true}) {
        const Pairs pairs = RandomPairs(c.T, c.K, /*ragged=*/true);
        const Tensor x = Random({c.T, c.D}, act, 1), want = Empty({pairs.rows, c.D}, act), rows = Empty({pairs.rows, c.D}, act, *stream);
        ref::GatherRows(x, pairs.token, want, cpu);
        GatherRows(odd ? ToOddAddress(x, *stream) : ToDevice(x, *stream), ToDevice(pairs.token, *stream), rows, *stream);
        ExpectSameBits(ToHost(rows, *stream), want, "rows");
      }
    }
  }
}

void ExpectSumSlotsMatches(const Case& c, bool ragged, DType from, DType to) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor drows = Random({pairs.rows, c.D}, from, 1), want = Empty({c.T, c.D}, DType::kF64), dx = Empty({c.T, c.D}, to, *stream);
  ref::SumSlots(drows, pairs.offset, pairs.slot, want, cpu);
  SumSlots(ToDevice(drows, *stream), ToDevice(pairs.offset, *stream), ToDevice(pairs.slot, *stream), dx, *stream);
  const double terms = static_cast<double>(2 * c.K);
  ExpectNear(ToHost(dx, *stream), want, Roundoff(to), terms * 0x1p-24 * terms * MaxAbs(drows), "dx");
}

TEST(CudaSumSlots, MatchesReference) {
  for (const Case& c : kCases) {
    for (const bool ragged : {false, true}) {
      for (const DType from : {DType::kF32, DType::kBF16}) {
        for (const DType to : {DType::kF32, DType::kBF16}) ExpectSumSlotsMatches(c, ragged, from, to);
      }
    }
  }
}

void ExpectCombineMatches(const Case& c, bool ragged, DType act, bool in_place) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor residual = Random({c.T, c.D}, DType::kF32, 1), y = Random({pairs.rows, c.D}, act, 2);
  const Tensor weight = Random({pairs.pairs}, DType::kF32, 3), want = Empty({c.T, c.D}, DType::kF64);
  ref::CombineSlots(residual, y, pairs.offset, pairs.slot, weight, want, cpu);
  const double terms = static_cast<double>(2 * c.K), size = MaxAbs(residual) + terms * MaxAbs(y) * MaxAbs(weight);
  const Tensor input = ToDevice(residual, *stream), out = in_place ? input : Empty({c.T, c.D}, DType::kF32, *stream);
  CombineSlots(input, ToDevice(y, *stream), ToDevice(pairs.offset, *stream), ToDevice(pairs.slot, *stream), ToDevice(weight, *stream), out,
               *stream);
  ExpectNear(ToHost(out, *stream), want, 0, 0x1p-24 * 2 * terms * size, "out");
}

void ExpectCombineBackwardMatches(const Case& c, bool ragged, DType act, bool in_place) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor dout = Random({c.T, c.D}, DType::kF32, 1), y = Random({pairs.rows, c.D}, act, 2);
  const Tensor weight = Random({pairs.pairs}, DType::kF32, 3);
  // Rows of no pair stay as they are.
  const Tensor want_dy = As(y, DType::kF64), want_dweight = Empty({pairs.pairs}, DType::kF64);
  ref::CombineSlotsBackward(dout, y, pairs.offset, pairs.slot, weight, want_dy, want_dweight, cpu);
  const Tensor input = ToDevice(y, *stream), dy = in_place ? input : ToDevice(y, *stream);
  const Tensor dweight = Empty({pairs.pairs}, DType::kF32, *stream);
  CombineSlotsBackward(ToDevice(dout, *stream), input, ToDevice(pairs.offset, *stream), ToDevice(pairs.slot, *stream),
                       ToDevice(weight, *stream), dy, dweight, *stream);
  const double size = static_cast<double>(c.D) * MaxAbs(dout) * MaxAbs(y);
  ExpectNear(ToHost(dy, *stream), want_dy, 0x1p-24 + Roundoff(act), 0, "dy");
  ExpectNear(ToHost(dweight, *stream), want_dweight, 0, 0x1p-24 * (static_cast<double>(c.D) / 16 + 8) * size, "dweight");
}

TEST(CudaCombineSlots, MatchesReferenceForwardAndBackward) {
  for (const Case& c : kCases) {
    for (const DType act : {DType::kF32, DType::kBF16}) {
      for (const bool ragged : {false, true}) {
        for (const bool in_place : {false, true}) {
          ExpectCombineMatches(c, ragged, act, in_place);
          ExpectCombineBackwardMatches(c, ragged, act, in_place);
        }
      }
    }
  }
  // Beyond what waits in shared memory.
  ExpectCombineBackwardMatches({2, 26000, 2}, /*ragged=*/true, DType::kBF16, /*in_place=*/true);
}

TEST(CudaCombineSlots, ATokenWithoutPairsKeepsItsResidual) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor offset = ToDevice(Zeros({3}, DType::kI32), *stream), none = Empty({0}, DType::kI32);
  const Tensor residual = Random({2, 8}, DType::kF32, 1), out = Empty({2, 8}, DType::kF32, *stream);
  const Tensor dx = Empty({2, 8}, DType::kF32, *stream);
  CombineSlots(ToDevice(residual, *stream), Empty({0, 8}, DType::kF32), offset, none, Empty({0}, DType::kF32), out, *stream);
  ExpectSameBits(ToHost(out, *stream), residual, "out");
  SumSlots(Empty({0, 8}, DType::kF32), offset, none, dx, *stream);
  ExpectSameBits(ToHost(dx, *stream), Zeros({2, 8}, DType::kF32), "dx");
}

// chosen [T, K] of E experts, `favour` of them with most tokens.
void ExpectOrderIsStable(int64_t T, int64_t K, int64_t E, int64_t favour, Stream& stream) {
  SCOPED_TRACE(ShapeString({T, K, E}));
  std::mt19937_64 random(5);
  const Tensor chosen = Empty({T, K}, DType::kI32);
  std::vector<int32_t> want_count(static_cast<size_t>(E)), want_first(static_cast<size_t>(E) + 1);
  for (int32_t& expert : chosen.span<int32_t>()) {
    const int64_t limit = favour > 0 && random() % 4 != 0 ? favour : E;
    expert = static_cast<int32_t>(random() % static_cast<uint64_t>(limit));
    ++want_count[static_cast<size_t>(expert)];
  }
  std::partial_sum(want_count.begin(), want_count.end(), want_first.begin() + 1);
  const auto i32 = [&](Shape shape) { return Empty(std::move(shape), DType::kI32, stream); };
  const Tensor offset = i32({T + 1}), segments = i32({E, 3}), slot = i32({T * K}), token = i32({T * K});
  OrderByExpert(Upload(chosen, stream), TallyOf(chosen, E, /*pieces=*/1, stream), offset, segments, slot, token, {}, stream);
  const auto host = [&](const Tensor& tensor) {
    const Tensor copy = ToHost(tensor, stream);
    return std::vector<int32_t>(copy.span<int32_t>().begin(), copy.span<int32_t>().end());
  };
  const std::vector<int32_t> offsets = host(offset), segment = host(segments);
  for (int64_t t = 0; t <= T; ++t) ASSERT_EQ(offsets[static_cast<size_t>(t)], t * K);
  for (size_t e = 0; e < want_count.size(); ++e) {
    ASSERT_EQ(segment[3 * e], static_cast<int32_t>(e));
    ASSERT_EQ(segment[3 * e + 1], want_first[e]);
    ASSERT_EQ(segment[3 * e + 2], want_count[e]);
  }
  const std::vector<int32_t> slots = host(slot), tokens = host(token);
  std::vector<int32_t> next = want_first;
  for (size_t pair = 0; pair < slots.size(); ++pair) {
    const int32_t place = next[static_cast<size_t>(chosen.data<int32_t>()[pair])]++;
    ASSERT_EQ(slots[pair], place) << pair;
    ASSERT_EQ(tokens[static_cast<size_t>(place)], static_cast<int32_t>(pair) / static_cast<int32_t>(K)) << pair;
  }
}

TEST(CudaOrderByExpert, IsByExpertThenByTokenAsOnTheCpu) {
  const std::unique_ptr<Stream> device = TestStream();
  Stream cpu;
  for (Stream* stream : {device.get(), &cpu}) {
    ExpectOrderIsStable(0, 2, 8, 0, *stream);
    ExpectOrderIsStable(1, 1, 1, 0, *stream);
    ExpectOrderIsStable(33, 3, 5, 0, *stream);
    ExpectOrderIsStable(700, 8, 64, 3, *stream);
    ExpectOrderIsStable(5000, 2, 8, 1, *stream);
    ExpectOrderIsStable(600, 4, 512, 0, *stream);
    ExpectOrderIsStable(300, 2, 3000, 10, *stream);  // Fewer warps per block, because each counts every expert.
  }
}

// Pairs of pieces and experts in runs of random lengths, which lie in a random order.
void ExpectOrderIsByShares(int64_t T, int64_t K, int64_t E, int pieces, Stream& stream) {
  constexpr uint64_t kSeed = 11;
  SCOPED_TRACE(ShapeString({T, K, E, pieces}) + " seed " + std::to_string(kSeed));
  std::mt19937_64 random(kSeed);
  const Tensor chosen = Empty({T, K}, DType::kI32);
  for (int32_t& expert : chosen.span<int32_t>()) expert = static_cast<int32_t>(random() % static_cast<uint64_t>(E));
  // The pairs of each piece and expert, in order.
  std::vector<std::vector<int64_t>> pairs(static_cast<size_t>(pieces * E));
  int64_t pair = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = pair + (T / pieces + (piece < T % pieces ? 1 : 0)) * K;
    for (; pair < end; ++pair) pairs[static_cast<size_t>(piece * E + chosen.data<int32_t>()[pair])].push_back(pair);
  }
  struct Share {
    size_t bucket, begin, end;
    int32_t row;
  };
  std::vector<Share> shares;
  for (size_t bucket = 0; bucket < pairs.size(); ++bucket) {
    for (size_t begin = 0, end = 0; begin < pairs[bucket].size(); begin = end) {
      end = begin + 1 + random() % (pairs[bucket].size() - begin);
      shares.push_back({bucket, begin, end, 0});
    }
  }
  std::vector<size_t> order(shares.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  int32_t rows = 0;
  for (const size_t at : order) shares[at].row = std::exchange(rows, rows + static_cast<int32_t>(shares[at].end - shares[at].begin));
  std::vector<int32_t> list(pairs.size() + 1), want_slot(static_cast<size_t>(T * K)), want_token(want_slot.size());
  for (const Share& share : shares) {
    ++list[share.bucket + 1];
    for (size_t i = share.begin; i < share.end; ++i) {
      const size_t row = static_cast<size_t>(share.row) + i - share.begin, of = static_cast<size_t>(pairs[share.bucket][i]);
      want_slot[of] = static_cast<int32_t>(row);
      want_token[row] = static_cast<int32_t>(of / static_cast<size_t>(K));
    }
  }
  std::partial_sum(list.begin(), list.end(), list.begin());
  for (const Share& share : shares) {
    list.insert(list.end(), {static_cast<int32_t>(share.end), share.row - static_cast<int32_t>(share.begin)});
  }
  const Tensor uploaded = Empty({static_cast<int64_t>(list.size())}, DType::kI32);
  std::copy(list.begin(), list.end(), uploaded.data<int32_t>());
  const auto i32 = [&](Shape shape) { return Empty(std::move(shape), DType::kI32, stream); };
  const Tensor offset = i32({T + 1}), slot = i32({T * K}), token = i32({T * K});
  OrderByShares(Upload(chosen, stream), TallyOf(chosen, E, pieces, stream), Upload(uploaded, stream), offset, slot, token, stream);
  const Tensor offsets = ToHost(offset, stream), slots = ToHost(slot, stream), tokens = ToHost(token, stream);
  for (int64_t t = 0; t <= T; ++t) ASSERT_EQ(offsets.data<int32_t>()[t], t * K);
  for (size_t i = 0; i < want_slot.size(); ++i) {
    ASSERT_EQ(slots.data<int32_t>()[i], want_slot[i]) << i;
    ASSERT_EQ(tokens.data<int32_t>()[i], want_token[i]) << i;
  }
}

TEST(CudaOrderByShares, IsByPieceAndExpertWhereverSharesLie) {
  const std::unique_ptr<Stream> device = TestStream();
  Stream cpu;
  for (Stream* stream : {device.get(), &cpu}) {
    ExpectOrderIsByShares(0, 2, 8, 1, *stream);
    ExpectOrderIsByShares(1, 1, 1, 3, *stream);
    ExpectOrderIsByShares(33, 3, 5, 2, *stream);
    ExpectOrderIsByShares(700, 8, 64, 6, *stream);
    ExpectOrderIsByShares(5000, 2, 8, 1, *stream);
    ExpectOrderIsByShares(300, 2, 2000, 4, *stream);
  }
}

}  // namespace
}  // namespace shoal::kernels
