#include "collectives/backend/mpi_library.h"

#include <dlfcn.h>

#include <filesystem>
#include <string>

#include "runtime/base/status.h"

namespace shoal {

MpiLibrary::~MpiLibrary() {
  if (plugin != nullptr) plugin->stop();
}

absl::Status MpiLibrary::Error(int code) const {
  if (code == 0) return absl::OkStatus();
  char text[512] = "";
  plugin->error_text(code, text, sizeof text);
  return absl::InternalError(absl::StrCat("MPI: ", text));
}

absl::StatusOr<std::shared_ptr<MpiLibrary>> MpiLibrary::Load() {
  std::error_code error;
  const std::string beside = std::filesystem::read_symlink("/proc/self/exe", error).parent_path() / "libshoal_mpi.so";
  std::string missing;
  for (const std::string& path : {beside, std::string("libshoal_mpi.so")}) {
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);  // MPI loads modules that look for its symbols.
    if (handle == nullptr) {
      if (missing.empty()) missing = dlerror();
      continue;
    }
    const auto* plugin = static_cast<const shoal_mpi_plugin*>(dlsym(handle, SHOAL_MPI_PLUGIN_SYMBOL));
    if (plugin == nullptr || plugin->version != SHOAL_MPI_PLUGIN_VERSION) {
      return absl::FailedPreconditionError(absl::StrCat(path, " is of another version of Shoal"));
    }
    auto library = std::make_shared<MpiLibrary>();
    library->plugin = plugin;
    return library;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("transport mpi needs libshoal_mpi.so, built where an MPI is installed: ", missing));
}

}  // namespace shoal
