#include "runtime/tensor/tensor.h"

#include <cstring>

#include "absl/strings/str_join.h"
#include "runtime/device/memory.h"

namespace shoal {

std::string_view Name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "f32";
    case DType::kBF16: return "bf16";
    case DType::kF16: return "f16";
    case DType::kF64: return "f64";
    case DType::kI8: return "i8";
    case DType::kU8: return "u8";
    case DType::kI32: return "i32";
    case DType::kI64: return "i64";
  }
  return "unknown";
}

int64_t ElementCount(const Shape& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

std::string ShapeString(const Shape& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

Tensor::Tensor(void* data, Shape shape, DType dtype, std::shared_ptr<void> owner)
    : data_(data), shape_(std::move(shape)), elements_(ElementCount(shape_)), dtype_(dtype), owner_(std::move(owner)) {}

Tensor Tensor::Rows(int64_t begin, int64_t count) const {
  SHOAL_CHECK(begin >= 0 && count >= 0 && begin + count <= dim(0))
      << "rows " << begin << "+" << count << " of " << ShapeString(shape_);
  const int64_t row = dim(0) == 0 ? 0 : elements_ / dim(0);
  Shape shape = shape_;
  shape[0] = count;
  return Tensor(static_cast<std::byte*>(data_) + begin * row * SizeOf(dtype_), std::move(shape), dtype_, owner_);
}

Tensor Tensor::Elements(int64_t begin, Shape shape) const {
  SHOAL_CHECK(begin >= 0 && begin + ElementCount(shape) <= elements_)
      << ShapeString(shape) << " at " << begin << " of " << ShapeString(shape_);
  return Tensor(static_cast<std::byte*>(data_) + begin * SizeOf(dtype_), std::move(shape), dtype_, owner_);
}

Tensor Tensor::Reshape(Shape shape) const {
  SHOAL_CHECK_EQ(ElementCount(shape), elements_);
  return Tensor(data_, std::move(shape), dtype_, owner_);
}

Tensor Empty(Shape shape, DType dtype) {
  const int64_t bytes = ElementCount(shape) * SizeOf(dtype);
  std::shared_ptr<void> storage = HostMemory::Get().Allocate(bytes);
  return Tensor(storage.get(), std::move(shape), dtype, storage);
}

Tensor Zeros(Shape shape, DType dtype) {
  Tensor tensor = Empty(std::move(shape), dtype);
  if (tensor.bytes() > 0) std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.bytes()));
  return tensor;
}

}  // namespace shoal
