#include "collectives/backend/fake_sum.h"

#include <vector>

#include "collectives/engine/reduce.h"
#include "runtime/device/fake_device.h"

namespace shoal {
namespace {

DeviceResult SumTensors(const DeviceTensor* from, int32_t count, const DeviceTensor& to, DeviceStream* stream) {
  return FakeDevice::Current().Submit(stream, [from = std::vector<DeviceTensor>(from, from + count), to] {
    std::vector<const std::byte*> sources;
    for (const DeviceTensor& tensor : from) sources.push_back(static_cast<const std::byte*>(tensor.data));
    std::byte* const out = static_cast<std::byte*>(to.data);
    Reduce(to.dtype, ReduceOp::kSum, sources, absl::MakeConstSpan(&out, 1), to.elements);
    return DeviceResult{};
  });
}

}  // namespace

const DeviceKernels& SumKernels() {
  static const DeviceKernels kernels = {.sum_tensors = &SumTensors};
  return kernels;
}

}  // namespace shoal
