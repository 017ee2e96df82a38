// Elements of tensors as doubles, whatever their type: references compute in f64 and take f64 tensors too, so
// that finite differences of a forward pass can check its backward pass. For ref/ and tests: slow.
#pragma once

#include "runtime/tensor/tensor.h"

namespace shoal::kernels::ref {

inline double Get(const Tensor& tensor, int64_t index) {
  SHOAL_CHECK(index >= 0 && index < tensor.elements()) << index << " of " << ShapeString(tensor.shape());
  switch (tensor.dtype()) {
    case DType::kF64:
      return tensor.data<double>()[index];
    case DType::kF32:
      return static_cast<double>(tensor.data<float>()[index]);
    case DType::kBF16:
      return static_cast<double>(static_cast<float>(tensor.data<BFloat16>()[index]));
    case DType::kI32:
      return tensor.data<int32_t>()[index];
    case DType::kI64:
      return static_cast<double>(tensor.data<int64_t>()[index]);
    default:
      break;
  }
  SHOAL_CHECK(false) << "no reference reads " << Name(tensor.dtype());
  return 0;
}

inline void Set(const Tensor& tensor, int64_t index, double value) {
  SHOAL_CHECK(index >= 0 && index < tensor.elements()) << index << " of " << ShapeString(tensor.shape());
  switch (tensor.dtype()) {
    case DType::kF64:
      tensor.data<double>()[index] = value;
      return;
    case DType::kF32:
      tensor.data<float>()[index] = static_cast<float>(value);
      return;
    case DType::kBF16:
      tensor.data<BFloat16>()[index] = BFloat16(static_cast<float>(value));
      return;
    case DType::kI32:
      tensor.data<int32_t>()[index] = static_cast<int32_t>(value);
      return;
    case DType::kI64:
      tensor.data<int64_t>()[index] = static_cast<int64_t>(value);
      return;
    default:
      break;
  }
  SHOAL_CHECK(false) << "no reference writes " << Name(tensor.dtype());
}

inline void AddAt(const Tensor& tensor, int64_t index, double value) {
  Set(tensor, index, Get(tensor, index) + value);
}

// An index that is stored in a tensor.
inline int64_t GetIndex(const Tensor& tensor, int64_t index) {
  return static_cast<int64_t>(Get(tensor, index));
}

}  // namespace shoal::kernels::ref
