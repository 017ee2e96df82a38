#include "runtime/kernels/permute.h"

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

struct Sorted {
  Tensor counts, slot, token;
};
Sorted MakeSorted(int64_t T, int64_t E, int64_t K) {
  return {Empty({E}, DType::kI64), Empty({T, K}, DType::kI32), Empty({T * K}, DType::kI32)};
}
// Slots as after a sort of random choices.
Sorted RandomSorted(int64_t T, int64_t E, int64_t K) {
  Stream stream;
  Sorted sorted = MakeSorted(T, E, K);
  ref::SortByExpert(RandomIds({T, K}, E, 7), sorted.counts, sorted.slot, sorted.token, stream);
  return sorted;
}

struct Case {
  int64_t T, D, E, K;
};
const Case kCases[] = {{0, 8, 4, 2},  {1, 1, 1, 1},   {5, 16, 4, 2},
                       {7, 33, 3, 3}, {9, 100, 8, 1}, {130, 257, 8, 2}};

TEST(SortByExpert, MatchesReference) {
  Stream stream;
  for (const Case& c : kCases) {
    const Tensor chosen = RandomIds({c.T, c.K}, c.E, 1);
    const Sorted want = MakeSorted(c.T, c.E, c.K), got = MakeSorted(c.T, c.E, c.K);
    ref::SortByExpert(chosen, want.counts, want.slot, want.token, stream);
    SortByExpert(chosen, got.counts, got.slot, got.token, stream);
    ExpectSameBits(got.counts, want.counts, "counts");
    ExpectSameBits(got.slot, want.slot, "slot");
    ExpectSameBits(got.token, want.token, "token");
  }
}

TEST(SortByExpert, OrdersByExpertThenToken) {
  Stream stream;
  const Tensor chosen = Empty({3, 2}, DType::kI32);
  const int32_t choices[] = {2, 0, 0, 2, 3, 2};
  std::copy(std::begin(choices), std::end(choices), chosen.data<int32_t>());
  const Sorted got = MakeSorted(3, 4, 2);
  SortByExpert(chosen, got.counts, got.slot, got.token, stream);
  EXPECT_EQ(got.counts.span<int64_t>(), absl::Span<const int64_t>({2, 0, 3, 1}));
  EXPECT_EQ(got.slot.span<int32_t>(), absl::Span<const int32_t>({2, 0, 1, 3, 5, 4}));
  EXPECT_EQ(got.token.span<int32_t>(), absl::Span<const int32_t>({0, 1, 0, 1, 2, 2}));
}

TEST(SortByExpertDeathTest, RefusesAnExpertThatIsNone) {
  Stream stream;
  const Sorted got = MakeSorted(1, 4, 1);
  const Tensor chosen = Zeros({1, 1}, DType::kI32);
  chosen.data<int32_t>()[0] = 4;
  EXPECT_DEATH(SortByExpert(chosen, got.counts, got.slot, got.token, stream), "chosen\\[0\\] is 4");
}

TEST(GatherRows, CopiesRows) {
  Stream stream;
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      const Sorted sorted = RandomSorted(c.T, c.E, c.K);
      const Tensor x = Random({c.T, c.D}, act, 1), want = Empty({c.T * c.K, c.D}, act);
      ref::GatherRows(x, sorted.token, want, stream);
      SweepLevels(
          [&]() -> std::vector<Tensor> {
            const Tensor slots = Empty({c.T * c.K, c.D}, act);
            GatherRows(x, sorted.token, slots, stream);
            return {slots};
          },
          [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], want, "slots"); });
    }
  }
}

TEST(SumSlots, MatchesReference) {
  Stream stream;
  for (const Case& c : kCases) {
    for (auto [from, to] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}}) {
      const Sorted sorted = RandomSorted(c.T, c.E, c.K);
      const Tensor dslots = Random({c.T * c.K, c.D}, from, 1), want = Empty({c.T, c.D}, DType::kF64);
      ref::SumSlots(dslots, sorted.slot, want, stream);
      const double error = static_cast<double>(c.K) * 0x1p-24 * static_cast<double>(c.K) * MaxAbs(dslots);
      SweepLevels(
          [&, to = to]() -> std::vector<Tensor> {
            const Tensor dx = Empty({c.T, c.D}, to);
            SumSlots(dslots, sorted.slot, dx, stream);
            return {dx};
          },
          [&, to = to](const std::vector<Tensor>& got) {
            ExpectNear(got[0], want, Roundoff(to), error, "dx");
          });
    }
  }
}

TEST(CombineSlots, MatchesReference) {
  Stream stream;
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (bool in_place : {false, true}) {
        const Sorted sorted = RandomSorted(c.T, c.E, c.K);
        const Tensor residual = Random({c.T, c.D}, DType::kF32, 1), y = Random({c.T * c.K, c.D}, act, 2);
        const Tensor weights = Random({c.T, c.K}, DType::kF32, 3), want = Empty({c.T, c.D}, DType::kF64);
        ref::CombineSlots(residual, y, sorted.slot, weights, want, stream);
        const double size = MaxAbs(residual) + static_cast<double>(c.K) * MaxAbs(y) * MaxAbs(weights);
        SweepLevels(
            [&]() -> std::vector<Tensor> {
              const Tensor input = Copy(residual), out = in_place ? input : Empty({c.T, c.D}, DType::kF32);
              CombineSlots(input, y, sorted.slot, weights, out, stream);
              return {out};
            },
            [&](const std::vector<Tensor>& got) {
              ExpectNear(got[0], want, 0, 0x1p-24 * static_cast<double>(2 * c.K) * size, "out");
            });
      }
    }
  }
}

void ExpectCombineBackwardMatches(const Case& c, DType act, bool in_place) {
  Stream stream;
  const Sorted sorted = RandomSorted(c.T, c.E, c.K);
  const Tensor dout = Random({c.T, c.D}, DType::kF32, 1), y = Random({c.T * c.K, c.D}, act, 2);
  const Tensor weights = Random({c.T, c.K}, DType::kF32, 3);
  const Tensor want_dy = Empty({c.T * c.K, c.D}, DType::kF64), want_dweights = Empty({c.T, c.K}, DType::kF64);
  ref::CombineSlotsBackward(dout, y, sorted.slot, weights, want_dy, want_dweights, stream);
  const double size = static_cast<double>(c.D) * MaxAbs(dout) * MaxAbs(y);
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor input = Copy(y), dy = in_place ? input : Empty({c.T * c.K, c.D}, act);
        const Tensor dweights = Empty({c.T, c.K}, DType::kF32);
        CombineSlotsBackward(dout, input, sorted.slot, weights, dy, dweights, stream);
        return {dy, dweights};
      },
      [&](const std::vector<Tensor>& got) {
        ExpectNear(got[0], want_dy, 0x1p-24 + Roundoff(act), 0, "dy");
        ExpectNear(got[1], want_dweights, 0, 0x1p-24 * (static_cast<double>(c.D) / 16 + 8) * size,
                   "dweights");
      });
}

TEST(CombineSlotsBackward, MatchesReference) {
  for (const Case& c : kCases) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      ExpectCombineBackwardMatches(c, act, /*in_place=*/false);
      ExpectCombineBackwardMatches(c, act, /*in_place=*/true);
    }
  }
}

TEST(Permute, ReferenceGradientsMatchFiniteDifferences) {
  Stream stream;
  const int64_t T = 4, D = 3, E = 3, K = 2;
  const Sorted sorted = RandomSorted(T, E, K);
  const Tensor x = Random({T, D}, DType::kF64, 1), dslots = Random({T * K, D}, DType::kF64, 2);
  const Tensor slots = Empty({T * K, D}, DType::kF64), dx = Empty({T, D}, DType::kF64);
  ref::SumSlots(dslots, sorted.slot, dx, stream);
  CheckGradient(
      x, dx,
      [&] {
        ref::GatherRows(x, sorted.token, slots, stream);
        return Dot(slots, dslots);
      },
      "dx");

  const Tensor y = Random({T * K, D}, DType::kF64, 3), weights = Random({T, K}, DType::kF64, 4);
  const Tensor dout = Random({T, D}, DType::kF64, 5), out = Empty({T, D}, DType::kF64);
  const Tensor dy = Empty({T * K, D}, DType::kF64), dweights = Empty({T, K}, DType::kF64);
  const auto loss = [&] {
    ref::CombineSlots(x, y, sorted.slot, weights, out, stream);
    return Dot(out, dout);
  };
  ref::CombineSlotsBackward(dout, y, sorted.slot, weights, dy, dweights, stream);
  CheckGradient(y, dy, loss, "dy");
  CheckGradient(weights, dweights, loss, "dweights");
}

}  // namespace
}  // namespace shoal::kernels
