#include "launch/trainer/device.h"

#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

absl::StatusOr<Device*> Load(int local_rank) {
  SHOAL_ASSIGN_OR_RETURN(Device* const first, LoadDevice("cuda", 0));
  int32_t count = 0;
  SHOAL_RETURN_IF_ERROR(first->StatusOf(first->api().count(&count), "counting devices"));
  return count > 1 ? LoadDevice("cuda", local_rank % count) : first;
}

}  // namespace

absl::StatusOr<Device*> DeviceFor(const Config& config, const RankEnvironment& environment) {
  const std::string& wanted = config.train().device();
  if (wanted == "cpu") return nullptr;
  absl::StatusOr<Device*> device = Load(environment.local_rank);
  if (wanted == "cuda") {
    SHOAL_RETURN_IF_ERROR(device.status(), "train.device: cuda");
    return device;
  }
  if (device.ok()) return device;
  if (environment.rank == 0) SHOAL_LOG(kInfo) << "train.device: auto computes on the CPU: " << device.status().message();
  return nullptr;
}

}  // namespace shoal
