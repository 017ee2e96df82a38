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

TEST(Softmax, MatchesTheOneThatChooses) {
  Stream stream;
  for (auto [T, E] : {std::pair<int, int>{0, 8}, {1, 1}, {9, 60}, {3001, 8}}) {
    const Tensor logits = Random({T, E}, DType::kF32, 1, 3), dprobs = Random({T, E}, DType::kF32, 2);
    const Tensor want = Empty({T, E}, DType::kF64), want_logz = Empty({T}, DType::kF64), want_d = Empty({T, E}, DType::kF64);
    ref::Softmax(logits, want, want_logz, stream);
    ref::SoftmaxBackward(want, want_logz, dprobs, 0.25f, want_d, stream);
    const double error = 0x1p-24 * (static_cast<double>(E) / 4 + 16);
    const double size = 2 * MaxAbs(dprobs) + 0.5 * MaxAbs(want_logz);
    SweepLevels(
        [&, T = T, E = E]() -> std::vector<Tensor> {
          const Tensor probs = Empty({T, E}, DType::kF32), logz = Empty({T}, DType::kF32), d = Empty({T, E}, DType::kF32);
          Softmax(logits, probs, logz, stream);
          SoftmaxBackward(probs, logz, dprobs, 0.25f, d, stream);
          const Routing r = MakeRouting(T, E, 1, DType::kF32);
          TopKSoftmax(logits, Renormalize::kNo, r.probs, r.chosen, r.weights, r.logz, stream);
          ExpectSameBits(probs, r.probs, "probs");
          ExpectSameBits(logz, r.logz, "logz");
          return {probs, logz, d};
        },
        [&](const std::vector<Tensor>& got) {
          ExpectNear(got[0], want, error, 0, "probs");
          ExpectNear(got[1], want_logz, 3 * 0x1p-24, error, "logz");
          ExpectNear(got[2], want_d, 0, 4 * error * size, "dlogits");
        });
  }
}

void ExpectTopKSigmoidMatches(int64_t Q, int64_t seq, int64_t E, int64_t K, bool with_share) {
  SCOPED_TRACE(ShapeString({Q, seq, E, K}));
  Stream stream;
  const int64_t T = Q * seq;
  const float scale = 2.5f;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 2), bias = Random({E}, DType::kF32, 2, 0.2);
  // Scores that differ by rounding alone are no near-ties of the reference.
  for (float& value : logits.span<float>()) value = std::round(value * 4) / 4;
  for (float& value : bias.span<float>()) value = std::round(value * 64) / 64;
  const Tensor dweights = Random({T, K}, DType::kF32, 3), dshare = with_share ? Random({Q, E}, DType::kF32, 4) : Tensor();
  const Routing want = MakeRouting(T, E, K, DType::kF64);
  const Tensor want_d = Empty({T, E}, DType::kF64), want_sums = Empty({Q, E}, DType::kF64);
  ref::TopKSigmoid(logits, bias, scale, want.probs, want.chosen, want.weights, stream);
  ref::TopKSigmoidBackward(want.probs, want.chosen, want.weights, scale, dweights, dshare, want_d, stream);
  ref::SumShares(want.probs, want_sums, stream);
  const double error = 0x1p-24 * 8, k = static_cast<double>(K);
  // Chosen scores are the largest, and 8 / E of a token's scores or more are above 0.1.
  const double size = (static_cast<double>(scale) * MaxAbs(dweights) * 2 * k + MaxAbs(dshare) * 2) * 10;
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Routing r = MakeRouting(T, E, K, DType::kF32);
        const Tensor d = Empty({T, E}, DType::kF32), sums = Empty({Q, E}, DType::kF64);
        TopKSigmoid(logits, bias, scale, r.probs, r.chosen, r.weights, stream);
        TopKSigmoidBackward(r.probs, r.chosen, r.weights, scale, dweights, dshare, d, stream);
        SumShares(r.probs, sums, stream);
        return {r.probs, r.chosen, r.weights, d, sums};
      },
      [&](const std::vector<Tensor>& got) {
        ExpectNear(got[0], want.probs, error, 0, "scores");
        ExpectSameBits(got[1], want.chosen, "chosen");
        ExpectNear(got[2], want.weights, 4 * error + 0x1p-24 * k, 0, "weights");
        ExpectNear(got[3], want_d, 0, (error + 0x1p-24 * static_cast<double>(E)) * size, "dlogits");
        ExpectNear(got[4], want_sums, 3 * error, 0, "sums");
      });
}

TEST(TopKSigmoid, MatchesReference) {
  for (bool with_share : {false, true}) {
    ExpectTopKSigmoidMatches(1, 1, 1, 1, with_share);
    ExpectTopKSigmoidMatches(3, 5, 8, 2, with_share);
    ExpectTopKSigmoidMatches(2, 7, 64, 6, with_share);
    ExpectTopKSigmoidMatches(2, 3, 257, 8, with_share);
    ExpectTopKSigmoidMatches(5, 600, 8, 8, with_share);
  }
  ExpectTopKSigmoidMatches(0, 4, 8, 2, false);
}

TEST(TopKSigmoid, TheBiasChoosesButDoesNotWeigh) {
  Stream stream;
  const Tensor logits = Zeros({2, 4}, DType::kF32), bias = Zeros({4}, DType::kF32);
  const Routing r = MakeRouting(2, 4, 2, DType::kF32);
  TopKSigmoid(logits, bias, 1, r.probs, r.chosen, r.weights, stream);
  EXPECT_EQ(r.chosen.span<int32_t>(), absl::Span<const int32_t>({0, 1, 0, 1}));  // Ties to the lower expert.
  bias.data<float>()[2] = 0.1f;
  TopKSigmoid(logits, bias, 1, r.probs, r.chosen, r.weights, stream);
  EXPECT_EQ(r.chosen.span<int32_t>(), absl::Span<const int32_t>({2, 0, 2, 0}));
  EXPECT_EQ(r.weights.span<float>(), absl::Span<const float>({0.5f, 0.5f, 0.5f, 0.5f}));
}

TEST(TopKSigmoidBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const int64_t Q = 2, T = 6, E = 5, K = 2;
  const float scale = 2.5f;
  const Tensor logits = Random({T, E}, DType::kF64, 1), bias = Random({E}, DType::kF64, 2, 0.3);
  const Tensor dweights = Random({T, K}, DType::kF64, 3), dshare = Random({Q, E}, DType::kF64, 4);
  const Routing r = MakeRouting(T, E, K, DType::kF64);
  const Tensor sums = Empty({Q, E}, DType::kF64), dlogits = Empty({T, E}, DType::kF64);
  const auto loss = [&] {
    ref::TopKSigmoid(logits, bias, scale, r.probs, r.chosen, r.weights, stream);
    ref::SumShares(r.probs, sums, stream);
    return Dot(r.weights, dweights) + Dot(sums, dshare);
  };
  loss();
  ref::TopKSigmoidBackward(r.probs, r.chosen, r.weights, scale, dweights, dshare, dlogits, stream);
  CheckGradient(logits, dlogits, loss, "dlogits");
}

TEST(SoftmaxBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const Tensor logits = Random({4, 5}, DType::kF64, 1), dprobs = Random({4, 5}, DType::kF64, 2);
  const Tensor probs = Empty({4, 5}, DType::kF64), logz = Empty({4}, DType::kF64), dlogits = Empty({4, 5}, DType::kF64);
  const auto loss = [&] {
    ref::Softmax(logits, probs, logz, stream);
    return Dot(probs, dprobs) + static_cast<double>(0.3f) * Dot(logz, logz);
  };
  loss();
  ref::SoftmaxBackward(probs, logz, dprobs, 0.3f, dlogits, stream);
  CheckGradient(logits, dlogits, loss, "dlogits");
}

TEST(TopTokens, MatchesReference) {
  Stream stream;
  for (auto [T, E] : {std::pair<int, int>{0, 3}, {1, 1}, {9, 4}, {700, 5}, {5000, 3}}) {
    const Tensor scores = Random({T, E}, DType::kF32, 1);
    for (float& value : scores.span<float>()) value = std::round(value * 8) / 8;  // Many ties.
    for (int64_t C : {0, 1, T / 3, T}) {
      if (C > T) continue;
      SCOPED_TRACE(ShapeString({T, E, C}));
      const Tensor score = Empty({E}, DType::kF32), token = Empty({E}, DType::kI64);
      ref::TopTokens(scores, C, score, token, stream);
      SweepLevels(
          [&, E = E]() -> std::vector<Tensor> {
            const Tensor got_score = Empty({E}, DType::kF32), got_token = Empty({E}, DType::kI64);
            TopTokens(scores, C, got_score, got_token, stream);
            return {got_score, got_token};
          },
          [&](const std::vector<Tensor>& got) {
            ExpectSameBits(got[0], score, "score");
            ExpectSameBits(got[1], token, "token");
          });
    }
  }
}

TEST(NormalizeRows, MatchesReference) {
  Stream stream;
  for (auto [R, N] : {std::pair<int, int>{0, 8}, {1, 1}, {5, 12}, {7, 33}, {3001, 16}}) {
    SCOPED_TRACE(ShapeString({R, N}));
    const Tensor x = Random({R, N}, DType::kF32, 1), dy = Random({R, N}, DType::kF32, 2);
    if (R > 1) std::fill_n(x.data<float>(), N, 0.0f);  // Shorter than the bound.
    const Tensor want = Empty({R, N}, DType::kF64), norm = Empty({R}, DType::kF64), dx = Empty({R, N}, DType::kF64);
    ref::NormalizeRows(x, want, norm, stream);
    ref::NormalizeRowsBackward(dy, want, norm, dx, stream);
    const double error = 0x1p-24 * (static_cast<double>(N) / 4 + 8);
    SweepLevels(
        [&, R = R, N = N]() -> std::vector<Tensor> {
          const Tensor y = Empty({R, N}, DType::kF32), lengths = Empty({R}, DType::kF32), d = Copy(dy);
          NormalizeRows(x, y, lengths, stream);
          NormalizeRowsBackward(d, y, lengths, d, stream);
          return {y, lengths, d};
        },
        [&](const std::vector<Tensor>& got) {
          ExpectNear(got[0], want, error, 0, "y");
          ExpectNear(got[1], norm, error, 0, "norm");
          for (int64_t i = 0; i < got[2].elements(); ++i) {
            const double length = Get(norm, i / dy.dim(1));
            ASSERT_NEAR(Get(got[2], i), Get(dx, i), 8 * error * MaxAbs(dy) * static_cast<double>(dy.dim(1)) / length) << i;
          }
        });
  }
}

TEST(NormalizeRows, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const Tensor x = Random({3, 4}, DType::kF64, 1), dy = Random({3, 4}, DType::kF64, 2);
  const Tensor y = Empty({3, 4}, DType::kF64), norm = Empty({3}, DType::kF64), dx = Empty({3, 4}, DType::kF64);
  const auto loss = [&] {
    ref::NormalizeRows(x, y, norm, stream);
    return Dot(y, dy);
  };
  loss();
  ref::NormalizeRowsBackward(dy, y, norm, dx, stream);
  CheckGradient(x, dx, loss, "dx");
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
