#include "runtime/kernels/router.h"

#include <limits>
#include <set>

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

struct Routing {
  Tensor probs, chosen, weights, logz;
};
Routing MakeRouting(int64_t T, int64_t E, int64_t K, DType dtype) {
  return {Empty({T, E}, dtype), Empty({T, K}, DType::kI32), Empty({T, K}, dtype), Empty({T}, dtype)};
}

void ExpectTopKSoftmaxMatches(int64_t T, int64_t E, int64_t K, Renormalize renormalize) {
  SCOPED_TRACE(ShapeString({T, E, K}));
  Stream stream;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 4);
  // Coarse steps make many ties.
  for (float& value : logits.span<float>()) value = std::round(value * 4) / 4;
  const Routing want = MakeRouting(T, E, K, DType::kF64);
  ref::TopKSoftmax(logits, renormalize, want.probs, want.chosen, want.weights, want.logz, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Routing r = MakeRouting(T, E, K, DType::kF32);
    TopKSoftmax(logits, renormalize, r.probs, r.chosen, r.weights, r.logz, stream);
    return {r.probs, r.chosen, r.weights, r.logz};
  };
  const double error = 0x1p-24 * (static_cast<double>(E) / 4 + 16);
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want.probs, error, 0, "probs");
    ExpectSameBits(got[1], want.chosen, "chosen");
    ExpectNear(got[2], want.weights, 2 * error + 0x1p-24 * static_cast<double>(K), 0, "weights");
    ExpectNear(got[3], want.logz, 3 * 0x1p-24, error, "logz");
  });
}

TEST(TopKSoftmax, MatchesReference) {
  for (Renormalize renormalize : {Renormalize::kNo, Renormalize::kYes}) {
    for (auto [E, K] :
         {std::pair<int, int>{1, 1}, {2, 1}, {4, 2}, {8, 2}, {8, 8}, {60, 4}, {64, 6}, {257, 8}, {512, 32}}) {
      ExpectTopKSoftmaxMatches(17, E, K, renormalize);
    }
    ExpectTopKSoftmaxMatches(3001, 8, 2, renormalize);
    ExpectTopKSoftmaxMatches(0, 8, 2, renormalize);
  }
}

TEST(TopKSoftmax, TiesGoToTheLowerIndex) {
  Stream stream;
  const float infinity = std::numeric_limits<float>::infinity();
  // -0 equals 0; 1000 and 999 are both beyond what the others' probabilities can show.
  const std::vector<std::vector<float>> rows = {{1, 1, 1, 1},
                                                {0, 2, 2, 2},
                                                {-0.0f, 0, -0.0f, 0},
                                                {-1000, 1000, -999, -998},
                                                {-infinity, -1, -infinity, -infinity}};
  const std::vector<std::vector<int>> want = {{0, 1, 2}, {1, 2, 3}, {0, 1, 2}, {1, 3, 2}, {1, 0, 2}};
  const Tensor logits = Empty({5, 4}, DType::kF32);
  for (size_t i = 0; i < 20; ++i) logits.data<float>()[i] = rows[i / 4][i % 4];
  const auto check = [&](const std::vector<Tensor>& got) {
    for (int64_t i = 0; i < 15; ++i) {
      EXPECT_EQ(got[0].data<int32_t>()[i], want[static_cast<size_t>(i / 3)][static_cast<size_t>(i % 3)]) << i;
    }
  };
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Routing r = MakeRouting(5, 4, 3, DType::kF32);
        TopKSoftmax(logits, Renormalize::kYes, r.probs, r.chosen, r.weights, r.logz, stream);
        return {r.chosen};
      },
      check);
  const Routing r = MakeRouting(5, 4, 3, DType::kF64);
  ref::TopKSoftmax(logits, Renormalize::kYes, r.probs, r.chosen, r.weights, r.logz, stream);
  check({r.chosen});
}

TEST(TopKSoftmax, NaNStillChoosesDifferentExperts) {
  Stream stream;
  const Tensor logits = Random({1, 20}, DType::kF32, 1);
  logits.data<float>()[2] = logits.data<float>()[17] = std::numeric_limits<float>::quiet_NaN();
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Routing r = MakeRouting(1, 20, 5, DType::kF32);
        TopKSoftmax(logits, Renormalize::kYes, r.probs, r.chosen, r.weights, r.logz, stream);
        return {r.chosen, r.weights, r.logz};
      },
      [](const std::vector<Tensor>& got) {
        std::set<int32_t> different(got[0].span<int32_t>().begin(), got[0].span<int32_t>().end());
        EXPECT_EQ(different.size(), 5u);
        EXPECT_GE(*different.begin(), 0);
        EXPECT_LT(*different.rbegin(), 20);
        EXPECT_TRUE(std::isnan(Get(got[1], 0)));
        EXPECT_TRUE(std::isnan(Get(got[2], 0)));
      });
}

void ExpectBackwardMatches(int64_t T, int64_t E, int64_t K, Renormalize renormalize, bool with_dprob,
                           float z_scale) {
  SCOPED_TRACE(ShapeString({T, E, K}));
  Stream stream;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 2), dweights = Random({T, K}, DType::kF32, 2);
  const Tensor dprob = with_dprob ? Random({E}, DType::kF32, 3) : Tensor();
  const Routing r = MakeRouting(T, E, K, DType::kF32);
  ref::TopKSoftmax(logits, renormalize, r.probs, r.chosen, r.weights, r.logz, stream);
  const Tensor want = Empty({T, E}, DType::kF64);
  ref::TopKSoftmaxBackward(r.probs, r.chosen, r.weights, r.logz, renormalize, dweights, dprob, z_scale, want,
                           stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor dlogits = Empty({T, E}, DType::kF32);
    TopKSoftmaxBackward(r.probs, r.chosen, r.weights, r.logz, renormalize, dweights, dprob, z_scale, dlogits,
                        stream);
    return {dlogits};
  };
  const double k = static_cast<double>(K);
  const double from_weights =
      2 * MaxAbs(dweights) * (renormalize == Renormalize::kYes ? static_cast<double>(E) / k : k);
  const double size =
      from_weights + MaxAbs(dprob) * 2 + 2 * std::abs(static_cast<double>(z_scale)) * MaxAbs(r.logz);
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want, 0, 0x1p-24 * (static_cast<double>(E) / 16 + k + 16) * size, "dlogits");
  });
}

TEST(TopKSoftmaxBackward, MatchesReference) {
  for (Renormalize renormalize : {Renormalize::kNo, Renormalize::kYes}) {
    for (bool with_dprob : {false, true}) {
      for (auto [E, K] : {std::pair<int, int>{1, 1}, {4, 2}, {8, 2}, {60, 4}, {512, 32}}) {
        ExpectBackwardMatches(9, E, K, renormalize, with_dprob, 0.25f);
      }
      ExpectBackwardMatches(3001, 8, 2, renormalize, with_dprob, 0);
      ExpectBackwardMatches(0, 8, 2, renormalize, with_dprob, 0);
    }
  }
}

TEST(TopKSoftmaxBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const int64_t T = 4, E = 6, K = 3;
  const Tensor logits = Random({T, E}, DType::kF64, 1), dweights = Random({T, K}, DType::kF64, 2);
  const Tensor dprob = Random({E}, DType::kF64, 3);
  const float z_scale = 0.3f;
  for (Renormalize renormalize : {Renormalize::kNo, Renormalize::kYes}) {
    const Routing r = MakeRouting(T, E, K, DType::kF64);
    const auto loss = [&] {
      ref::TopKSoftmax(logits, renormalize, r.probs, r.chosen, r.weights, r.logz, stream);
      double sum = Dot(r.weights, dweights);
      for (int64_t i = 0; i < T * E; ++i) sum += Get(r.probs, i) * Get(dprob, i % E);
      return sum + static_cast<double>(z_scale) * Dot(r.logz, r.logz);
    };
    loss();
    const Tensor dlogits = Empty({T, E}, DType::kF64);
    ref::TopKSoftmaxBackward(r.probs, r.chosen, r.weights, r.logz, renormalize, dweights, dprob, z_scale,
                             dlogits, stream);
    CheckGradient(logits, dlogits, loss, "dlogits");
  }
}

TEST(SumOverTokens, AddsInF64) {
  Stream stream;
  for (auto [T, E] : {std::pair<int, int>{0, 8}, {1, 1}, {5, 3}, {257, 8}, {9001, 13}}) {
    SCOPED_TRACE(ShapeString({T, E}));
    const Tensor values = Random({T, E}, DType::kF32, 1), want = Zeros({E}, DType::kF64);
    for (int64_t i = 0; i < values.elements(); ++i) Set(want, i % E, Get(want, i % E) + Get(values, i));
    SweepLevels(
        [&]() -> std::vector<Tensor> {
          const Tensor sums = Empty({E}, DType::kF64);
          SumOverTokens(values, sums, stream);
          return {sums};
        },
        [&](const std::vector<Tensor>& got) {
          ExpectNear(got[0], want, 0, 0x1p-53 * static_cast<double>(T) * static_cast<double>(T) * 5, "sums");
        });
  }
}

}  // namespace
}  // namespace shoal::kernels
