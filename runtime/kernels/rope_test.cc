#include "runtime/kernels/rope.h"

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

TEST(RopeTable, HoldsTheDefinedAngles) {
  const int64_t seq = 100;
  const int dim = 12;
  const RopeTable table = MakeRopeTable(seq, dim, 10000);
  for (int64_t t = 0; t < seq; ++t) {
    for (int i = 0; i < dim / 2; ++i) {
      const double angle = static_cast<double>(t) * std::pow(10000.0, -2.0 * i / dim);
      // The angle is rounded three times in f32, its cosine once.
      const double error = 4 * 0x1p-24 * (angle + 1);
      EXPECT_NEAR(Get(table.cos, t * dim / 2 + i), std::cos(angle), error);
      EXPECT_NEAR(Get(table.sin, t * dim / 2 + i), std::sin(angle), error);
    }
  }
}

void ExpectRopeMatches(int64_t T, int64_t seq, int heads, int dim, DType act, RopeDirection direction) {
  SCOPED_TRACE(ShapeString({T, seq, heads, dim}) + " " + std::string(Name(act)));
  Stream stream;
  const int64_t width = heads * dim + 3;  // The last 3 belong to something else and stay.
  const Tensor x = Random({T, width}, act, 1), want = As(x, DType::kF64);
  const RopeTable table = MakeRopeTable(seq, dim, 10000);
  ref::Rope(want, heads, dim, table, direction, stream);
  const auto run = [&]() -> std::vector<Tensor> {
    const Tensor got = Copy(x);
    Rope(got, heads, dim, table, direction, stream);
    return {got};
  };
  SweepLevels(run, [&](const std::vector<Tensor>& got) {
    ExpectNear(got[0], want, Roundoff(act), 3 * 0x1p-24 * MaxAbs(x), "x");
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = heads * dim; i < width; ++i)
        EXPECT_EQ(Get(got[0], t * width + i), Get(x, t * width + i));
    }
  });
}

TEST(Rope, MatchesReference) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (RopeDirection direction : {RopeDirection::kForward, RopeDirection::kBackward}) {
      for (int dim : {2, 6, 16, 32, 36, 64}) ExpectRopeMatches(10, 5, 3, dim, act, direction);
      ExpectRopeMatches(301, 301, 4, 64, act, direction);
      ExpectRopeMatches(0, 8, 2, 16, act, direction);
      ExpectRopeMatches(4, 4, 0, 16, act, direction);
    }
  }
}

TEST(Rope, BackwardIsTheTranspose) {
  Stream stream;
  const RopeTable table = MakeRopeTable(5, 6, 100);
  const Tensor x = Random({5, 12}, DType::kF64, 1), dy = Random({5, 12}, DType::kF64, 2);
  const auto loss = [&] {
    const Tensor y = Copy(x);
    ref::Rope(y, 2, 6, table, RopeDirection::kForward, stream);
    return Dot(y, dy);
  };
  const Tensor dx = Copy(dy);
  ref::Rope(dx, 2, 6, table, RopeDirection::kBackward, stream);
  CheckGradient(x, dx, loss, "dx");
}

}  // namespace
}  // namespace shoal::kernels
