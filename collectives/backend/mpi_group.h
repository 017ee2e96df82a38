// A Communicator on a site's own MPI, by the plug-in libshoal_mpi.so (backend/mpi_plugin.h). For transport "mpi": rank and size are
// MPI's, so the processes are started by mpirun or srun.
//
// What MPI cannot do: it survives no death of a process, and it never gives a buffer back before an operation has ended.
// So a group that ends (a missed deadline, Abort) tells its members, whose Works end ABORTED, but its buffers stay in MPI's
// hands; it keeps the tensors alive for ever and the job cannot form another epoch. A result is bit-identical on all ranks
// as far as the MPI library makes it so.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"

namespace shoal {

// FAILED_PRECONDITION: no plug-in beside the program, no MPI library, or options.size is not MPI's size; the message says what
// is missing.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectMpi(const WorldOptions& options);

}  // namespace shoal
