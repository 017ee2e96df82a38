// Kernels of a fake device for tests of groups: sums alone.
#pragma once

#include "runtime/kernels/device_kernels.h"

namespace shoal {

// With sum_tensors, which puts a sum in the order of the tensors on a stream of the FakeDevice.
const DeviceKernels& SumKernels();

}  // namespace shoal
