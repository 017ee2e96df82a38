// The table of functions (device_api.h) over the CUDA runtime, which is linked statically: the plug-in loads on machines without a
// driver and says that there is none.
#include <cstdio>
#include <cstring>
#include <string>

#include "runtime/device/cuda/runtime.h"

namespace shoal::cuda {
namespace {

using Code = DeviceResult::Code;

Code CodeOf(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return Code::kOk;
    case cudaErrorNotReady: return Code::kNotReady;
    case cudaErrorMemoryAllocation: return Code::kOutOfMemory;
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorStubLibrary: return Code::kUnavailable;
    default: return Code::kFailed;
  }
}

std::string Version(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

DeviceResult NoDevice(cudaError_t error) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const DeviceResult plain = Failed(error);
  if (driver == 0) return Say(Code::kUnavailable, "no NVIDIA driver: libcuda.so.1 is missing or does not load");
  if (error == cudaErrorInsufficientDriver) {
    return Say(Code::kUnavailable, "the NVIDIA driver is for CUDA " + Version(driver) + ", this plug-in needs " + Version(runtime));
  }
  if (error == cudaErrorNoDevice) return Say(Code::kUnavailable, "the NVIDIA driver shows no GPU (see CUDA_VISIBLE_DEVICES)");
  return Say(Code::kUnavailable, std::string("no usable GPU: ") + plain.message);
}

DeviceResult Count(int32_t* devices) {
  int count = 0;
  *devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) return NoDevice(error);
  if (count == 0) return NoDevice(cudaErrorNoDevice);
  if (const DeviceResult ready = MatMulReady(); ready.code != Code::kOk) return ready;
  *devices = count;
  return {};
}

DeviceResult Properties(int32_t device, DeviceProperties* properties) {
  cudaDeviceProp native;
  if (const cudaError_t error = cudaGetDeviceProperties(&native, device); error != cudaSuccess) return Failed(error);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "%s", native.name);
  const auto* uuid = reinterpret_cast<const unsigned char*>(native.uuid.bytes);
  char* to = properties->uuid + std::snprintf(properties->uuid, sizeof(properties->uuid), "GPU-");
  for (int i = 0; i < 16; ++i) {
    to += std::snprintf(to, 4, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
  }
  properties->compute_major = native.major;
  properties->compute_minor = native.minor;
  properties->multiprocessors = native.multiProcessorCount;
  properties->memory_bytes = static_cast<int64_t>(native.totalGlobalMem);
  return {};
}

DeviceResult Use(int32_t device) { return Failed(cudaSetDevice(device)); }

DeviceResult Allocate(int64_t bytes, void** memory) { return Failed(cudaMalloc(memory, static_cast<size_t>(bytes))); }
DeviceResult Release(void* memory) { return Failed(cudaFree(memory)); }
DeviceResult Memory(int64_t* free_bytes, int64_t* all_bytes) {
  size_t free = 0, all = 0;
  const DeviceResult result = Failed(cudaMemGetInfo(&free, &all));
  *free_bytes = static_cast<int64_t>(free);
  *all_bytes = static_cast<int64_t>(all);
  return result;
}
DeviceResult AllocateHost(int64_t bytes, void** memory) {
  return Failed(cudaHostAlloc(memory, static_cast<size_t>(bytes), cudaHostAllocPortable));
}
DeviceResult ReleaseHost(void* memory) { return Failed(cudaFreeHost(memory)); }
DeviceResult Pin(void* memory, int64_t bytes) {
  return Failed(cudaHostRegister(memory, static_cast<size_t>(bytes), cudaHostRegisterPortable));
}
DeviceResult Unpin(void* memory) { return Failed(cudaHostUnregister(memory)); }

// Non-blocking: not in step with the legacy default stream, which nothing of ours uses.
DeviceResult CreateStream(DeviceStream** stream) {
  return Failed(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}
DeviceResult DestroyStream(DeviceStream* stream) {
  ForgetScratch(stream);
  return Failed(cudaStreamDestroy(Native(stream)));
}
DeviceResult QueryStream(DeviceStream* stream) { return Failed(cudaStreamQuery(Native(stream))); }
DeviceResult WaitStream(DeviceStream* stream) { return Failed(cudaStreamSynchronize(Native(stream))); }

DeviceResult CreateEvent(bool timed, DeviceEvent** event) {
  return Failed(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), timed ? cudaEventDefault : cudaEventDisableTiming));
}
DeviceResult DestroyEvent(DeviceEvent* event) { return Failed(cudaEventDestroy(Native(event))); }
DeviceResult Record(DeviceEvent* event, DeviceStream* stream) { return Failed(cudaEventRecord(Native(event), Native(stream))); }
DeviceResult RecordInGraph(DeviceEvent* event, DeviceStream* stream) {
  return Failed(cudaEventRecordWithFlags(Native(event), Native(stream), cudaEventRecordExternal));
}
DeviceResult WaitFor(DeviceStream* stream, DeviceEvent* event) {
  return Failed(cudaStreamWaitEvent(Native(stream), Native(event), cudaEventWaitDefault));
}
DeviceResult QueryEvent(DeviceEvent* event) { return Failed(cudaEventQuery(Native(event))); }
DeviceResult WaitEvent(DeviceEvent* event) { return Failed(cudaEventSynchronize(Native(event))); }
DeviceResult ElapsedMs(DeviceEvent* begin, DeviceEvent* end, float* milliseconds) {
  return Failed(cudaEventElapsedTime(milliseconds, Native(begin), Native(end)));
}

DeviceResult Copy(void* to, const void* from, int64_t bytes, DeviceStream* stream) {
  return Failed(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, Native(stream)));
}
DeviceResult Fill(void* to, int32_t byte, int64_t bytes, DeviceStream* stream) {
  return Failed(cudaMemsetAsync(to, byte, static_cast<size_t>(bytes), Native(stream)));
}

// Relaxed: a pool may allocate meanwhile, and other threads may do what they like.
DeviceResult BeginCapture(DeviceStream* stream) {
  return Failed(cudaStreamBeginCapture(Native(stream), cudaStreamCaptureModeRelaxed));
}
DeviceResult EndCapture(DeviceStream* stream, DeviceGraph** graph) {
  cudaGraph_t recorded = nullptr;
  if (const cudaError_t error = cudaStreamEndCapture(Native(stream), &recorded); error != cudaSuccess) return Failed(error);
  const cudaError_t error = cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(graph), recorded, 0);
  cudaGraphDestroy(recorded);
  return Failed(error);
}
DeviceResult LaunchGraph(DeviceGraph* graph, DeviceStream* stream) { return Failed(cudaGraphLaunch(Native(graph), Native(stream))); }
DeviceResult DestroyGraph(DeviceGraph* graph) { return Failed(cudaGraphExecDestroy(Native(graph))); }

static_assert(sizeof(DeviceIpcHandle) == sizeof(cudaIpcMemHandle_t));
DeviceResult ExportMemory(void* memory, DeviceIpcHandle* handle) {
  return Failed(cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle), memory));
}
DeviceResult OpenMemory(const DeviceIpcHandle* handle, void** memory) {
  cudaIpcMemHandle_t native;
  std::memcpy(&native, handle, sizeof(native));
  return Failed(cudaIpcOpenMemHandle(memory, native, cudaIpcMemLazyEnablePeerAccess));
}
DeviceResult CloseMemory(void* memory) { return Failed(cudaIpcCloseMemHandle(memory)); }

}  // namespace

DeviceResult Say(Code code, const std::string& message) {
  static thread_local std::string kept;
  kept = message;
  return {code, kept.c_str()};
}

DeviceResult Failed(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // Else a later kernel's launch would report it.
  if (error == cudaErrorNotReady) return {Code::kNotReady, "not ready"};
  return Say(CodeOf(error), std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
}

int Device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

int MultiProcessors() {
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, Device());
  return count;
}

}  // namespace shoal::cuda

extern "C" __attribute__((visibility("default"))) const shoal::DeviceApi* shoal_device_api() {
  using namespace shoal::cuda;
  static const shoal::DeviceApi api = {.version = shoal::kDeviceApiVersion,
                                       .name = "cuda",
                                       .count = &Count,
                                       .properties = &Properties,
                                       .use = &Use,
                                       .allocate = &Allocate,
                                       .release = &Release,
                                       .memory = &Memory,
                                       .allocate_host = &AllocateHost,
                                       .release_host = &ReleaseHost,
                                       .pin = &Pin,
                                       .unpin = &Unpin,
                                       .create_stream = &CreateStream,
                                       .destroy_stream = &DestroyStream,
                                       .query_stream = &QueryStream,
                                       .wait_stream = &WaitStream,
                                       .create_event = &CreateEvent,
                                       .destroy_event = &DestroyEvent,
                                       .record = &Record,
                                       .record_in_graph = &RecordInGraph,
                                       .wait_for = &WaitFor,
                                       .query_event = &QueryEvent,
                                       .wait_event = &WaitEvent,
                                       .elapsed_ms = &ElapsedMs,
                                       .copy = &Copy,
                                       .fill = &Fill,
                                       .begin_capture = &BeginCapture,
                                       .end_capture = &EndCapture,
                                       .launch_graph = &LaunchGraph,
                                       .destroy_graph = &DestroyGraph,
                                       .export_memory = &ExportMemory,
                                       .open_memory = &OpenMemory,
                                       .close_memory = &CloseMemory,
                                       .kernels = Kernels()};
  return &api;
}
