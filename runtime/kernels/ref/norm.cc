#include "runtime/kernels/norm.h"

#include <cmath>
#include <vector>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void RmsNorm(const Tensor& x, const Tensor& delta, const Tensor& weight, float epsilon, const Tensor& sum,
             const Tensor& y, const Tensor& rstd, Stream&) {
  const int64_t T = x.dim(0), D = x.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> row(static_cast<size_t>(D));
    double squares = 0;
    for (int64_t d = 0; d < D; ++d) {
      double value = Get(x, t * D + d);
      if (!delta.empty()) {
        Set(sum, t * D + d, value + Get(delta, t * D + d));
        value = Get(sum, t * D + d);
      }
      row[static_cast<size_t>(d)] = value;
      squares += value * value;
    }
    const double r = 1 / std::sqrt(squares / static_cast<double>(D) + static_cast<double>(epsilon));
    Set(rstd, t, r);
    for (int64_t d = 0; d < D; ++d) Set(y, t * D + d, row[static_cast<size_t>(d)] * r * Get(weight, d));
  }
}

void RmsNormBackward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                     const Tensor& dx, const Tensor& dweight, Stream&) {
  const int64_t T = x.dim(0), D = x.dim(1);
  std::vector<double> dweights(static_cast<size_t>(D));
  for (int64_t t = 0; t < T; ++t) {
    const double r = Get(rstd, t);
    double dot = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double dy_x = Get(dy, t * D + d) * Get(x, t * D + d);
      dot += dy_x * Get(weight, d);
      dweights[static_cast<size_t>(d)] += dy_x * r;
    }
    const double along_x = -dot * r * r * r / static_cast<double>(D);
    for (int64_t d = 0; d < D; ++d) {
      AddAt(dx, t * D + d, Get(dy, t * D + d) * Get(weight, d) * r + Get(x, t * D + d) * along_x);
    }
  }
  for (int64_t d = 0; d < D; ++d) AddAt(dweight, d, dweights[static_cast<size_t>(d)]);
}

}  // namespace shoal::kernels::ref
