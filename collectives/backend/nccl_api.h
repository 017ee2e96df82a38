// NCCL as a table of plain functions: what the CUDA plug-in exports beside its device (collectives/backend/nccl_plugin.cc), and what
// tests have of their own (fake_nccl.h). The core links no NCCL.
//
// All communicators are non-blocking: a call that answers kNotReady goes on, and nothing but `progress` and `abort` may be called
// with the communicator before `progress` has answered kOk. One thread at a time uses a communicator; operations belong to the
// device that it was connected on, which the thread has chosen. Messages of results live until the next call of the thread.
//
// There is no split: all ranks of a parent call ncclCommSplit, while only the members of a part call Communicator::Split. Nor is there
// a shrink: the group of the next epoch connects anew, with an id that goes over the host's group, even where all of its ranks have
// survived the last one. ncclCommShrink (2.27) with NCCL_SHRINK_ABORT would make a communicator of survivors without an id.
// * It would save the first exchange of addresses, "bootstrap" in the line "Init timings" that NCCL prints with NCCL_DEBUG=INFO. All
//   else of connecting is done again, as by ncclCommInitRank: with that flag, as after ncclCommRevoke, the child shares neither
//   connections nor buffers nor threads with its parent.
// * Kernels that wait for a dead rank have to end with their group, for tensors are the caller's again then. Who survives is agreed on
//   later, and shrink has to be told. So every rank would have to revoke its communicator (2.28 has ncclCommRevoke), and keep it, with
//   its memory of the device, until the next epoch has connected; after that abort it: destroying would wait for the dead.
// * It serves the survivors alone, in the order of their parent's ranks. A newcomer, another order, a part that was not there before, a
//   parent that was still connecting or whose asynchronous error is set on one rank (as by a network whose other end has died: NCCL
//   does not shrink those), and another death meanwhile: all these connect anew. So ranks would have to agree each time on which of
//   two ways to go.
// It becomes worth that where the bootstrap takes most of the time to connect, at thousands of ranks; but several ids
// (ncclCommInitRankScalable) shorten it for newcomers and parts as well, and are to be tried first.
#pragma once

#include <cstdint>

#include "runtime/device/device_api.h"
#include "runtime/tensor/dtype.h"

namespace shoal {

inline constexpr int32_t kNcclApiVersion = 1;

struct NcclComm;  // Opaque: of the plug-in.

struct NcclId {
  char bytes[128];
};

// kAverage: of integers the sum divided by the number of ranks; of floats the sum of contributions that were divided.
enum class NcclOp : int32_t { kSum, kProduct, kMin, kMax, kAverage };

struct NcclApi {
  int32_t version;          // kNcclApiVersion; another one's table is not looked at any further.
  int32_t library_version;  // 22809: 2.28.9

  DeviceResult (*unique_id)(NcclId* id);
  // All `size` ranks, with one id. kNotReady: they have not met yet.
  DeviceResult (*connect)(const NcclId* id, int32_t rank, int32_t size, NcclComm** comm);
  DeviceResult (*progress)(NcclComm* comm);  // kOk: nothing is being started, and nothing that was has failed.
  // Leaves politely: kOk of it or of `progress` means that all ranks have got what this one sent; then destroy does not block.
  DeviceResult (*finalize)(NcclComm* comm);
  DeviceResult (*destroy)(NcclComm* comm);
  // Ends running kernels, and the communicator, on this rank alone. At any time instead of destroy, once.
  DeviceResult (*abort)(NcclComm* comm);

  // Operations of one thread between start and end are one: they run at the same time. Counts are of elements.
  DeviceResult (*group_start)();
  DeviceResult (*group_end)();
  DeviceResult (*all_reduce)(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm, DeviceStream* stream);
  // `count` elements for each rank.
  DeviceResult (*reduce_scatter)(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm,
                                 DeviceStream* stream);
  DeviceResult (*all_gather)(const void* from, void* to, int64_t count, DType dtype, NcclComm* comm, DeviceStream* stream);
  DeviceResult (*broadcast)(const void* from, void* to, int64_t count, DType dtype, int32_t root, NcclComm* comm,
                            DeviceStream* stream);
  DeviceResult (*reduce)(const void* from, void* to, int64_t count, DType dtype, NcclOp op, int32_t root, NcclComm* comm,
                         DeviceStream* stream);
  DeviceResult (*send)(const void* from, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream);
  DeviceResult (*receive)(void* to, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream);
};

// The symbol that a plug-in exports: DeviceResult (*)(const NcclApi**). Loads the library at the first call; kUnavailable says what
// is missing. The table lives as long as the process.
inline constexpr char kNcclApiSymbol[] = "shoal_nccl_api";

}  // namespace shoal
