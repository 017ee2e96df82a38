// Hands the work of a kernel over to the device of its stream. A public function of this folder calls Offloaded after it has checked
// shapes, and before it looks at a value:
//
//   if (Offloaded(stream, &DeviceKernels::swiglu, gate_up, h)) return;
#pragma once

#include "runtime/base/check.h"
#include "runtime/device/device.h"
#include "runtime/kernels/device_kernels.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// A stream, and the name of the function that asks. (clang 14 has no std::source_location.)
struct DispatchSite {
  DispatchSite(Stream& stream, const char* function = __builtin_FUNCTION())  // NOLINT: implicit.
      : stream(stream), function(function) {}
  Stream& stream;
  const char* function;
};

DeviceTensor ToDeviceTensor(const Tensor& tensor);
// Poisons the stream when `result` is a failure.
void TakeResult(const DispatchSite& site, const DeviceResult& result);

namespace internal {
template <class Argument> const Argument& DeviceArgument(const Argument& argument) { return argument; }
inline DeviceTensor DeviceArgument(const Tensor& tensor) { return ToDeviceTensor(tensor); }
}  // namespace internal

// False: the stream is the CPU's. True: the device's kernel is on the stream, or the stream is poisoned.
template <class Kernel, class... Arguments>
bool Offloaded(const DispatchSite& site, Kernel DeviceKernels::* kernel, const Arguments&... arguments) {
  Device* const device = site.stream.device();
  if (device == nullptr) [[likely]] return false;
  if (!site.stream.status().ok()) return true;
  const Kernel run = device->kernels().*kernel;
  device->Use();
  if (run == nullptr) {
    TakeResult(site, {DeviceResult::Code::kFailed, "the plug-in has no such kernel"});
  } else {
    TakeResult(site, run(internal::DeviceArgument(arguments)..., site.stream.handle()));
  }
  return true;
}

}  // namespace shoal::kernels
