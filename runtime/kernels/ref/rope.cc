#include "runtime/kernels/rope.h"

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void Rope(const Tensor& x, int heads, int dim, const RopeTable& table, RopeDirection direction, Stream&) {
  const int64_t T = x.dim(0), width = x.dim(1), seq = table.cos.dim(0), half = dim / 2;
  for (int64_t t = 0; t < T; ++t) {
    for (int head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < half; ++i) {
        const int64_t low = t * width + head * dim + i, high = low + half;
        const double cos = Get(table.cos, t % seq * half + i);
        const double sin =
            Get(table.sin, t % seq * half + i) * (direction == RopeDirection::kForward ? 1 : -1);
        const double a = Get(x, low), b = Get(x, high);
        Set(x, low, a * cos - b * sin);
        Set(x, high, b * cos + a * sin);
      }
    }
  }
}

}  // namespace shoal::kernels::ref
