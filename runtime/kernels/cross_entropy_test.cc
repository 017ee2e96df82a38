#include "runtime/kernels/cross_entropy.h"

#include <limits>

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

enum class Gradient { kNone, kF32, kInPlace, kBF16 };

void ExpectMatches(const Tensor& logits, Gradient gradient) {
  const int64_t C = logits.dim(0), V = logits.dim(1);
  SCOPED_TRACE(ShapeString({C, V}) + " gradient " + std::to_string(static_cast<int>(gradient)));
  Stream stream;
  const float scale = 0.125f;
  const Tensor targets = RandomIds({C}, V, 2);
  const Tensor want_loss = Empty({C}, DType::kF64), want_dlogits = Empty({C, V}, DType::kF64);
  ref::CrossEntropy(logits, targets, scale, want_loss, want_dlogits, stream);
  const DType act = gradient == Gradient::kBF16 ? DType::kBF16 : DType::kF32;
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor input = Copy(logits), loss = Empty({C}, DType::kF32);
    const Tensor dlogits = gradient == Gradient::kNone      ? Tensor()
                           : gradient == Gradient::kInPlace ? input
                                                            : Empty({C, V}, act);
    CrossEntropy(input, targets, scale, loss, dlogits, stream);
    return {loss, dlogits};
  };
  // A block's sum has a chain of 4096 / 16 additions; the difference x - max is exact or rounds once, which
  // e^ magnifies.
  const double error = 0x1p-24 * (256 + 16 + 2 * MaxAbs(logits));
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want_loss, 0x1p-24, error, "loss");
    if (gradient != Gradient::kNone) {
      // Below e^-87 of the maximum, probabilities are 0.
      ExpectNear(got[1], want_dlogits, error + Roundoff(act), 1e-37, "dlogits");
    }
  });
}

TEST(CrossEntropy, MatchesReference) {
  for (Gradient gradient : {Gradient::kNone, Gradient::kF32, Gradient::kInPlace, Gradient::kBF16}) {
    for (int64_t V : {1, 2, 17, 256, 1000, 4096, 4097, 9000})
      ExpectMatches(Random({3, V}, DType::kF32, 1, 3), gradient);
    ExpectMatches(Random({151, 257}, DType::kF32, 1, 3), gradient);
    ExpectMatches(Random({0, 16}, DType::kF32, 1), gradient);
    ExpectMatches(Random({2, 9000}, DType::kF32, 1, 60), gradient);
    // The maximum rises from block to block, by more than e^ can hold.
    const Tensor rising = Random({2, 13000}, DType::kF32, 1);
    for (int64_t i = 0; i < rising.elements(); ++i)
      rising.data<float>()[i] += static_cast<float>(i % 13000) * 0.02f - 500;
    ExpectMatches(rising, gradient);
  }
}

TEST(CrossEntropy, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const Tensor logits = Random({3, 7}, DType::kF64, 1), targets = RandomIds({3}, 7, 2);
  const Tensor loss = Empty({3}, DType::kF64), dlogits = Empty({3, 7}, DType::kF64);
  const auto total = [&] {
    ref::CrossEntropy(logits, targets, 0.5f, loss, Tensor(), stream);
    return 0.5 * (Get(loss, 0) + Get(loss, 1) + Get(loss, 2));
  };
  ref::CrossEntropy(logits, targets, 0.5f, loss, dlogits, stream);
  CheckGradient(logits, dlogits, total, "dlogits");
}

TEST(CrossEntropy, MasksMinusInfinityAndShowsNaN) {
  Stream stream;
  const int64_t V = 10000;
  const Tensor logits = Zeros({2, V}, DType::kF32), targets = Zeros({2}, DType::kI32);
  // The whole first block is masked; e^88.8, the rest below 0, would be infinite.
  for (int64_t i = 0; i < V; ++i)
    logits.data<float>()[i] = i < 5000 ? -std::numeric_limits<float>::infinity() : -88.8f;
  targets.data<int32_t>()[0] = 6000;
  logits.data<float>()[V + 9999] = std::numeric_limits<float>::quiet_NaN();
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor loss = Empty({2}, DType::kF32), dlogits = Empty({2, V}, DType::kF32);
        CrossEntropy(logits, targets, 1, loss, dlogits, stream);
        return {loss, dlogits};
      },
      [&](const std::vector<Tensor>& got) {
        EXPECT_NEAR(Get(got[0], 0), std::log(5000.0), 1e-4);
        EXPECT_EQ(Get(got[1], 0), 0);
        EXPECT_EQ(Get(got[1], 4999), 0);
        EXPECT_NEAR(Get(got[1], 5000), 1.0 / 5000, 1e-8);
        EXPECT_NEAR(Get(got[1], 6000), 1.0 / 5000 - 1, 1e-6);
        EXPECT_TRUE(std::isnan(Get(got[0], 1)));
        EXPECT_TRUE(std::isnan(Get(got[1], V)));
      });
}

TEST(CrossEntropyDeathTest, RefusesATargetOutsideTheVocabulary) {
  Stream stream;
  const Tensor targets = Zeros({1}, DType::kI32);
  targets.data<int32_t>()[0] = -1;
  EXPECT_DEATH(
      CrossEntropy(Zeros({1, 8}, DType::kF32), targets, 1, Zeros({1}, DType::kF32), Tensor(), stream),
      "targets\\[0\\] is -1");
}

}  // namespace
}  // namespace shoal::kernels
