// Functions that the plug-in of a device exports beside its table (device_api.h).
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

namespace shoal {

// The address of `symbol` in the plug-in that LoadDevice(`device`) loads; it stays loaded. Errors as LoadDevice, and NOT_FOUND: it has
// no such symbol. Thread-safe.
absl::StatusOr<void*> PluginSymbol(std::string_view device, const char* symbol);

}  // namespace shoal
