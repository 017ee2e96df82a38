#include "runtime/kernels/fp8.h"

#include <cmath>
#include <limits>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {
namespace {

// The nearest of e4m3's numbers, ties to even; |value| <= 448.
double NearestE4m3(double value) {
  if (value == 0) return value;
  const int power = std::max(std::ilogb(value), -6);
  const double unit = std::ldexp(1, power - 3);
  return std::nearbyint(value / unit) * unit;
}

double ScaleFor(double largest) {
  double scale = std::ldexp(1, -100);
  while (largest / scale > 448) scale *= 2;
  return scale;
}

}  // namespace

void RoundToFp8(const Tensor& x, int64_t block_rows, const Tensor& values) {
  const int64_t R = x.dim(0), C = x.dim(1);
  for (int64_t row = 0; row < R; row += block_rows) {
    for (int64_t column = 0; column < C; column += kFp8Block) {
      const auto for_each = [&](const auto& body) {
        for (int64_t r = row; r < std::min(R, row + block_rows); ++r) {
          for (int64_t c = column; c < std::min(C, column + kFp8Block); ++c) body(r * C + c);
        }
      };
      double largest = 0;
      bool finite = true;
      for_each([&](int64_t i) {
        finite = finite && std::isfinite(Get(x, i));
        largest = std::max(largest, std::abs(Get(x, i)));
      });
      const double scale = finite ? ScaleFor(largest) : std::numeric_limits<double>::quiet_NaN();
      for_each([&](int64_t i) { Set(values, i, finite ? NearestE4m3(Get(x, i) / scale) * scale : scale); });
    }
  }
}

}  // namespace shoal::kernels::ref
