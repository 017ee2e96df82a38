// The table of functions (nccl_api.h) over libnccl.so.2, a part of the CUDA plug-in (runtime/device/cuda). The library is loaded from
// where it is when somebody asks for it.
#include <dlfcn.h>
#include <nccl.h>

#include <cstring>
#include <string>

#include "collectives/backend/nccl_api.h"
#include "runtime/device/cuda/runtime.h"

namespace shoal::cuda {
namespace {

using Code = DeviceResult::Code;

// The first with communicators that finalize without blocking and are aborted at any time.
constexpr int kOldest = 21900;

struct Library {
  std::string missing;
  int version = 0;
  decltype(&ncclGetVersion) get_version = nullptr;
  decltype(&ncclGetErrorString) error_string = nullptr;
  decltype(&ncclGetLastError) last_error = nullptr;
  decltype(&ncclGetUniqueId) unique_id = nullptr;
  decltype(&ncclCommInitRankConfig) connect = nullptr;
  decltype(&ncclCommGetAsyncError) async_error = nullptr;
  decltype(&ncclCommFinalize) finalize = nullptr;
  decltype(&ncclCommDestroy) destroy = nullptr;
  decltype(&ncclCommAbort) abort = nullptr;
  decltype(&ncclGroupStart) group_start = nullptr;
  decltype(&ncclGroupEnd) group_end = nullptr;
  decltype(&ncclAllReduce) all_reduce = nullptr;
  decltype(&ncclReduceScatter) reduce_scatter = nullptr;
  decltype(&ncclAllGather) all_gather = nullptr;
  decltype(&ncclBroadcast) broadcast = nullptr;
  decltype(&ncclReduce) reduce = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) receive = nullptr;
};

std::string VersionText(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
}

template <class Function> void Find(void* handle, const char* name, Function* function, std::string* missing) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr && missing->empty()) *missing = std::string("libnccl.so.2 has no ") + name;
}

Library Load() {
  Library nccl;
  std::string why;
  void* const handle = OpenLibrary("libnccl.so.2", &why);
  if (handle == nullptr) {
    nccl.missing = "NCCL is missing: " + why;
    return nccl;
  }
  std::string* const missing = &nccl.missing;
  Find(handle, "ncclGetVersion", &nccl.get_version, missing);
  Find(handle, "ncclGetErrorString", &nccl.error_string, missing);
  Find(handle, "ncclGetLastError", &nccl.last_error, missing);
  Find(handle, "ncclGetUniqueId", &nccl.unique_id, missing);
  Find(handle, "ncclCommInitRankConfig", &nccl.connect, missing);
  Find(handle, "ncclCommGetAsyncError", &nccl.async_error, missing);
  Find(handle, "ncclCommFinalize", &nccl.finalize, missing);
  Find(handle, "ncclCommDestroy", &nccl.destroy, missing);
  Find(handle, "ncclCommAbort", &nccl.abort, missing);
  Find(handle, "ncclGroupStart", &nccl.group_start, missing);
  Find(handle, "ncclGroupEnd", &nccl.group_end, missing);
  Find(handle, "ncclAllReduce", &nccl.all_reduce, missing);
  Find(handle, "ncclReduceScatter", &nccl.reduce_scatter, missing);
  Find(handle, "ncclAllGather", &nccl.all_gather, missing);
  Find(handle, "ncclBroadcast", &nccl.broadcast, missing);
  Find(handle, "ncclReduce", &nccl.reduce, missing);
  Find(handle, "ncclSend", &nccl.send, missing);
  Find(handle, "ncclRecv", &nccl.receive, missing);
  if (!missing->empty()) return nccl;
  if (nccl.get_version(&nccl.version) != ncclSuccess || nccl.version < kOldest) {
    *missing = "libnccl.so.2 is NCCL " + VersionText(nccl.version) + ", at least " + VersionText(kOldest) + " is needed";
  }
  return nccl;
}

const Library& Nccl() {
  static const Library* const library = new Library(Load());
  return *library;
}

DeviceResult Check(ncclResult_t result, ncclComm_t comm = nullptr) {
  if (result == ncclSuccess) return {};
  if (result == ncclInProgress) return {Code::kNotReady, "not ready"};
  std::string text = std::string("NCCL: ") + Nccl().error_string(result);
  const char* const detail = Nccl().last_error(comm);
  if (detail != nullptr && *detail != '\0') text += std::string(": ") + detail;
  return Say(Code::kFailed, text);
}

ncclComm_t CommOf(NcclComm* comm) { return reinterpret_cast<ncclComm_t>(comm); }

ncclDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32: return ncclFloat32;
    case DType::kBF16: return ncclBfloat16;
    case DType::kF16: return ncclFloat16;
    case DType::kF64: return ncclFloat64;
    case DType::kI8: return ncclInt8;
    case DType::kU8: return ncclUint8;
    case DType::kI32: return ncclInt32;
    case DType::kI64: return ncclInt64;
  }
  return ncclNumTypes;  // Refused by the call.
}

ncclRedOp_t OpOf(NcclOp op) {
  switch (op) {
    case NcclOp::kSum: return ncclSum;
    case NcclOp::kProduct: return ncclProd;
    case NcclOp::kMin: return ncclMin;
    case NcclOp::kMax: return ncclMax;
    case NcclOp::kAverage: return ncclAvg;
  }
  return ncclNumOps;
}

size_t Size(int64_t count) { return static_cast<size_t>(count); }

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));
DeviceResult UniqueId(NcclId* id) { return Check(Nccl().unique_id(reinterpret_cast<ncclUniqueId*>(id))); }

DeviceResult Connect(const NcclId* id, int32_t rank, int32_t size, NcclComm** comm) {
  ncclUniqueId native;
  std::memcpy(&native, id, sizeof(native));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return Check(Nccl().connect(reinterpret_cast<ncclComm_t*>(comm), size, native, rank, &config));
}

DeviceResult Progress(NcclComm* comm) {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = Nccl().async_error(CommOf(comm), &state);
  return Check(asked == ncclSuccess ? state : asked, CommOf(comm));
}

DeviceResult Finalize(NcclComm* comm) { return Check(Nccl().finalize(CommOf(comm)), CommOf(comm)); }
DeviceResult Destroy(NcclComm* comm) { return Check(Nccl().destroy(CommOf(comm))); }
DeviceResult Abort(NcclComm* comm) { return Check(Nccl().abort(CommOf(comm))); }
DeviceResult GroupStart() { return Check(Nccl().group_start()); }
DeviceResult GroupEnd() { return Check(Nccl().group_end()); }

DeviceResult AllReduce(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().all_reduce(from, to, Size(count), TypeOf(dtype), OpOf(op), CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult ReduceScatter(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().reduce_scatter(from, to, Size(count), TypeOf(dtype), OpOf(op), CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult AllGather(const void* from, void* to, int64_t count, DType dtype, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().all_gather(from, to, Size(count), TypeOf(dtype), CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult Broadcast(const void* from, void* to, int64_t count, DType dtype, int32_t root, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().broadcast(from, to, Size(count), TypeOf(dtype), root, CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult Reduce(const void* from, void* to, int64_t count, DType dtype, NcclOp op, int32_t root, NcclComm* comm,
                    DeviceStream* stream) {
  return Check(Nccl().reduce(from, to, Size(count), TypeOf(dtype), OpOf(op), root, CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult Send(const void* from, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().send(from, Size(count), TypeOf(dtype), peer, CommOf(comm), Native(stream)), CommOf(comm));
}
DeviceResult Receive(void* to, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream) {
  return Check(Nccl().receive(to, Size(count), TypeOf(dtype), peer, CommOf(comm), Native(stream)), CommOf(comm));
}

}  // namespace
}  // namespace shoal::cuda

extern "C" __attribute__((visibility("default"))) shoal::DeviceResult shoal_nccl_api(const shoal::NcclApi** api) {
  using namespace shoal::cuda;
  *api = nullptr;
  if (!Nccl().missing.empty()) return {shoal::DeviceResult::Code::kUnavailable, Nccl().missing.c_str()};
  static const shoal::NcclApi table = {.version = shoal::kNcclApiVersion,
                                       .library_version = Nccl().version,
                                       .unique_id = &UniqueId,
                                       .connect = &Connect,
                                       .progress = &Progress,
                                       .finalize = &Finalize,
                                       .destroy = &Destroy,
                                       .abort = &Abort,
                                       .group_start = &GroupStart,
                                       .group_end = &GroupEnd,
                                       .all_reduce = &AllReduce,
                                       .reduce_scatter = &ReduceScatter,
                                       .all_gather = &AllGather,
                                       .broadcast = &Broadcast,
                                       .reduce = &Reduce,
                                       .send = &Send,
                                       .receive = &Receive};
  *api = &table;
  return {};
}
