#include "runtime/kernels/router.h"

#include <cmath>
#include <limits>
#include <set>

#include "runtime/kernels/cuda/device_testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

// Of logits [T, E] with K choices: on the host in f64, or on a device.
struct Routing {
  Tensor probs, chosen, weights, logz;
};
Routing HostRouting(int64_t T, int64_t E, int64_t K, DType dtype) {
  return {Empty({T, E}, dtype), Empty({T, K}, DType::kI32), Empty({T, K}, dtype), Empty({T}, dtype)};
}
Routing DeviceRouting(int64_t T, int64_t E, int64_t K, Stream& stream) {
  return {Empty({T, E}, DType::kF32, stream), Empty({T, K}, DType::kI32, stream), Empty({T, K}, DType::kF32, stream),
          Empty({T}, DType::kF32, stream)};
}
Routing RoutingToDevice(const Routing& r, Stream& stream) {
  return {ToDevice(r.probs, stream), ToDevice(r.chosen, stream), ToDevice(r.weights, stream), ToDevice(r.logz, stream)};
}
Tensor OnDevice(const Tensor& host, bool odd, Stream& stream) { return odd ? ToOddAddress(host, stream) : ToDevice(host, stream); }

// Every way to give a row to lanes, with rows that fill it and rows that do not; the last need more than one block.
const std::tuple<int, int, int> kRows[] = {{17, 1, 1},   {17, 2, 1},   {5, 3, 3},     {17, 8, 8},    {7, 30, 4},    {9, 32, 2},
                                           {17, 60, 4},  {9, 64, 6},   {5, 100, 5},   {5, 128, 8},   {3, 250, 16},  {3, 257, 8},
                                           {3, 512, 32}, {2, 512, 64}, {2, 1000, 40}, {2, 1028, 12}, {1, 2048, 16}, {301, 8, 2},
                                           {0, 8, 2}};

void ExpectTopKSoftmaxMatches(int64_t T, int64_t E, int64_t K, Renormalize renormalize, bool odd) {
  SCOPED_TRACE(ShapeString({T, E, K}));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 4);
  // Coarse steps make many ties.
  for (float& value : logits.span<float>()) value = std::round(value * 4) / 4;
  const Routing want = HostRouting(T, E, K, DType::kF64), got = DeviceRouting(T, E, K, *stream);
  ref::TopKSoftmax(logits, renormalize, want.probs, want.chosen, want.weights, want.logz, cpu);
  TopKSoftmax(OnDevice(logits, odd, *stream), renormalize, got.probs, got.chosen, got.weights, got.logz, *stream);
  const double error = 0x1p-24 * (static_cast<double>(E) / 4 + 16);
  ExpectNear(ToHost(got.probs, *stream), want.probs, error, 0, "probs");
  ExpectSameBits(ToHost(got.chosen, *stream), want.chosen, "chosen");
  ExpectNear(ToHost(got.weights, *stream), want.weights, 2 * error + 0x1p-24 * static_cast<double>(K), 0, "weights");
  ExpectNear(ToHost(got.logz, *stream), want.logz, 3 * 0x1p-24, error, "logz");
}

TEST(CudaTopKSoftmax, MatchesReference) {
  for (const auto& [T, E, K] : kRows) {
    ExpectTopKSoftmaxMatches(T, E, K, Renormalize::kNo, /*odd=*/false);
    ExpectTopKSoftmaxMatches(T, E, K, Renormalize::kYes, /*odd=*/true);
  }
}

TEST(CudaTopKSoftmax, TiesGoToTheLowerIndex) {
  const std::unique_ptr<Stream> stream = TestStream();
  const float infinity = std::numeric_limits<float>::infinity();
  // -0 equals 0; 1000 and 999 are both beyond what the others' probabilities can show.
  const std::vector<std::vector<float>> rows = {
      {1, 1, 1, 1}, {0, 2, 2, 2}, {-0.0f, 0, -0.0f, 0}, {-1000, 1000, -999, -998}, {-infinity, -1, -infinity, -infinity}};
  const std::vector<std::vector<int>> want = {{0, 1, 2}, {1, 2, 3}, {0, 1, 2}, {1, 3, 2}, {1, 0, 2}};
  const Tensor logits = Empty({5, 4}, DType::kF32);
  for (size_t i = 0; i < 20; ++i) logits.data<float>()[i] = rows[i / 4][i % 4];
  const Routing got = DeviceRouting(5, 4, 3, *stream);
  TopKSoftmax(ToDevice(logits, *stream), Renormalize::kYes, got.probs, got.chosen, got.weights, got.logz, *stream);
  const Tensor chosen = ToHost(got.chosen, *stream);
  for (size_t i = 0; i < 15; ++i) EXPECT_EQ(chosen.data<int32_t>()[i], want[i / 3][i % 3]) << i;
}

TEST(CudaTopKSoftmax, NaNStillChoosesDifferentExperts) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor logits = Random({1, 20}, DType::kF32, 1);
  logits.data<float>()[2] = logits.data<float>()[17] = std::numeric_limits<float>::quiet_NaN();
  logits.data<float>()[5] = -std::numeric_limits<float>::quiet_NaN();
  const Routing got = DeviceRouting(1, 20, 20, *stream);
  TopKSoftmax(ToDevice(logits, *stream), Renormalize::kYes, got.probs, got.chosen, got.weights, got.logz, *stream);
  const Tensor chosen = ToHost(got.chosen, *stream);
  const std::set<int32_t> different(chosen.span<int32_t>().begin(), chosen.span<int32_t>().end());
  EXPECT_EQ(different.size(), 20u);
  EXPECT_EQ(*different.begin(), 0);
  EXPECT_EQ(*different.rbegin(), 19);
  EXPECT_TRUE(std::isnan(Get(ToHost(got.weights, *stream), 0)));
  EXPECT_TRUE(std::isnan(Get(ToHost(got.logz, *stream), 0)));
}

void ExpectTopKSoftmaxBackwardMatches(int64_t T, int64_t E, int64_t K, Renormalize renormalize, bool with_dprob, float z_scale) {
  SCOPED_TRACE(ShapeString({T, E, K}));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 2), dweights = Random({T, K}, DType::kF32, 2);
  const Tensor dprob = with_dprob ? Random({E}, DType::kF32, 3) : Tensor();
  const Routing r = HostRouting(T, E, K, DType::kF32), on_device = [&] {
    ref::TopKSoftmax(logits, renormalize, r.probs, r.chosen, r.weights, r.logz, cpu);
    return RoutingToDevice(r, *stream);
  }();
  const Tensor want = Empty({T, E}, DType::kF64), dlogits = Empty({T, E}, DType::kF32, *stream);
  ref::TopKSoftmaxBackward(r.probs, r.chosen, r.weights, r.logz, renormalize, dweights, dprob, z_scale, want, cpu);
  TopKSoftmaxBackward(on_device.probs, on_device.chosen, on_device.weights, on_device.logz, renormalize, ToDevice(dweights, *stream),
                      with_dprob ? ToDevice(dprob, *stream) : Tensor(), z_scale, dlogits, *stream);
  const double k = static_cast<double>(K);
  const double from_weights = 2 * MaxAbs(dweights) * (renormalize == Renormalize::kYes ? static_cast<double>(E) / k : k);
  const double size = from_weights + MaxAbs(dprob) * 2 + 2 * std::abs(static_cast<double>(z_scale)) * MaxAbs(r.logz);
  ExpectNear(ToHost(dlogits, *stream), want, 0, 0x1p-24 * (static_cast<double>(E) / 16 + k + 16) * size, "dlogits");
}

TEST(CudaTopKSoftmaxBackward, MatchesReference) {
  for (const auto& [T, E, K] : kRows) {
    ExpectTopKSoftmaxBackwardMatches(T, E, K, Renormalize::kNo, /*with_dprob=*/true, 0.25f);
    ExpectTopKSoftmaxBackwardMatches(T, E, K, Renormalize::kYes, /*with_dprob=*/false, 0.25f);
    ExpectTopKSoftmaxBackwardMatches(T, E, K, Renormalize::kYes, /*with_dprob=*/true, 0);
  }
}

TEST(CudaSoftmax, MatchesReferenceForwardAndBackward) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const auto& [T, E, K] : kRows) {
    SCOPED_TRACE(ShapeString({T, E}));
    const Tensor logits = Random({T, E}, DType::kF32, 1, 2), dprobs = Random({T, E}, DType::kF32, 2);
    const Tensor want = Empty({T, E}, DType::kF64), want_logz = Empty({T}, DType::kF64), want_d = Empty({T, E}, DType::kF64);
    ref::Softmax(logits, want, want_logz, cpu);
    ref::SoftmaxBackward(want, want_logz, dprobs, 0.1f, want_d, cpu);
    const Tensor probs = Empty({T, E}, DType::kF32, *stream), logz = Empty({T}, DType::kF32, *stream);
    const Tensor d = Empty({T, E}, DType::kF32, *stream);
    Softmax(ToDevice(logits, *stream), probs, logz, *stream);
    SoftmaxBackward(probs, logz, ToDevice(dprobs, *stream), 0.1f, d, *stream);
    const double error = 0x1p-24 * (static_cast<double>(E) / 4 + 16);
    ExpectNear(ToHost(probs, *stream), want, error, 0, "probs");
    ExpectNear(ToHost(logz, *stream), want_logz, 3 * 0x1p-24, error, "logz");
    ExpectNear(ToHost(d, *stream), want_d, 0, 4 * error * (2 * MaxAbs(dprobs) + 0.2 * MaxAbs(want_logz)), "dlogits");
  }
}

void ExpectTopKSigmoidMatches(int64_t Q, int64_t seq, int64_t E, int64_t K, bool with_share) {
  SCOPED_TRACE(ShapeString({Q, seq, E, K}));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const int64_t T = Q * seq;
  const float scale = 2.5f;
  const Tensor logits = Random({T, E}, DType::kF32, 1, 2), bias = Random({E}, DType::kF32, 2, 0.2);
  // Scores that differ by rounding alone are no near-ties of the reference.
  for (float& value : logits.span<float>()) value = std::round(value * 4) / 4;
  for (float& value : bias.span<float>()) value = std::round(value * 64) / 64;
  const Tensor dweights = Random({T, K}, DType::kF32, 3), dshare = with_share ? Random({Q, E}, DType::kF32, 4) : Tensor();
  const Routing want = HostRouting(T, E, K, DType::kF64), got = DeviceRouting(T, E, K, *stream);
  const Tensor want_d = Empty({T, E}, DType::kF64), want_sums = Empty({Q, E}, DType::kF64);
  ref::TopKSigmoid(logits, bias, scale, want.probs, want.chosen, want.weights, cpu);
  ref::TopKSigmoidBackward(want.probs, want.chosen, want.weights, scale, dweights, dshare, want_d, cpu);
  ref::SumShares(want.probs, want_sums, cpu);
  const Tensor d = Empty({T, E}, DType::kF32, *stream), sums = Empty({Q, E}, DType::kF64, *stream);
  TopKSigmoid(ToDevice(logits, *stream), ToDevice(bias, *stream), scale, got.probs, got.chosen, got.weights, *stream);
  TopKSigmoidBackward(got.probs, got.chosen, got.weights, scale, ToDevice(dweights, *stream),
                      with_share ? ToDevice(dshare, *stream) : Tensor(), d, *stream);
  SumShares(got.probs, sums, *stream);
  const double error = 0x1p-24 * 8, k = static_cast<double>(K);
  // Chosen scores are the largest, and 8 / E of a token's scores or more are above 0.1.
  const double size = (static_cast<double>(scale) * MaxAbs(dweights) * 2 * k + MaxAbs(dshare) * 2) * 10;
  ExpectNear(ToHost(got.probs, *stream), want.probs, error, 0, "scores");
  ExpectSameBits(ToHost(got.chosen, *stream), want.chosen, "chosen");
  ExpectNear(ToHost(got.weights, *stream), want.weights, 4 * error + 0x1p-24 * k, 0, "weights");
  ExpectNear(ToHost(d, *stream), want_d, 0, (error + 0x1p-24 * static_cast<double>(E)) * size, "dlogits");
  ExpectNear(ToHost(sums, *stream), want_sums, 3 * error, 0, "sums");
}

TEST(CudaTopKSigmoid, MatchesReferenceForwardAndBackward) {
  for (const bool with_share : {false, true}) {
    ExpectTopKSigmoidMatches(1, 1, 1, 1, with_share);
    ExpectTopKSigmoidMatches(3, 5, 8, 2, with_share);
    ExpectTopKSigmoidMatches(2, 7, 64, 6, with_share);
    ExpectTopKSigmoidMatches(2, 3, 257, 8, with_share);
    ExpectTopKSigmoidMatches(2, 150, 8, 8, with_share);
  }
  ExpectTopKSigmoidMatches(0, 4, 8, 2, false);
}

TEST(CudaTopTokens, MatchesReference) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const auto& [T, E] : {std::pair(0, 3), {1, 1}, {9, 4}, {257, 5}, {1500, 2}}) {
    const Tensor scores = Random({T, E}, DType::kF32, 1);
    for (float& value : scores.span<float>()) value = std::round(value * 8) / 8;  // Many ties.
    for (const int64_t C : {0, 1, T / 3, T}) {
      if (C > T) continue;
      SCOPED_TRACE(ShapeString({T, E, C}));
      const Tensor want_score = Empty({E}, DType::kF32), want_token = Empty({E}, DType::kI64);
      ref::TopTokens(scores, C, want_score, want_token, cpu);
      const Tensor score = Empty({E}, DType::kF32, *stream), token = Empty({E}, DType::kI64, *stream);
      TopTokens(ToDevice(scores, *stream), C, score, token, *stream);
      ExpectSameBits(ToHost(score, *stream), want_score, "score");
      ExpectSameBits(ToHost(token, *stream), want_token, "token");
    }
  }
}

TEST(CudaNormalizeRows, MatchesReferenceInPlace) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const auto& [R, N] : {std::pair(0, 8), {1, 1}, {5, 12}, {7, 33}, {3, 1100}, {200, 16}}) {
    SCOPED_TRACE(ShapeString({R, N}));
    const Tensor x = Random({R, N}, DType::kF32, 1), dy = Random({R, N}, DType::kF32, 2);
    if (R > 1) std::fill_n(x.data<float>(), N, 0.0f);  // Shorter than the bound.
    const Tensor want = Empty({R, N}, DType::kF64), norm = Empty({R}, DType::kF64), dx = Empty({R, N}, DType::kF64);
    ref::NormalizeRows(x, want, norm, cpu);
    ref::NormalizeRowsBackward(dy, want, norm, dx, cpu);
    const double error = 0x1p-24 * (static_cast<double>(N) / 4 + 8);
    const Tensor y = ToDevice(x, *stream), lengths = Empty({R}, DType::kF32, *stream), d = ToDevice(dy, *stream);
    NormalizeRows(y, y, lengths, *stream);
    NormalizeRowsBackward(d, y, lengths, d, *stream);
    ExpectNear(ToHost(y, *stream), want, error, 0, "y");
    ExpectNear(ToHost(lengths, *stream), norm, error, 0, "norm");
    const Tensor got = ToHost(d, *stream);
    for (int64_t i = 0; i < got.elements(); ++i) {
      const double length = Get(norm, i / N);
      ASSERT_NEAR(Get(got, i), Get(dx, i), 8 * error * MaxAbs(dy) * static_cast<double>(N) / length) << i;
    }
  }
}

TEST(CudaSumOverTokens, AddsInF64) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const auto& [T, E] : {std::pair(0, 8), {1, 1}, {5, 3}, {257, 8}, {2001, 45}}) {
    SCOPED_TRACE(ShapeString({T, E}));
    const Tensor values = Random({T, E}, DType::kF32, 1), want = Zeros({E}, DType::kF64), sums = Empty({E}, DType::kF64, *stream);
    for (int64_t i = 0; i < values.elements(); ++i) Set(want, i % E, Get(want, i % E) + Get(values, i));
    SumOverTokens(ToDevice(values, *stream), sums, *stream);
    ExpectNear(ToHost(sums, *stream), want, 0, 0x1p-53 * static_cast<double>(T) * static_cast<double>(T) * 5, "sums");
  }
}

// On the device and on the CPU, against the definition.
class RoutingWithoutTheHost : public ::testing::TestWithParam<bool> {
 protected:
  Stream& stream() { return GetParam() ? *device_ : cpu_; }

 private:
  std::unique_ptr<Stream> device_ = TestStream();
  Stream cpu_;
};
INSTANTIATE_TEST_SUITE_P(Devices, RoutingWithoutTheHost, ::testing::Bool());

// The columns of `from` [rows, N], added up by the definition; at `first` of `to`.
void AddColumns(const Tensor& from, const Tensor& to, int64_t first) {
  const int64_t N = from.dim(1);
  for (int64_t i = 0; i < from.elements(); ++i) Set(to, first + i % N, Get(to, first + i % N) + Get(from, i));
}

TEST_P(RoutingWithoutTheHost, ChoicesAreCountedAndSummedByBlocksOfPieces) {
  for (const auto& [T, E, K, P] : {std::tuple(0, 3, 2, 1), {1, 1, 1, 1}, {5, 8, 2, 7}, {301, 8, 2, 1}, {1000, 60, 8, 4}, {90, 300, 5, 2},
                                   {40, 2048, 4, 1}, {9000, 16, 1, 300}}) {
    SCOPED_TRACE(ShapeString({T, E, K, P}));
    const Tensor logits = Upload(Random({T, E}, DType::kF32, 1, 4), stream()), bias = Zeros({E}, DType::kF32, stream());
    const Routing r = DeviceRouting(T, E, K, stream()), other = DeviceRouting(T, E, K, stream());
    const Tally tally = MakeTally(T, E, P, TallySums::kYes, stream()), again = MakeTally(T, E, P, TallySums::kYes, stream());
    const Tally counts = MakeTally(T, E, P, TallySums::kNo, stream());
    for (const Tally& to : {tally, again}) {
      TopKSoftmax(logits, Renormalize::kNo, r.probs, r.chosen, r.weights, r.logz, stream(), to);
    }
    const Tensor chosen = ToHost(r.chosen, stream()), probs = ToHost(r.probs, stream()), logz = ToHost(r.logz, stream());
    const Tensor want = ToHost(TallyOf(chosen, E, P, stream()).counts, stream());
    EXPECT_LE(want.dim(0), std::max(256, P));
    ExpectSameBits(ToHost(tally.counts, stream()), want, "counts");
    ExpectSameBits(ToHost(again.counts, stream()), want, "counts again");
    ExpectSameBits(ToHost(again.sums, stream()), ToHost(tally.sums, stream()), "sums again");
    // By the sums of probabilities and the number of choices of each block at once.
    const Tensor sums = ToHost(tally.sums, stream()), totals = Empty({P * E + E + 1}, DType::kF64, stream());
    SumTally(tally, totals, stream());
    const Tensor want_totals = Zeros({P * E + E + 1}, DType::kF64);
    const int64_t each = want.dim(0) / P;
    for (int64_t piece = 0; piece < P; ++piece) AddColumns(want.Rows(piece * each, each), want_totals, piece * E);
    AddColumns(probs, want_totals, P * E);
    for (int64_t t = 0; t < T; ++t) Set(want_totals, P * E + E, Get(want_totals, P * E + E) + Get(logz, t) * Get(logz, t));
    ExpectNear(ToHost(totals, stream()), want_totals, 1e-12, 1e-300, "totals");
    for (int64_t block = 0; block < want.dim(0); ++block) {
      double choices = 0, probability = 0;
      for (int64_t e = 0; e < E; ++e) choices += Get(want, block * E + e), probability += Get(sums, block * (E + 1) + e);
      EXPECT_NEAR(probability, choices / K, 1e-5 * choices) << "one for each token, in block " << block;
    }
    TopKSigmoid(logits, bias, 1, other.probs, other.chosen, other.weights, stream(), counts);
    const Tensor others = ToHost(other.chosen, stream());
    ExpectSameBits(ToHost(counts.counts, stream()), ToHost(TallyOf(others, E, P, stream()).counts, stream()), "counts of sigmoids");
    const Tensor counted = Empty({P * E}, DType::kF64, stream());
    SumTally(counts, counted, stream());
    const Tensor want_counted = Zeros({P * E}, DType::kF64);
    for (int64_t piece = 0; piece < P; ++piece) {
      AddColumns(ToHost(counts.counts, stream()).Rows(piece * each, each), want_counted, piece * E);
    }
    ExpectSameBits(ToHost(counted, stream()), want_counted, "totals of sigmoids");
  }
}

TEST_P(RoutingWithoutTheHost, TotalsAreAddedToWhatIsThere) {
  for (const auto& [T, E, K] : {std::tuple(0, 3, 2), {7, 1, 1}, {500, 70, 3}, {33, 2000, 2}}) {
    SCOPED_TRACE(ShapeString({T, E, K}));
    const Tensor chosen = Empty({T, K}, DType::kI32), start = Empty({1 + 2 * E}, DType::kF64), counts = Zeros({E}, DType::kF64);
    for (int64_t i = 0; i < T * K; ++i) {
      chosen.data<int32_t>()[i] = static_cast<int32_t>(i * i % E);
      Set(counts, i * i % E, Get(counts, i * i % E) + 1);
    }
    std::fill_n(start.data<double>(), start.elements(), 0.5);
    Tally tally = TallyOf(chosen, E, /*pieces=*/1, stream());
    const Tensor by_block = Random({tally.counts.dim(0), E + 1}, DType::kF64, 2), want = Zeros({E + 1}, DType::kF64);
    AddColumns(by_block, want, 0);
    const Tensor sums = Upload(start, stream());
    const TallyTotals totals = {.counts = sums.Rows(1, E), .probs = sums.Rows(1 + E, E), .z = sums.Rows(0, 1)};
    const auto i32 = [&](Shape shape) { return Empty(std::move(shape), DType::kI32, stream()); };
    const Tensor offset = i32({T + 1}), segments = i32({E, 3}), slot = i32({T * K}), token = i32({T * K}), pairs = Upload(chosen, stream());
    OrderByExpert(pairs, tally, offset, segments, slot, token, totals, stream());  // Without sums.
    tally.sums = Upload(by_block, stream());
    OrderByExpert(pairs, tally, offset, segments, slot, token, totals, stream());
    OrderByExpert(pairs, tally, offset, segments, slot, token, {}, stream());
    const Tensor got = ToHost(sums, stream());
    EXPECT_NEAR(Get(got, 0), 0.5 + Get(want, E), 1e-12);
    for (int e = 0; e < E; ++e) {
      EXPECT_EQ(Get(got, 1 + e), 0.5 + 2 * Get(counts, e)) << e;
      EXPECT_NEAR(Get(got, 1 + E + e), 0.5 + Get(want, e), 1e-12) << e;
    }
  }
}

TEST_P(RoutingWithoutTheHost, GradientsOfCountsAreOfALayerOrOfAll) {
  const int64_t L = 3, N = 40, first = 7, E = 30;
  const Tensor sums = Random({L, N}, DType::kF64, 1);
  const Tensor each = Empty({L, E}, DType::kF32, stream()), all = Empty({L, E}, DType::kF32, stream());
  GradientOfCounts(Upload(sums, stream()), first, CountsOf::kEachLayer, 0.25, each, stream());
  GradientOfCounts(Upload(sums, stream()), first, CountsOf::kAllLayers, 0.25, all, stream());
  const Tensor of_layer = ToHost(each, stream()), of_all = ToHost(all, stream());
  for (int64_t at = 0; at < L * E; ++at) {
    const int64_t column = first + at % E;
    EXPECT_FLOAT_EQ(of_layer.data<float>()[at], static_cast<float>(0.25 * Get(sums, at / E * N + column)));
    const double sum = Get(sums, column) + Get(sums, N + column) + Get(sums, 2 * N + column);
    EXPECT_NEAR(of_all.data<float>()[at], 0.25 * sum, 1e-6);
  }
}

TEST_P(RoutingWithoutTheHost, SequencesAreCountedAndTheirLossIsAdded) {
  for (const auto& [Q, seq, E, K] : {std::tuple(0, 4, 3, 2), {1, 1, 1, 1}, {3, 50, 8, 2}, {2, 300, 600, 6}}) {
    SCOPED_TRACE(ShapeString({Q, seq, E, K}));
    const Tensor chosen = Empty({Q * seq, K}, DType::kI32), shares = Random({Q, E}, DType::kF64, 1), want = Zeros({Q, E}, DType::kF64);
    double loss = 3;
    for (int64_t i = 0; i < chosen.elements(); ++i) {
      const int64_t expert = (i * i + 3 * i) % E, at = i / (seq * K) * E + expert;
      chosen.data<int32_t>()[i] = static_cast<int32_t>(expert);
      Set(want, at, Get(want, at) + 1.5 * E / (seq * K));
    }
    for (int64_t i = 0; i < want.elements(); ++i) loss += 0.125 * Get(want, i) * Get(shares, i);
    const Tensor load = Empty({Q, E}, DType::kF32, stream()), start = Empty({1}, DType::kF64);
    *start.data<double>() = 3;
    const Tensor sum = Upload(start, stream());
    SequenceLoads(Upload(chosen, stream()), 1.5f, load, stream());
    AddSequenceLoss(load, Upload(shares, stream()), 0.125, sum, stream());
    ExpectNear(ToHost(load, stream()), want, 3 * 0x1p-24, 0, "load");
    EXPECT_NEAR(Get(ToHost(sum, stream()), 0), loss, 1e-6 * (Q * E + 1));
  }
}

TEST_P(RoutingWithoutTheHost, TheGradientByADivisorIsTheSlope) {
  for (const auto& [R, N] : {std::pair(1, 1), {40, 33}}) {
    SCOPED_TRACE(ShapeString({R, N}));
    const Tensor x = Random({R, N}, DType::kF32, 1), dy = Random({R, N}, DType::kF32, 2), by = Empty({1}, DType::kF32);
    *by.data<float>() = 0.3f;
    const Tensor y = Upload(x, stream()), divisor = Upload(by, stream()), dby = Upload(by, stream());
    DivideBy(y, divisor, y, stream());
    DivideByBackward(Upload(dy, stream()), y, divisor, dby, stream());
    const Tensor got = ToHost(y, stream());
    double slope = 0, size = 1;  // Of sum(dy * x / by).
    for (int64_t i = 0; i < x.elements(); ++i) {
      EXPECT_FLOAT_EQ(got.data<float>()[i], x.data<float>()[i] / 0.3f);
      slope -= Get(dy, i) * Get(x, i) / (0.3 * 0.3);
      size += std::abs(Get(dy, i) * Get(x, i)) / (0.3 * 0.3);
    }
    EXPECT_NEAR(Get(ToHost(dby, stream()), 0), 0.3 + slope, 1e-6 * size);
  }
}

}  // namespace
}  // namespace shoal::kernels
