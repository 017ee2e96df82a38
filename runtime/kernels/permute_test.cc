#include "runtime/kernels/permute.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

struct Case {
  int64_t T, D, K;
};
const Case kCases[] = {{0, 8, 2}, {1, 1, 1}, {5, 16, 2}, {7, 33, 3}, {9, 100, 1}, {130, 257, 2}};

TEST(GatherRows, CopiesRows) {
  Stream stream;
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      const Pairs pairs = RandomPairs(c.T, c.K, /*ragged=*/true);
      const Tensor x = Random({c.T, c.D}, act, 1), want = Empty({pairs.rows, c.D}, act);
      ref::GatherRows(x, pairs.token, want, stream);
      SweepLevels(
          [&]() -> std::vector<Tensor> {
            const Tensor rows = Empty({pairs.rows, c.D}, act);
            GatherRows(x, pairs.token, rows, stream);
            return {rows};
          },
          [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], want, "rows"); });
    }
  }
}

void ExpectSumSlotsMatches(const Case& c, bool ragged, DType from, DType to) {
  Stream stream;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor drows = Random({pairs.rows, c.D}, from, 1), want = Empty({c.T, c.D}, DType::kF64);
  ref::SumSlots(drows, pairs.offset, pairs.slot, want, stream);
  const double terms = static_cast<double>(2 * c.K);
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor dx = Empty({c.T, c.D}, to);
        SumSlots(drows, pairs.offset, pairs.slot, dx, stream);
        return {dx};
      },
      [&](const std::vector<Tensor>& got) {
        ExpectNear(got[0], want, Roundoff(to), terms * 0x1p-24 * terms * MaxAbs(drows), "dx");
      });
}

TEST(SumSlots, MatchesReference) {
  for (const Case& c : kCases) {
    for (bool ragged : {false, true}) {
      ExpectSumSlotsMatches(c, ragged, DType::kF32, DType::kF32);
      ExpectSumSlotsMatches(c, ragged, DType::kBF16, DType::kBF16);
      ExpectSumSlotsMatches(c, ragged, DType::kBF16, DType::kF32);
    }
  }
}

void ExpectCombineMatches(const Case& c, bool ragged, DType act, bool in_place) {
  Stream stream;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor residual = Random({c.T, c.D}, DType::kF32, 1), y = Random({pairs.rows, c.D}, act, 2);
  const Tensor weight = Random({pairs.pairs}, DType::kF32, 3), want = Empty({c.T, c.D}, DType::kF64);
  ref::CombineSlots(residual, y, pairs.offset, pairs.slot, weight, want, stream);
  const double terms = static_cast<double>(2 * c.K), size = MaxAbs(residual) + terms * MaxAbs(y) * MaxAbs(weight);
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor input = Copy(residual), out = in_place ? input : Empty({c.T, c.D}, DType::kF32);
        CombineSlots(input, y, pairs.offset, pairs.slot, weight, out, stream);
        return {out};
      },
      [&](const std::vector<Tensor>& got) { ExpectNear(got[0], want, 0, 0x1p-24 * 2 * terms * size, "out"); });
}

TEST(CombineSlots, MatchesReference) {
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (bool ragged : {false, true}) {
        ExpectCombineMatches(c, ragged, act, /*in_place=*/false);
        ExpectCombineMatches(c, ragged, act, /*in_place=*/true);
      }
    }
  }
}

TEST(CombineSlots, ATokenWithoutPairsKeepsItsResidual) {
  Stream stream;
  const Tensor offset = Zeros({3}, DType::kI32), none = Empty({0}, DType::kI32);
  const Tensor residual = Random({2, 5}, DType::kF32, 1), out = Empty({2, 5}, DType::kF32), dx = Random({2, 5}, DType::kF32, 2);
  CombineSlots(residual, Empty({0, 5}, DType::kF32), offset, none, Empty({0}, DType::kF32), out, stream);
  ExpectSameBits(out, residual, "out");
  SumSlots(Empty({0, 5}, DType::kF32), offset, none, dx, stream);
  ExpectSameBits(dx, Zeros({2, 5}, DType::kF32), "dx");
}

void ExpectCombineBackwardMatches(const Case& c, bool ragged, DType act, bool in_place) {
  Stream stream;
  const Pairs pairs = RandomPairs(c.T, c.K, ragged);
  const Tensor dout = Random({c.T, c.D}, DType::kF32, 1), y = Random({pairs.rows, c.D}, act, 2);
  const Tensor weight = Random({pairs.pairs}, DType::kF32, 3);
  // Rows of no pair stay as they are.
  const Tensor want_dy = As(y, DType::kF64), want_dweight = Empty({pairs.pairs}, DType::kF64);
  ref::CombineSlotsBackward(dout, y, pairs.offset, pairs.slot, weight, want_dy, want_dweight, stream);
  const double size = static_cast<double>(c.D) * MaxAbs(dout) * MaxAbs(y);
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor input = Copy(y), dy = in_place ? input : Copy(y), dweight = Empty({pairs.pairs}, DType::kF32);
        CombineSlotsBackward(dout, input, pairs.offset, pairs.slot, weight, dy, dweight, stream);
        return {dy, dweight};
      },
      [&](const std::vector<Tensor>& got) {
        ExpectNear(got[0], want_dy, 0x1p-24 + Roundoff(act), 0, "dy");
        ExpectNear(got[1], want_dweight, 0, 0x1p-24 * (static_cast<double>(c.D) / 16 + 8) * size, "dweight");
      });
}

TEST(CombineSlotsBackward, MatchesReference) {
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (bool ragged : {false, true}) {
        ExpectCombineBackwardMatches(c, ragged, act, /*in_place=*/false);
        ExpectCombineBackwardMatches(c, ragged, act, /*in_place=*/true);
      }
    }
  }
}

TEST(PermuteDeathTest, RefusesWhatAreNoPairs) {
  Stream stream;
  const Tensor offset = Zeros({3}, DType::kI32), slot = Zeros({2}, DType::kI32), dx = Empty({2, 4}, DType::kF32);
  const Tensor drows = Random({2, 4}, DType::kF32, 1);
  offset.data<int32_t>()[1] = 3;
  offset.data<int32_t>()[2] = 2;
  EXPECT_DEATH(SumSlots(drows, offset, slot, dx, stream), "offset\\[1\\]");
  offset.data<int32_t>()[1] = offset.data<int32_t>()[2] = 1;
  EXPECT_DEATH(SumSlots(drows, offset, slot, dx, stream), "offsets from 0 to 1, want 0 to 2");
  offset.data<int32_t>()[2] = 2;
  slot.data<int32_t>()[1] = 2;
  EXPECT_DEATH(SumSlots(drows, offset, slot, dx, stream), "slot\\[1\\] is 2");
}

TEST(Permute, ReferenceGradientsMatchFiniteDifferences) {
  Stream stream;
  const int64_t T = 4, D = 3;
  const Pairs pairs = RandomPairs(T, 2, /*ragged=*/true);
  // Rows of no pair take no part.
  const Tensor x = Random({T, D}, DType::kF64, 1), drows = Zeros({pairs.rows, D}, DType::kF64);
  for (int64_t i = 0; i < pairs.pairs * D; ++i) {
    Set(drows, ref::GetIndex(pairs.slot, i / D) * D + i % D, Get(Random({pairs.pairs, D}, DType::kF64, 2), i));
  }
  const Tensor rows = Empty({pairs.rows, D}, DType::kF64), dx = Empty({T, D}, DType::kF64);
  ref::SumSlots(drows, pairs.offset, pairs.slot, dx, stream);
  CheckGradient(
      x, dx,
      [&] {
        ref::GatherRows(x, pairs.token, rows, stream);
        return Dot(rows, drows);
      },
      "dx");

  const Tensor y = Random({pairs.rows, D}, DType::kF64, 3), weight = Random({pairs.pairs}, DType::kF64, 4);
  const Tensor dout = Random({T, D}, DType::kF64, 5), out = Empty({T, D}, DType::kF64);
  const Tensor dy = Zeros({pairs.rows, D}, DType::kF64), dweight = Empty({pairs.pairs}, DType::kF64);
  const auto loss = [&] {
    ref::CombineSlots(x, y, pairs.offset, pairs.slot, weight, out, stream);
    return Dot(out, dout);
  };
  ref::CombineSlotsBackward(dout, y, pairs.offset, pairs.slot, weight, dy, dweight, stream);
  CheckGradient(y, dy, loss, "dy");
  CheckGradient(weight, dweight, loss, "dweight");
}

}  // namespace
}  // namespace shoal::kernels
