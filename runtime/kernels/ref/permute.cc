#include "runtime/kernels/permute.h"

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void GatherRows(const Tensor& x, const Tensor& token, const Tensor& rows, Stream&) {
  const int64_t D = x.dim(1), R = token.dim(0);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t d = 0; d < D; ++d) Set(rows, r * D + d, Get(x, GetIndex(token, r) * D + d));
  }
}

void SumSlots(const Tensor& drows, const Tensor& offset, const Tensor& slot, const Tensor& dx, Stream&) {
  const int64_t T = dx.dim(0), D = dx.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for (int64_t pair = GetIndex(offset, t); pair < GetIndex(offset, t + 1); ++pair) {
        sum += Get(drows, GetIndex(slot, pair) * D + d);
      }
      Set(dx, t * D + d, sum);
    }
  }
}

void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                  const Tensor& out, Stream&) {
  const int64_t T = out.dim(0), D = out.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = Get(residual, t * D + d);
      for (int64_t pair = GetIndex(offset, t); pair < GetIndex(offset, t + 1); ++pair) {
        sum += Get(weight, pair) * Get(y, GetIndex(slot, pair) * D + d);
      }
      Set(out, t * D + d, sum);
    }
  }
}

void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                          const Tensor& dy, const Tensor& dweight, Stream&) {
  const int64_t T = dout.dim(0), D = dout.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t pair = GetIndex(offset, t); pair < GetIndex(offset, t + 1); ++pair) {
      const int64_t row = GetIndex(slot, pair) * D;
      double dot = 0;
      for (int64_t d = 0; d < D; ++d) {
        dot += Get(dout, t * D + d) * Get(y, row + d);
        Set(dy, row + d, Get(weight, pair) * Get(dout, t * D + d));
      }
      Set(dweight, pair, dot);
    }
  }
}

}  // namespace shoal::kernels::ref
