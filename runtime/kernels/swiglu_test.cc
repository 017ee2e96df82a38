#include "runtime/kernels/swiglu.h"

#include <limits>

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

// exp within 2 units, and five more operations.
constexpr double kSigmoidError = 8 * 0x1p-24;

void ExpectSwiGluMatches(int64_t R, int64_t F, DType act, double stddev) {
  SCOPED_TRACE(ShapeString({R, F}) + " " + std::string(Name(act)));
  Stream stream;
  const Tensor gate_up = Random({R, 2 * F}, act, 1, stddev), want = Empty({R, F}, DType::kF64);
  ref::SwiGlu(gate_up, want, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor h = Empty({R, F}, act);
    SwiGlu(gate_up, h, stream);
    return {h};
  };
  // Below -87 the sigmoid stays at e^-87.
  const double floor = 2e-38 * MaxAbs(gate_up) * MaxAbs(gate_up);
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want, kSigmoidError + Roundoff(act), floor, "h");
  });
}

TEST(SwiGlu, MatchesReference) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (int64_t F : {1, 7, 16, 33, 100}) ExpectSwiGluMatches(4, F, act, 3);
    ExpectSwiGluMatches(4, 64, act, 60);
    ExpectSwiGluMatches(50, 513, act, 3);
    ExpectSwiGluMatches(0, 16, act, 1);
  }
}

void ExpectSwiGluBackwardMatches(int64_t R, int64_t F, DType act, bool in_place) {
  SCOPED_TRACE(ShapeString({R, F}) + " " + std::string(Name(act)));
  Stream stream;
  const Tensor gate_up = Random({R, 2 * F}, act, 1, 3), dh = Random({R, F}, act, 2);
  const Tensor want_dgate_up = Empty({R, 2 * F}, DType::kF64), want_h = Empty({R, F}, DType::kF64);
  ref::SwiGluBackward(dh, gate_up, want_dgate_up, want_h, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor input = Copy(gate_up), grad = Copy(dh);
    const Tensor dgate_up = in_place ? input : Empty({R, 2 * F}, act),
                 h = in_place ? grad : Empty({R, F}, act);
    SwiGluBackward(grad, input, dgate_up, h, stream);
    return {dgate_up, h};
  };
  // The gate's gradient is a difference for negative gates: 1 + g (1 - s) passes through 0.
  const double size = MaxAbs(dh) * MaxAbs(gate_up);
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want_dgate_up, kSigmoidError + Roundoff(act), 8 * 0x1p-24 * size, "dgate_up");
    ExpectNear(got[1], want_h, kSigmoidError + Roundoff(act), 1e-36, "h");
  });
}

TEST(SwiGluBackward, MatchesReference) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (bool in_place : {false, true}) {
      for (int64_t F : {1, 7, 16, 33, 100}) ExpectSwiGluBackwardMatches(4, F, act, in_place);
      ExpectSwiGluBackwardMatches(50, 513, act, in_place);
      ExpectSwiGluBackwardMatches(0, 16, act, in_place);
    }
  }
}

TEST(SwiGluBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const Tensor gate_up = Random({3, 10}, DType::kF64, 1, 2), dh = Random({3, 5}, DType::kF64, 2);
  const Tensor h = Empty({3, 5}, DType::kF64), dgate_up = Empty({3, 10}, DType::kF64);
  ref::SwiGluBackward(dh, gate_up, dgate_up, h, stream);
  CheckGradient(
      gate_up, dgate_up,
      [&] {
        ref::SwiGlu(gate_up, h, stream);
        return Dot(h, dh);
      },
      "dgate_up");
}

TEST(SwiGlu, KeepsNaNAndSaturates) {
  Stream stream;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  SweepLevels(
      [&]() -> std::vector<Tensor> {
        const Tensor gate_up = Zeros({1, 64}, DType::kF32), h = Empty({1, 32}, DType::kF32);
        for (float& value : gate_up.span<float>().subspan(32)) value = 1;
        gate_up.data<float>()[3] = nan;
        gate_up.data<float>()[4] = 1e30f;
        gate_up.data<float>()[5] = -1000;
        SwiGlu(gate_up, h, stream);
        return {h};
      },
      [](const std::vector<Tensor>& got) {
        EXPECT_TRUE(std::isnan(Get(got[0], 3)));
        EXPECT_EQ(got[0].data<float>()[4], 1e30f);
        EXPECT_NEAR(Get(got[0], 5), 0, 1e-34);
        EXPECT_EQ(Get(got[0], 6), 0);
      });
}

}  // namespace
}  // namespace shoal::kernels
