// How a library that stores matrices by columns is asked for a row-major c = op(a) op(b): as c^T = op(b)^T op(a)^T, where the
// transpose of a row-major matrix is the same memory read by columns. So its first operand is b, its second is a, and each is
// transposed when ours is.
#pragma once

#include <algorithm>

#include "runtime/kernels/device_kernels.h"

namespace shoal::cuda {

struct ColumnMatrix {
  int64_t rows, columns, leading;  // As stored; from one column to the next.
};

// result[m, n] = op(first)[m, k] op(second)[k, n]
struct ColumnProduct {
  int64_t m, n, k;
  bool transpose_first, transpose_second;
  ColumnMatrix first, second, result;
};

inline ColumnProduct ByColumns(const DeviceTensor& a, bool transpose_a, const DeviceTensor& b, bool transpose_b,
                               const DeviceTensor& c) {
  const auto turned = [](const DeviceTensor& x) { return ColumnMatrix{x.shape[1], x.shape[0], std::max<int64_t>(x.shape[1], 1)}; };
  return {.m = c.shape[1],
          .n = c.shape[0],
          .k = a.shape[transpose_a ? 0 : 1],
          .transpose_first = transpose_b,
          .transpose_second = transpose_a,
          .first = turned(b),
          .second = turned(a),
          .result = turned(c)};
}

}  // namespace shoal::cuda
