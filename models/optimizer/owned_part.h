// What a rank owns of the parameters: the only copy of their optimizer state.
#pragma once

#include <string>
#include <vector>

#include "runtime/tensor/tensor.h"

namespace shoal {

// Rows of one parameter that this rank owns, f32 views of [rows, ...]; all but the master weights are empty in a store for
// inference. The gradient is that of the whole batch once it is reduced.
struct OwnedPart {
  std::string name;
  Shape full_shape;
  int64_t row_begin = 0;
  int parameter = 0;
  Tensor master, gradient, exp_avg, exp_avg_sq;
};

}  // namespace shoal
