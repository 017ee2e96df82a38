#include "runtime/kernels/matmul.h"

#include "runtime/base/check.h"

namespace shoal::kernels::ref {
namespace {

double Load(const Tensor& x, int64_t index) {
  if (x.dtype() == DType::kBF16) return static_cast<float>(x.data<BFloat16>()[index]);
  return x.data<float>()[index];
}

void Store(const Tensor& x, int64_t index, double value) {
  if (x.dtype() == DType::kBF16) {
    x.data<BFloat16>()[index] = BFloat16(static_cast<float>(value));
  } else {
    x.data<float>()[index] = static_cast<float>(value);
  }
}

}  // namespace

void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b,
            Accumulate accumulate, const Tensor& c, Stream&) {
  const bool ta = transpose_a == Transpose::kYes;
  const bool tb = transpose_b == Transpose::kYes;
  const int64_t m = a.dim(ta ? 1 : 0);
  const int64_t k = a.dim(ta ? 0 : 1);
  const int64_t n = b.dim(tb ? 0 : 1);
  SHOAL_CHECK_EQ(b.dim(tb ? 1 : 0), k);
  SHOAL_CHECK(c.dim(0) == m && c.dim(1) == n) << ShapeString(c.shape());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate == Accumulate::kAdd ? Load(c, i * n + j) : 0;
      for (int64_t p = 0; p < k; ++p)
        sum += Load(a, ta ? p * m + i : i * k + p) * Load(b, tb ? j * k + p : p * n + j);
      Store(c, i * n + j, sum);
    }
  }
}

}  // namespace shoal::kernels::ref
