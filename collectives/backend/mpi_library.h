// The plug-in libshoal_mpi.so (backend/mpi_plugin.h), which has the site's MPI. Hides where it is found.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/backend/mpi_plugin.h"
#include "runtime/base/mutex.h"

namespace shoal {

// Stops MPI when the last group goes.
struct MpiLibrary {
  // From the program's folder, or where the system looks for libraries. FAILED_PRECONDITION: it is not there, of another version,
  // or has no MPI library; the message says which.
  static absl::StatusOr<std::shared_ptr<MpiLibrary>> Load();
  ~MpiLibrary();

  // INTERNAL, in MPI's words; OK for 0.
  absl::Status Error(int code) const;

  const shoal_mpi_plugin* plugin = nullptr;
  Mutex mutex;  // Under which all of the plug-in's functions are called.
};

}  // namespace shoal
