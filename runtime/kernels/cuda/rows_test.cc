// Kernels on rows: norm.h, rope.h, swiglu.h and cross_entropy.h.
#include <cmath>
#include <limits>

#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/rope.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

// Additions that follow one another in a sum of n: 16 of a thread that holds a part of a row or n / 256 of one that walks over it, 10 of
// a block.
double Chain(int64_t n) { return 32 + static_cast<double>(n) / 256; }

enum class Delta { kNone, kOwnSum, kInPlace };

void ExpectRmsNormMatches(int64_t T, int64_t D, DType act, Delta delta, bool odd) {
  SCOPED_TRACE(ShapeString({T, D}) + " " + std::string(Name(act)) + " delta " + std::to_string(static_cast<int>(delta)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor x = Random({T, D}, DType::kF32, 1), weight = Random({D}, DType::kF32, 2);
  const Tensor more = delta == Delta::kNone ? Tensor() : Random({T, D}, act, 3);
  const Tensor want_sum = Empty({T, D}, DType::kF32), want_y = Empty({T, D}, DType::kF64), want_rstd = Empty({T}, DType::kF64);
  ref::RmsNorm(x, more, weight, 1e-5f, want_sum, want_y, want_rstd, cpu);
  const Tensor input = odd ? ToOddAddress(x, *stream) : ToDevice(x, *stream);
  const Tensor sum = delta == Delta::kNone ? Tensor() : delta == Delta::kInPlace ? input : Empty({T, D}, DType::kF32, *stream);
  const Tensor y = Empty({T, D}, act, *stream), rstd = Empty({T}, DType::kF32, *stream);
  RmsNorm(input, more.empty() ? Tensor() : ToDevice(more, *stream), ToDevice(weight, *stream), 1e-5f, sum, y, rstd, *stream);
  const double error = 0x1p-24 * Chain(D);
  ExpectNear(ToHost(y, *stream), want_y, error + Roundoff(act), 0, "y");
  ExpectNear(ToHost(rstd, *stream), want_rstd, error, 0, "rstd");
  if (delta != Delta::kNone) ExpectSameBits(ToHost(sum, *stream), want_sum, "sum");
}

TEST(CudaRmsNorm, MatchesReference) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const int64_t D : {1, 3, 33, 64, 257, 520, 1024, 2048}) {
      ExpectRmsNormMatches(3, D, act, Delta::kNone, /*odd=*/false);
      ExpectRmsNormMatches(3, D, act, Delta::kInPlace, /*odd=*/D % 2 == 0);
    }
    ExpectRmsNormMatches(70, 128, act, Delta::kOwnSum, /*odd=*/false);
    ExpectRmsNormMatches(2, 16384, act, Delta::kInPlace, /*odd=*/false);
    ExpectRmsNormMatches(1, 16388, act, Delta::kOwnSum, /*odd=*/false);
    ExpectRmsNormMatches(0, 16, act, Delta::kNone, /*odd=*/false);
  }
}

void ExpectRmsNormBackwardMatches(int64_t T, int64_t D, DType act, bool odd) {
  SCOPED_TRACE(ShapeString({T, D}) + " " + std::string(Name(act)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor x = Random({T, D}, DType::kF32, 1), weight = Random({D}, DType::kF32, 2), dy = Random({T, D}, act, 3);
  const Tensor dx_before = Random({T, D}, DType::kF32, 4), dweight_before = Random({D}, DType::kF32, 5), rstd = Empty({T}, DType::kF32);
  ref::RmsNorm(x, Tensor(), weight, 1e-5f, Tensor(), Empty({T, D}, DType::kF64), rstd, cpu);
  const Tensor want_dx = As(dx_before, DType::kF64), want_dweight = As(dweight_before, DType::kF64);
  ref::RmsNormBackward(dy, x, weight, rstd, want_dx, want_dweight, cpu);
  const auto run = [&] {
    const Tensor dx = odd ? ToOddAddress(dx_before, *stream) : ToDevice(dx_before, *stream), dweight = ToDevice(dweight_before, *stream);
    RmsNormBackward(ToDevice(dy, *stream), ToDevice(x, *stream), ToDevice(weight, *stream), ToDevice(rstd, *stream), dx, dweight, *stream);
    return std::pair(ToHost(dx, *stream), ToHost(dweight, *stream));
  };
  const auto [dx, dweight] = run();
  const double terms = MaxAbs(dy) * MaxAbs(weight) * MaxAbs(rstd), x_normed = MaxAbs(x) * MaxAbs(rstd);
  ExpectNear(dx, want_dx, 0, 0x1p-24 * Chain(D) * (MaxAbs(dx_before) + terms * (1 + x_normed * x_normed)), "dx");
  const double dweight_size = MaxAbs(dweight_before) + static_cast<double>(T) * MaxAbs(dy) * x_normed;
  ExpectNear(dweight, want_dweight, 0, 0x1p-24 * (16 + static_cast<double>(T) / 64) * dweight_size, "dweight");
  ExpectSameBits(run().second, dweight, "dweight, again");
}

TEST(CudaRmsNormBackward, MatchesReference) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const int64_t D : {1, 3, 33, 64, 257, 512, 1024, 2048}) ExpectRmsNormBackwardMatches(3, D, act, /*odd=*/D == 512);
    ExpectRmsNormBackwardMatches(150, 132, act, /*odd=*/false);
    ExpectRmsNormBackwardMatches(6, 16384, act, /*odd=*/false);
    ExpectRmsNormBackwardMatches(5, 16388, act, /*odd=*/false);
    ExpectRmsNormBackwardMatches(0, 16, act, /*odd=*/false);
  }
}

void ExpectRopeMatches(int64_t T, int64_t seq, int heads, int dim, int64_t rest, DType act, RopeDirection direction) {
  SCOPED_TRACE(ShapeString({T, seq, heads, dim}) + " " + std::string(Name(act)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const int64_t width = heads * dim + rest;  // The last ones belong to something else and stay.
  const Tensor x = Random({T, width}, act, 1), want = As(x, DType::kF64);
  const RopeTable table = MakeRopeTable(seq, dim, 10000);
  ref::Rope(want, heads, dim, table, direction, cpu);
  const Tensor on_device = ToDevice(x, *stream);
  Rope(on_device, heads, dim, {.cos = ToDevice(table.cos, *stream), .sin = ToDevice(table.sin, *stream)}, direction, *stream);
  const Tensor got = ToHost(on_device, *stream);
  ExpectNear(got, want, Roundoff(act), 3 * 0x1p-24 * MaxAbs(x), "x");
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = heads * dim; i < width; ++i) EXPECT_EQ(Get(got, t * width + i), Get(x, t * width + i));
  }
}

TEST(CudaRope, MatchesReference) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kBackward}) {
      for (const int dim : {2, 6, 16, 64}) ExpectRopeMatches(10, 5, 3, dim, 3, act, direction);
      ExpectRopeMatches(37, 37, 5, 128, 128, act, direction);
      ExpectRopeMatches(0, 8, 2, 16, 0, act, direction);
      ExpectRopeMatches(4, 4, 0, 16, 8, act, direction);
    }
  }
}

// Of exp and five more operations in f32; the sigmoid of bf16 is less exact, by the size of what it is taken of.
double SigmoidError(DType act, double gate) { return 0x1p-24 * (8 + (act == DType::kBF16 ? 4 * gate : 0)); }

void ExpectSwiGluMatches(int64_t R, int64_t F, DType act, double stddev) {
  SCOPED_TRACE(ShapeString({R, F}) + " " + std::string(Name(act)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor gate_up = Random({R, 2 * F}, act, 1, stddev), want = Empty({R, F}, DType::kF64), h = Empty({R, F}, act, *stream);
  ref::SwiGlu(gate_up, want, cpu);
  SwiGlu(ToDevice(gate_up, *stream), h, *stream);
  const double gate = MaxAbs(gate_up);
  ExpectNear(ToHost(h, *stream), want, SigmoidError(act, gate) + Roundoff(act), 2e-38 * gate * gate, "h");
}

void ExpectSwiGluBackwardMatches(int64_t R, int64_t F, DType act, bool in_place) {
  SCOPED_TRACE(ShapeString({R, F}) + " " + std::string(Name(act)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const Tensor gate_up = Random({R, 2 * F}, act, 1, 3), dh = Random({R, F}, act, 2);
  const Tensor want_dgate_up = Empty({R, 2 * F}, DType::kF64), want_h = Empty({R, F}, DType::kF64);
  ref::SwiGluBackward(dh, gate_up, want_dgate_up, want_h, cpu);
  const Tensor input = ToDevice(gate_up, *stream), grad = ToDevice(dh, *stream);
  const Tensor dgate_up = in_place ? input : Empty({R, 2 * F}, act, *stream), h = in_place ? grad : Empty({R, F}, act, *stream);
  SwiGluBackward(grad, input, dgate_up, h, *stream);
  const double gate = MaxAbs(gate_up), error = SigmoidError(act, gate);
  // The gate's gradient is a difference for negative gates: 1 + g (1 - s) passes through 0.
  ExpectNear(ToHost(dgate_up, *stream), want_dgate_up, error + Roundoff(act), error * MaxAbs(dh) * gate, "dgate_up");
  ExpectNear(ToHost(h, *stream), want_h, error + Roundoff(act), 1e-36, "h");
}

TEST(CudaSwiGlu, MatchesReference) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const int64_t F : {1, 3, 8, 33, 257, 1024}) {
      ExpectSwiGluMatches(5, F, act, 3);
      ExpectSwiGluBackwardMatches(5, F, act, /*in_place=*/false);
      ExpectSwiGluBackwardMatches(5, F, act, /*in_place=*/true);
    }
    ExpectSwiGluMatches(4, 64, act, 60);
    ExpectSwiGluMatches(60, 200, act, 3);
    ExpectSwiGluMatches(0, 16, act, 1);
    ExpectSwiGluBackwardMatches(0, 16, act, /*in_place=*/false);
  }
}

TEST(CudaSwiGlu, KeepsNaNAndSaturates) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const DType act : {DType::kF32, DType::kBF16}) {
    const Tensor gate_up = Zeros({1, 64}, act), h = Empty({1, 32}, act, *stream);
    for (int64_t i = 32; i < 64; ++i) Set(gate_up, i, 1);
    const double values[] = {std::numeric_limits<double>::quiet_NaN(), 0x1p99, -1000, -88.0};
    for (int64_t i = 0; i < 4; ++i) Set(gate_up, 3 + i, values[i]);
    SwiGlu(ToDevice(gate_up, *stream), h, *stream);
    const Tensor got = ToHost(h, *stream);
    EXPECT_TRUE(std::isnan(Get(got, 3)));
    EXPECT_EQ(Get(got, 4), 0x1p99);
    EXPECT_NEAR(Get(got, 5), 0, 1e-34);
    EXPECT_NEAR(Get(got, 6), 0, 1e-34);
    EXPECT_EQ(Get(got, 7), 0);
  }
}

enum class Gradient { kNone, kF32, kInPlace, kBF16 };

void ExpectCrossEntropyMatches(const Tensor& logits, Gradient gradient) {
  const int64_t C = logits.dim(0), V = logits.dim(1);
  SCOPED_TRACE(ShapeString({C, V}) + " gradient " + std::to_string(static_cast<int>(gradient)));
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const float scale = 0.125f;
  const Tensor targets = RandomIds({C}, V, 2);
  const Tensor want_loss = Empty({C}, DType::kF64), want_dlogits = Empty({C, V}, DType::kF64);
  ref::CrossEntropy(logits, targets, scale, want_loss, want_dlogits, cpu);
  const DType act = gradient == Gradient::kBF16 ? DType::kBF16 : DType::kF32;
  const Tensor input = ToDevice(logits, *stream), loss = Empty({C}, DType::kF32, *stream);
  const Tensor dlogits = gradient == Gradient::kNone      ? Tensor()
                         : gradient == Gradient::kInPlace ? input
                                                          : Empty({C, V}, act, *stream);
  CrossEntropy(input, ToDevice(targets, *stream), scale, loss, dlogits, *stream);
  // A thread adds up V / 1024; the difference x - max is exact or rounds once, which e^ magnifies.
  const double error = 0x1p-24 * (static_cast<double>(V) / 1024 + 24 + 2 * MaxAbs(logits));
  ExpectNear(ToHost(loss, *stream), want_loss, 0x1p-24, error, "loss");
  // Below e^-87 of the maximum, probabilities are 0.
  if (gradient != Gradient::kNone) ExpectNear(ToHost(dlogits, *stream), want_dlogits, error + Roundoff(act), 1e-37, "dlogits");
}

TEST(CudaCrossEntropy, MatchesReference) {
  for (const Gradient gradient : {Gradient::kNone, Gradient::kF32, Gradient::kInPlace, Gradient::kBF16}) {
    for (const int64_t V : {1, 2, 33, 257, 1000, 9000}) ExpectCrossEntropyMatches(Random({2, V}, DType::kF32, 1, 3), gradient);
    ExpectCrossEntropyMatches(Random({7, 64}, DType::kF32, 1, 3), gradient);
    ExpectCrossEntropyMatches(Random({0, 16}, DType::kF32, 1), gradient);
    // The maximum rises from pack to pack, by more than e^ can hold.
    const Tensor rising = Random({1, 40000}, DType::kF32, 1);
    for (int64_t i = 0; i < rising.elements(); ++i) rising.data<float>()[i] += static_cast<float>(i) * 0.02f - 500;
    ExpectCrossEntropyMatches(rising, gradient);
  }
}

TEST(CudaCrossEntropy, MasksMinusInfinityAndShowsNaN) {
  const std::unique_ptr<Stream> stream = TestStream();
  const int64_t V = 10000;
  const Tensor logits = Zeros({2, V}, DType::kF32), targets = Zeros({2}, DType::kI32);
  // Half is masked; e^88.8, the rest below 0, would be infinite.
  for (int64_t i = 0; i < V; ++i) logits.data<float>()[i] = i < 5000 ? -std::numeric_limits<float>::infinity() : -88.8f;
  targets.data<int32_t>()[0] = 6000;
  logits.data<float>()[V + 9999] = std::numeric_limits<float>::quiet_NaN();
  const Tensor loss_on_device = Empty({2}, DType::kF32, *stream), dlogits_on_device = Empty({2, V}, DType::kF32, *stream);
  CrossEntropy(ToDevice(logits, *stream), ToDevice(targets, *stream), 1, loss_on_device, dlogits_on_device, *stream);
  const Tensor loss = ToHost(loss_on_device, *stream), dlogits = ToHost(dlogits_on_device, *stream);
  EXPECT_NEAR(Get(loss, 0), std::log(5000.0), 1e-4);
  EXPECT_EQ(Get(dlogits, 0), 0);
  EXPECT_EQ(Get(dlogits, 4999), 0);
  EXPECT_NEAR(Get(dlogits, 5000), 1.0 / 5000, 1e-8);
  EXPECT_NEAR(Get(dlogits, 6000), 1.0 / 5000 - 1, 1e-6);
  EXPECT_TRUE(std::isnan(Get(loss, 1)));
  EXPECT_TRUE(std::isnan(Get(dlogits, V)));
}

}  // namespace
}  // namespace shoal::kernels
