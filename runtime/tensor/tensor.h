// A tensor: a shape, an element type and a pointer into shared storage. A value: copying it copies no data; the storage
// lives as long as any tensor on it. Row-major and contiguous, always. Not thread-safe to reassign; its bytes are as
// thread-safe as any memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "runtime/base/check.h"
#include "runtime/device/stream.h"
#include "runtime/tensor/dtype.h"

namespace shoal {

using Shape = absl::InlinedVector<int64_t, 4>;

int64_t ElementCount(const Shape& shape);
std::string ShapeString(const Shape& shape);  // "[2, 3]"

class Tensor {
 public:
  Tensor() = default;  // Shape [0], no storage.
  // Wraps `data` (at least ElementCount(shape) elements), which `owner` keeps alive. A null owner: the caller does.
  Tensor(void* data, Shape shape, DType dtype, std::shared_ptr<void> owner = nullptr);

  const Shape& shape() const { return shape_; }
  int64_t dim(int axis) const { return shape_[axis]; }
  int rank() const { return static_cast<int>(shape_.size()); }
  int64_t elements() const { return elements_; }
  int64_t bytes() const { return elements_ * SizeOf(dtype_); }
  DType dtype() const { return dtype_; }
  bool empty() const { return elements_ == 0; }
  void* raw() const { return data_; }

  // CHECKs the element type.
  template <class T> T* data() const {
    SHOAL_CHECK(dtype_ == DTypeOf<T>::value) << "tensor is " << Name(dtype_);
    return static_cast<T*>(data_);
  }
  template <class T> absl::Span<T> span() const { return {data<T>(), static_cast<size_t>(elements_)}; }

  // Views on the same storage. CHECK that they fit.
  Tensor Rows(int64_t begin, int64_t count) const;      // Along dimension 0.
  Tensor Elements(int64_t begin, Shape shape) const;    // From a flat offset.
  Tensor Reshape(Shape shape) const;

 private:
  void* data_ = nullptr;
  Shape shape_ = {0};
  int64_t elements_ = 0;
  DType dtype_ = DType::kF32;
  std::shared_ptr<void> owner_;
};

// Uninitialised host memory from the process's caching allocator (runtime/device/memory.h), 64-byte aligned, on 2 MiB
// pages when large. CHECKs that the system gives memory: its failure text says what is held.
Tensor Empty(Shape shape, DType dtype);
Tensor Zeros(Shape shape, DType dtype);

// In memory of the stream's device, for work on this stream; on the CPU stream as above. Another stream that uses the tensor must wait
// for this one first and be named to UsedOn before the tensor ends. A failure (out of memory) poisons the stream and gives a tensor of
// that shape without storage: nothing that is put on a poisoned stream runs.
Tensor Empty(Shape shape, DType dtype, Stream& stream);
Tensor Zeros(Shape shape, DType dtype, Stream& stream);
void UsedOn(const Tensor& tensor, const Stream& stream);
void FillWithZeros(const Tensor& tensor, Stream& stream);

// Host memory that the stream copies from and to without waiting; the host may read what the stream has written after waiting for it.
Tensor EmptyHost(Shape shape, DType dtype, Stream& stream);

// Between tensors of one type and size, each on the host or on the stream's device, in the order of the stream. Memory of the host
// that is not EmptyHost's makes the caller wait.
void Copy(const Tensor& from, const Tensor& to, Stream& stream);
// A copy of a host tensor, which may be changed at once, in memory of the stream. Does not wait.
Tensor Upload(const Tensor& host, Stream& stream);
// The opposite; waits for the stream.
absl::StatusOr<Tensor> Download(const Tensor& tensor, Stream& stream);

// For code that runs on any stream. A host tensor where kernels of the stream can read it: itself on the CPU stream, else Upload.
Tensor ToDevice(const Tensor& host, Stream& stream);
// A tensor where the host can read it: itself on the CPU stream, else Download, and zeros from a stream that failed.
Tensor ToHost(const Tensor& tensor, Stream& stream);
// Has `write` write a host tensor of this shape and type: `tensor` itself on the CPU stream, else one that is then copied there. Waits.
absl::Status WriteFromHost(const Tensor& tensor, Stream& stream, const std::function<absl::Status(const Tensor& host)>& write);

}  // namespace shoal
