#include "runtime/kernels/optimizer.h"

#include <limits>

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

struct State {
  Tensor master, m, v;
};
State RandomState(int64_t N) {
  State state = {Random({N}, DType::kF32, 1), Random({N}, DType::kF32, 2, 0.1),
                 Random({N}, DType::kF32, 3, 0.01)};
  for (float& value : state.v.span<float>()) value = std::abs(value);
  return state;
}
State AsF64(const State& s) {
  return {As(s.master, DType::kF64), As(s.m, DType::kF64), As(s.v, DType::kF64)};
}

void ExpectAdamWMatches(int64_t N, const AdamWStep& step, DType copy_type, bool with_copy) {
  SCOPED_TRACE(N);
  Stream stream;
  const Tensor grad = Random({N}, DType::kF32, 4);
  const State before = RandomState(N), want = AsF64(before);
  ref::AdamW(step, grad, want.master, want.m, want.v, Tensor(), stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const State s = {Copy(before.master), Copy(before.m), Copy(before.v)};
    const Tensor copy = with_copy ? Empty({N}, copy_type) : Tensor();
    AdamW(step, grad, s.master, s.m, s.v, copy, stream);
    return {s.master, s.m, s.v, copy};
  };
  const double g = MaxAbs(grad) * static_cast<double>(step.grad_scale);
  double change = 0;
  for (int64_t i = 0; i < N; ++i)
    change = std::max(change, std::abs(Get(want.master, i) - Get(before.master, i)));
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want.master, 0x1p-24, 12 * 0x1p-24 * change, "master");
    ExpectNear(got[1], want.m, 0, 4 * 0x1p-24 * (MaxAbs(before.m) + g), "m");
    ExpectNear(got[2], want.v, 6 * 0x1p-24, 0, "v");
    if (with_copy) ExpectSameBits(got[3], As(got[0], copy_type), "copy");
  });
}

TEST(AdamW, MatchesReference) {
  const AdamWStep plain = {.learning_rate = 1e-3};
  const AdamWStep full = {.learning_rate = 3e-3,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .epsilon = 1e-6,
                          .weight_decay = 0.1,
                          .update = 1000,
                          .grad_scale = 0.37f};
  for (int64_t N : {0, 1, 15, 16, 100, 70001}) {
    for (const AdamWStep& step : {plain, full}) {
      ExpectAdamWMatches(N, step, DType::kBF16, /*with_copy=*/true);
      ExpectAdamWMatches(N, step, DType::kF32, /*with_copy=*/true);
      ExpectAdamWMatches(N, step, DType::kF32, /*with_copy=*/false);
    }
  }
}

// By hand: the first update from zero moments is lr * sign(g), and decay acts on the old parameter alone.
TEST(AdamW, FirstUpdateIsTheSignOfTheGradient) {
  Stream stream;
  const Tensor grad = Empty({2}, DType::kF32), master = Empty({2}, DType::kF32);
  grad.data<float>()[0] = 5;
  grad.data<float>()[1] = -0.01f;
  master.data<float>()[0] = master.data<float>()[1] = 2;
  const AdamWStep step = {.learning_rate = 0.01, .epsilon = 0, .weight_decay = 0.5};
  AdamW(step, grad, master, Zeros({2}, DType::kF32), Zeros({2}, DType::kF32), Tensor(), stream);
  EXPECT_NEAR(Get(master, 0), 2 * (1 - 0.005) - 0.01, 1e-6);
  EXPECT_NEAR(Get(master, 1), 2 * (1 - 0.005) + 0.01, 1e-6);
}

// Ten thousand steps of decay alone: what one f32 factor 1 - 3e-5 would lose in each adds up.
TEST(AdamW, SmallDecayIsNotLost) {
  Stream stream;
  const int kUpdates = 10000;
  const Tensor master = Empty({16}, DType::kF32), m = Zeros({16}, DType::kF32), v = Zeros({16}, DType::kF32);
  for (int64_t i = 0; i < 16; ++i) Set(master, i, 1 + 0.05 * static_cast<double>(i));
  const Tensor before = Copy(master), grad = Zeros({16}, DType::kF32);
  AdamWStep step = {.learning_rate = 3e-4, .weight_decay = 0.1};
  for (step.update = 1; step.update <= kUpdates; ++step.update)
    AdamW(step, grad, master, m, v, Tensor(), stream);
  for (int64_t i = 0; i < 16; ++i) {
    const double want = Get(before, i) * std::pow(1 - 3e-5, kUpdates);
    EXPECT_NEAR(Get(master, i), want, 5e-4 * want) << i;
  }
}

// By hand: gradients of norm 5.
TEST(ClipGradients, ScalesToTheBoundAndForbidsWhatIsNotFinite) {
  Stream stream;
  const Tensor squares = Empty({2}, DType::kF64), losses = Empty({1}, DType::kF64);
  squares.data<double>()[0] = 9;
  squares.data<double>()[1] = 16;
  losses.data<double>()[0] = 2.5;
  const Tensor numbers = AdamWNumbersOf({.learning_rate = 0.5, .beta1 = 0.5, .beta2 = 0.75, .update = 2});
  const double* const at = numbers.data<double>();
  EXPECT_DOUBLE_EQ(at[kStepSize], 0.5 / 0.75);
  EXPECT_DOUBLE_EQ(at[kRootScale], 4 / std::sqrt(7));
  ClipGradients(squares, losses, 1, numbers, stream);
  EXPECT_EQ(at[kGradNorm], 5);
  EXPECT_NEAR(at[kGradScale], 0.2, 1e-6);
  EXPECT_EQ(at[kApply], 1);
  for (const double clip : {0.0, 5.0, 7.0}) {
    ClipGradients(squares, losses, clip, numbers, stream);
    EXPECT_EQ(at[kGradScale], 1) << clip;
  }
  EXPECT_EQ(at[kLearningRate], 0.5);
  losses.data<double>()[0] = std::numeric_limits<double>::infinity();
  ClipGradients(squares, losses, 1, numbers, stream);
  EXPECT_EQ(at[kApply], 0);
  losses.data<double>()[0] = 1;
  squares.data<double>()[0] = std::numeric_limits<double>::quiet_NaN();
  ClipGradients(squares, losses, 1, numbers, stream);
  EXPECT_EQ(at[kApply], 0);
  const Tensor x = Random({100}, DType::kF32, 1), master = Copy(x);
  AdamW({}, numbers, x, master, Zeros({100}, DType::kF32), Zeros({100}, DType::kF32), Tensor(), stream);
  ExpectSameBits(master, x, "untouched");
}

TEST(SumOfSquares, AddsInF64) {
  Stream stream;
  for (int64_t N : {0, 1, 31, 16384, 16385, 100003}) {
    const Tensor x = Random({N}, DType::kF32, 1);
    const double want = ref::SumOfSquares(x, stream);
    SweepLevels(
        [&]() -> std::vector<Tensor> {
          const Tensor sum = Empty({1}, DType::kF64);
          Set(sum, 0, SumOfSquares(x, stream));
          return {sum};
        },
        [&](const std::vector<Tensor>& got) {
          EXPECT_NEAR(Get(got[0], 0), want, 0x1p-53 * static_cast<double>(N) * want);
        });
  }
}

TEST(SumOfSquares, ShowsNaNAndInfinityAndDoesNotOverflow) {
  Stream stream;
  for (int64_t place : {0, 5, 40000, 49999}) {
    const Tensor x = Zeros({50000}, DType::kF32);
    x.data<float>()[place] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(SumOfSquares(x, stream))) << place;
    x.data<float>()[place] = -std::numeric_limits<float>::infinity();
    EXPECT_TRUE(std::isinf(SumOfSquares(x, stream))) << place;
    x.data<float>()[place] = 1e30f;
    EXPECT_NEAR(SumOfSquares(x, stream), 1e60, 1e54) << place;
  }
}

}  // namespace
}  // namespace shoal::kernels
