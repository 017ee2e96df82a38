// What a rank owns of the parameters: the only copy of their optimizer state.
#pragma once

#include <string>
#include <vector>

#include "runtime/tensor/tensor.h"

namespace shoal {

// Rows of one parameter that this rank owns, f32 views of [rows, ...]; the moments are empty views in a store for inference.
struct OwnedPart {
  std::string name;
  Shape full_shape;
  int64_t row_begin = 0;
  int parameter = 0;
  Tensor master, exp_avg, exp_avg_sq;
};

}  // namespace shoal
