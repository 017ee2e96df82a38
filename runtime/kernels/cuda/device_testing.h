// The device that tests of kernels run on: an emulated one (fake_device.h with the kernels of this folder on emulator.h, products of
// dense matrices by the CPU's kernel), or with SHOAL_TEST_DEVICE=cuda the first GPU. Tests call the public functions of
// runtime/kernels/*.h with a stream from here:
//
//   const std::unique_ptr<Stream> stream = TestStream();
//   const Tensor y = Empty({T, D}, dtype, *stream);
//   RmsNorm(ToDevice(x, *stream), ..., y, *stream);
//   ExpectNear(ToHost(y, *stream), want, ...);
//
// Emulated streams work only when they are waited for, and the host cannot touch device memory: a read too early or through a device
// pointer fails here as it would on a GPU.
#pragma once

#include <memory>

#include "runtime/device/device.h"
#include "runtime/kernels/router.h"
#include "runtime/kernels/testing.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels::testing {

// The same for the life of the process. CHECKs that SHOAL_TEST_DEVICE can be had.
Device& TestDevice();
// True on a GPU: tests may then be larger.
bool OnRealDevice();
std::unique_ptr<Stream> TestStream();

// Objects rather than functions, so that shoal::ToDevice and ToHost, which do not fail a test, are not found beside them.
struct ToDeviceFunction {
  Tensor operator()(const Tensor& host, Stream& stream) const { return Upload(host, stream); }
};
inline constexpr ToDeviceFunction ToDevice;
// One element after an aligned address: kernels must not take it for one that packs of elements may be read from.
inline Tensor ToOddAddress(const Tensor& host, Stream& stream) {
  const Tensor tensor = Empty({host.elements() + 1}, host.dtype(), stream).Elements(1, host.shape());
  shoal::Copy(host, tensor, stream);
  return tensor;
}
// Waits. A failure of the stream fails the test and gives NaNs (integers: all bits set).
struct ToHostFunction {
  Tensor operator()(const Tensor& tensor, Stream& stream) const;
};
inline constexpr ToHostFunction ToHost;

// What a kernel that makes the choices chosen_TK (host) counts of them, by the definition; uploaded.
Tally TallyOf(const Tensor& chosen, int64_t experts, int pieces, Stream& stream);

}  // namespace shoal::kernels::testing
