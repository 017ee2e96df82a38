// For tests that look into tensors: a group whose tensors are the host's, on a group for the memory of a device. Each operation has copies
// of its tensors on the device, with the same parts in place.
#pragma once

#include <memory>

#include "collectives/communicator.h"
#include "runtime/device/device.h"

namespace shoal {

// `group` and `device` outlive it. CHECKs that the device has a stream and memory.
std::unique_ptr<Communicator> MirrorOnDevice(Communicator& group, Device& device);

}  // namespace shoal
