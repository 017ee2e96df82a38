// Which device a rank computes on.
#pragma once

#include "absl/status/statusor.h"
#include "launch/agent/environment.h"
#include "launch/config/config.pb.h"
#include "runtime/device/device.h"

namespace shoal {

// What train.device asks for; null: the CPU. The ranks of a host take its devices in turn, so several may share one. auto without a
// usable device says why on rank 0. UNAVAILABLE, NOT_FOUND, FAILED_PRECONDITION: cuda cannot be had, as LoadDevice says.
absl::StatusOr<Device*> DeviceFor(const Config& config, const RankEnvironment& environment);

}  // namespace shoal
