#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <utility>

#include "runtime/base/mutex.h"
#include "runtime/device/device.h"
#include "runtime/device/plugin.h"

namespace shoal {
namespace {

std::string PluginPath(std::string_view name) {
  if (const char* path = std::getenv("SHOAL_DEVICE_PLUGIN"); path != nullptr && *path != '\0') return path;
  std::error_code error;
  const std::filesystem::path executable = std::filesystem::read_symlink("/proc/self/exe", error);
  return executable.parent_path() / absl::StrCat("libshoal_", AbslSv(name), ".so");
}

// Stays loaded; the same one each time.
absl::StatusOr<void*> OpenPlugin(std::string_view name, const std::string& path) {
  if (access(path.c_str(), R_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("no plug-in for the device ", AbslSv(name), ": ", path,
                                            " cannot be read; it is built where the vendor's toolkit is installed, and "
                                            "SHOAL_DEVICE_PLUGIN can name it"));
  }
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnavailableError(absl::StrCat("loading the plug-in: ", dlerror()));
  return library;
}

absl::StatusOr<const DeviceApi*> LoadPlugin(std::string_view name) {
  const std::string path = PluginPath(name);
  SHOAL_ASSIGN_OR_RETURN(void* const library, OpenPlugin(name, path));
  const auto entry = reinterpret_cast<const DeviceApi* (*)()>(dlsym(library, kDeviceApiSymbol));
  if (entry == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is no device plug-in: it does not export ", kDeviceApiSymbol));
  }
  const DeviceApi* const api = entry();
  if (api->version != kDeviceApiVersion) {
    return absl::FailedPreconditionError(absl::StrCat(path, " has version ", api->version, " of the table of functions, this program ",
                                                      kDeviceApiVersion, ": they must come from one build"));
  }
  if (name != api->name) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is the plug-in for ", api->name, ", not for ", AbslSv(name)));
  }
  return api;
}

}  // namespace

absl::StatusOr<void*> PluginSymbol(std::string_view device, const char* symbol) {
  const std::string path = PluginPath(device);
  SHOAL_ASSIGN_OR_RETURN(void* const library, OpenPlugin(device, path));
  void* const address = dlsym(library, symbol);
  if (address == nullptr) return absl::NotFoundError(absl::StrCat(path, " does not export ", symbol));
  return address;
}

absl::StatusOr<Device*> LoadDevice(std::string_view name, int ordinal) {
  static Mutex* const mutex = new Mutex;
  static auto* const devices = new std::map<std::pair<std::string, int>, std::unique_ptr<Device>>;
  MutexLock lock(mutex);
  std::unique_ptr<Device>& device = (*devices)[{std::string(name), ordinal}];
  if (device != nullptr) return device.get();
  SHOAL_ASSIGN_OR_RETURN(const DeviceApi* const api, LoadPlugin(name));
  SHOAL_ASSIGN_OR_RETURN(device, Device::Create(*api, ordinal));
  return device.get();
}

}  // namespace shoal
