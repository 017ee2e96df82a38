// What a device plug-in offers: a table of plain functions. The core links no vendor library; it loads a plug-in at run time
// (device.h) and sees nothing of it but this table, and a plug-in uses none of the core's libraries, so that neither can break
// the other. Tests have tables of their own (fake_device.h, kernels/cuda/emulated_device.h).
//
// Every function may be called by any thread. Memory, streams and events belong to the device that the calling thread has chosen by
// `use`. Work on a stream runs in the order in which it was put there; nothing but the functions that say so waits for it.
#pragma once

#include <cstdint>

namespace shoal {

inline constexpr int32_t kDeviceApiVersion = 3;

struct DeviceResult {
  enum class Code : int32_t {
    kOk,
    kNotReady,     // query: the work is still under way.
    kOutOfMemory,
    kUnavailable,  // No driver, no device, a library that is missing.
    kFailed,
  };
  Code code = Code::kOk;
  const char* message = "";  // The cause, of the plug-in; until the next call of this thread.
};

struct DeviceProperties {
  char name[256];
  char uuid[48];  // The same for the device in all processes: who shares it.
  int32_t compute_major, compute_minor, multiprocessors;
  int64_t memory_bytes;
};

// Opaque: of the plug-in.
struct DeviceStream;
struct DeviceEvent;
struct DeviceGraph;
struct DeviceKernels;  // kernels/device_kernels.h

struct DeviceIpcHandle {
  char bytes[64];
};

struct DeviceApi {
  int32_t version;   // kDeviceApiVersion; another one's table is not looked at any further.
  const char* name;  // "cuda"

  DeviceResult (*count)(int32_t* devices);  // kUnavailable: says what is missing.
  DeviceResult (*properties)(int32_t device, DeviceProperties* properties);
  DeviceResult (*use)(int32_t device);  // By the calling thread from now on.

  // 256-byte aligned, uninitialised. May wait for all streams of the device: pool.h calls them seldom.
  DeviceResult (*allocate)(int64_t bytes, void** memory);
  DeviceResult (*release)(void* memory);
  DeviceResult (*memory)(int64_t* free_bytes, int64_t* all_bytes);
  // Pinned: of the host, and copied from and to without waiting.
  DeviceResult (*allocate_host)(int64_t bytes, void** memory);
  DeviceResult (*release_host)(void* memory);
  // The same for memory that is there already, for example shared between processes.
  DeviceResult (*pin)(void* memory, int64_t bytes);
  DeviceResult (*unpin)(void* memory);

  DeviceResult (*create_stream)(DeviceStream** stream);
  DeviceResult (*destroy_stream)(DeviceStream* stream);
  DeviceResult (*query_stream)(DeviceStream* stream);  // kNotReady
  DeviceResult (*wait_stream)(DeviceStream* stream);   // Blocks until all its work is done; tells of failed kernels.

  // `timed` events tell times and cost a little more.
  DeviceResult (*create_event)(bool timed, DeviceEvent** event);
  DeviceResult (*destroy_event)(DeviceEvent* event);
  DeviceResult (*record)(DeviceEvent* event, DeviceStream* stream);
  DeviceResult (*record_in_graph)(DeviceEvent* event, DeviceStream* stream);  // On one that records, a timed event: by each launch.
  DeviceResult (*wait_for)(DeviceStream* stream, DeviceEvent* event);  // The stream waits, not the caller.
  DeviceResult (*query_event)(DeviceEvent* event);                     // kNotReady
  DeviceResult (*wait_event)(DeviceEvent* event);                      // Blocks.
  DeviceResult (*elapsed_ms)(DeviceEvent* begin, DeviceEvent* end, float* milliseconds);

  // Asynchronous, between any memory of this device and of the host. Host memory that is not pinned may make the caller wait.
  DeviceResult (*copy)(void* to, const void* from, int64_t bytes, DeviceStream* stream);
  DeviceResult (*fill)(void* to, int32_t byte, int64_t bytes, DeviceStream* stream);

  // What is put on a stream between begin and end is recorded instead of done, and can be done often by one call.
  DeviceResult (*begin_capture)(DeviceStream* stream);
  DeviceResult (*end_capture)(DeviceStream* stream, DeviceGraph** graph);
  DeviceResult (*launch_graph)(DeviceGraph* graph, DeviceStream* stream);
  DeviceResult (*destroy_graph)(DeviceGraph* graph);

  // Device memory of another process of this host. `memory` is the start of an allocation.
  DeviceResult (*export_memory)(void* memory, DeviceIpcHandle* handle);
  DeviceResult (*open_memory)(const DeviceIpcHandle* handle, void** memory);
  DeviceResult (*close_memory)(void* memory);

  const DeviceKernels* kernels;
};

// The symbol that a plug-in exports: returns its table, for the life of the process.
inline constexpr char kDeviceApiSymbol[] = "shoal_device_api";

}  // namespace shoal
