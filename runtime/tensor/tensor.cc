#include "runtime/tensor/tensor.h"

#include <cstring>

#include "absl/strings/str_join.h"
#include "runtime/device/device.h"
#include "runtime/device/memory.h"

namespace shoal {
namespace {

// A tensor on what a pool gave, or one without storage on a stream that is poisoned now.
Tensor OnStorage(absl::StatusOr<std::shared_ptr<void>> storage, Shape shape, DType dtype, Stream& stream) {
  if (storage.ok()) return Tensor(storage->get(), std::move(shape), dtype, *storage);
  stream.Fail(storage.status());
  return Tensor(nullptr, std::move(shape), dtype);
}

int64_t BytesOf(const Shape& shape, DType dtype) { return ElementCount(shape) * SizeOf(dtype); }

}  // namespace

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

Tensor Empty(Shape shape, DType dtype, Stream& stream) {
  if (stream.device() == nullptr) return Empty(std::move(shape), dtype);
  absl::StatusOr<std::shared_ptr<void>> storage = stream.device()->memory().Allocate(BytesOf(shape, dtype), stream);
  return OnStorage(std::move(storage), std::move(shape), dtype, stream);
}

Tensor Zeros(Shape shape, DType dtype, Stream& stream) {
  if (stream.device() == nullptr) return Zeros(std::move(shape), dtype);
  const Tensor tensor = Empty(std::move(shape), dtype, stream);
  FillWithZeros(tensor, stream);
  return tensor;
}

void FillWithZeros(const Tensor& tensor, Stream& stream) {
  if (!stream.status().ok() || tensor.bytes() == 0) return;
  if (stream.device() == nullptr) {
    std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.bytes()));
    return;
  }
  Device& device = *stream.device();
  device.Use();
  stream.Fail(device.StatusOf(device.api().fill(tensor.raw(), 0, tensor.bytes(), stream.handle()), "filling with zeros"));
}

void UsedOn(const Tensor& tensor, const Stream& stream) {
  if (stream.device() != nullptr) stream.device()->memory().UsedOn(tensor.raw(), stream);
}

Tensor EmptyHost(Shape shape, DType dtype, Stream& stream) {
  if (stream.device() == nullptr) return Empty(std::move(shape), dtype);
  absl::StatusOr<std::shared_ptr<void>> storage = stream.device()->pinned().Allocate(BytesOf(shape, dtype), stream);
  return OnStorage(std::move(storage), std::move(shape), dtype, stream);
}

void Copy(const Tensor& from, const Tensor& to, Stream& stream) {
  SHOAL_CHECK(from.dtype() == to.dtype() && from.elements() == to.elements())
      << Name(from.dtype()) << ShapeString(from.shape()) << " to " << Name(to.dtype()) << ShapeString(to.shape());
  if (!stream.status().ok() || from.bytes() == 0) return;
  if (stream.device() == nullptr) {
    std::memcpy(to.raw(), from.raw(), static_cast<size_t>(from.bytes()));
    return;
  }
  Device& device = *stream.device();
  device.Use();
  stream.Fail(device.StatusOf(device.api().copy(to.raw(), from.raw(), from.bytes(), stream.handle()), "copying"));
}

Tensor Upload(const Tensor& host, Stream& stream) {
  const Tensor to = Empty(host.shape(), host.dtype(), stream);
  if (stream.device() == nullptr) {
    Copy(host, to, stream);
    return to;
  }
  const Tensor staging = EmptyHost(host.shape(), host.dtype(), stream);
  if (!stream.status().ok()) return to;
  if (host.bytes() > 0) std::memcpy(staging.raw(), host.raw(), static_cast<size_t>(host.bytes()));
  Copy(staging, to, stream);
  return to;
}

absl::StatusOr<Tensor> Download(const Tensor& tensor, Stream& stream) {
  const Tensor staging = EmptyHost(tensor.shape(), tensor.dtype(), stream);
  Copy(tensor, staging, stream);
  SHOAL_RETURN_IF_ERROR(stream.Wait());
  if (stream.device() == nullptr) return staging;
  // Ordinary memory: pinned memory is for what is under way.
  Tensor host = Empty(tensor.shape(), tensor.dtype());
  if (host.bytes() > 0) std::memcpy(host.raw(), staging.raw(), static_cast<size_t>(host.bytes()));
  return host;
}

Tensor ToDevice(const Tensor& host, Stream& stream) {
  return stream.device() == nullptr || host.empty() ? host : Upload(host, stream);
}

absl::Status WriteFromHost(const Tensor& tensor, Stream& stream, const std::function<absl::Status(const Tensor& host)>& write) {
  if (stream.device() == nullptr) return write(tensor);
  const Tensor host = EmptyHost(tensor.shape(), tensor.dtype(), stream);
  SHOAL_RETURN_IF_ERROR(stream.status());
  SHOAL_RETURN_IF_ERROR(write(host));
  Copy(host, tensor, stream);
  return stream.Wait();
}

Tensor ToHost(const Tensor& tensor, Stream& stream) {
  if (stream.device() == nullptr || tensor.empty()) return tensor;
  absl::StatusOr<Tensor> host = Download(tensor, stream);
  return host.ok() ? *std::move(host) : Zeros(tensor.shape(), tensor.dtype());
}

}  // namespace shoal
