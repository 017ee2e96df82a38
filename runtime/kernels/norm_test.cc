#include "runtime/kernels/norm.h"

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

// Additions that follow one another in a sum of n, at the narrowest level: 4 lanes, 4 accumulators.
double Chain(int64_t n) { return static_cast<double>(n) / 16 + 12; }

void ExpectRmsNormMatches(int64_t T, int64_t D, DType act, bool with_delta, bool in_place) {
  SCOPED_TRACE(ShapeString({T, D}) + " " + std::string(Name(act)) + (with_delta ? " delta" : ""));
  Stream stream;
  const Tensor x = Random({T, D}, DType::kF32, 1), weight = Random({D}, DType::kF32, 2);
  const Tensor delta = with_delta ? Random({T, D}, act, 3) : Tensor();
  const Tensor want_sum = Empty({T, D}, DType::kF32);
  const Tensor want_y = Empty({T, D}, DType::kF64), want_rstd = Empty({T}, DType::kF64);
  ref::RmsNorm(x, delta, weight, 1e-5f, want_sum, want_y, want_rstd, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor input = Copy(x);
    const Tensor sum = !with_delta ? Tensor() : in_place ? input : Empty({T, D}, DType::kF32);
    const Tensor y = Empty({T, D}, act), rstd = Empty({T}, DType::kF32);
    RmsNorm(input, delta, weight, 1e-5f, sum, y, rstd, stream);
    return {y, rstd, with_delta ? sum : want_sum};
  };
  const double error = 0x1p-24 * Chain(D);
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want_y, error + Roundoff(act), 0, "y");
    ExpectNear(got[1], want_rstd, error, 0, "rstd");
    if (with_delta) ExpectSameBits(got[2], want_sum, "sum");
  });
}

TEST(RmsNorm, MatchesReference) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (int64_t D : {1, 5, 16, 31, 64, 520}) {
      ExpectRmsNormMatches(3, D, act, /*with_delta=*/false, /*in_place=*/false);
      ExpectRmsNormMatches(3, D, act, /*with_delta=*/true, /*in_place=*/false);
      ExpectRmsNormMatches(3, D, act, /*with_delta=*/true, /*in_place=*/true);
    }
    ExpectRmsNormMatches(101, 513, act, /*with_delta=*/true, /*in_place=*/true);
    ExpectRmsNormMatches(0, 16, act, /*with_delta=*/false, /*in_place=*/false);
  }
}

void ExpectRmsNormBackwardMatches(int64_t T, int64_t D, DType act) {
  SCOPED_TRACE(ShapeString({T, D}) + " " + std::string(Name(act)));
  Stream stream;
  const Tensor x = Random({T, D}, DType::kF32, 1), weight = Random({D}, DType::kF32, 2);
  const Tensor dy = Random({T, D}, act, 3), dx_before = Random({T, D}, DType::kF32, 4);
  const Tensor dweight_before = Random({D}, DType::kF32, 5), rstd = Empty({T}, DType::kF32);
  ref::RmsNorm(x, Tensor(), weight, 1e-5f, Tensor(), Empty({T, D}, DType::kF64), rstd, stream);
  const Tensor want_dx = As(dx_before, DType::kF64), want_dweight = As(dweight_before, DType::kF64);
  ref::RmsNormBackward(dy, x, weight, rstd, want_dx, want_dweight, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor dx = Copy(dx_before), dweight = Copy(dweight_before);
    RmsNormBackward(dy, x, weight, rstd, dx, dweight, stream);
    return {dx, dweight};
  };
  const double terms = MaxAbs(dy) * MaxAbs(weight) * MaxAbs(rstd);
  const double x_normed = MaxAbs(x) * MaxAbs(rstd);
  const double dx_size = MaxAbs(dx_before) + terms * (1 + x_normed * x_normed);
  const double dweight_size = MaxAbs(dweight_before) + static_cast<double>(T) * MaxAbs(dy) * x_normed;
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want_dx, 0, 0x1p-24 * Chain(D) * dx_size, "dx");
    ExpectNear(got[1], want_dweight, 0, 0x1p-24 * (64 + static_cast<double>(T) / 64) * dweight_size,
               "dweight");
  });
}

TEST(RmsNormBackward, MatchesReference) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (int64_t D : {1, 5, 16, 31, 64, 520}) ExpectRmsNormBackwardMatches(3, D, act);
    ExpectRmsNormBackwardMatches(200, 513, act);
    ExpectRmsNormBackwardMatches(0, 16, act);
  }
}

TEST(RmsNormBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const int64_t T = 3, D = 7;
  const Tensor x = Random({T, D}, DType::kF64, 1), weight = Random({D}, DType::kF64, 2);
  const Tensor dy = Random({T, D}, DType::kF64, 3);
  const Tensor y = Empty({T, D}, DType::kF64), rstd = Empty({T}, DType::kF64);
  const auto loss = [&] {
    ref::RmsNorm(x, Tensor(), weight, 1e-2f, Tensor(), y, rstd, stream);
    return Dot(y, dy);
  };
  loss();
  const Tensor dx = Zeros({T, D}, DType::kF64), dweight = Zeros({D}, DType::kF64);
  ref::RmsNormBackward(dy, x, weight, rstd, dx, dweight, stream);
  CheckGradient(x, dx, loss, "dx");
  CheckGradient(weight, dweight, loss, "dweight");
}

}  // namespace
}  // namespace shoal::kernels
