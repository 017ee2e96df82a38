// What the files of the CUDA plug-in share. The plug-in uses none of the core's libraries.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "runtime/device/device_api.h"

namespace shoal::cuda {

// A result with a message that lives until the next call of this thread.
DeviceResult Say(DeviceResult::Code code, const std::string& message);
// kOk for cudaSuccess. Clears the runtime's note of the error.
DeviceResult Failed(cudaError_t error);

int Device();           // Of the calling thread.
int MultiProcessors();  // Of this device.

inline cudaStream_t Native(DeviceStream* stream) { return reinterpret_cast<cudaStream_t>(stream); }
inline cudaEvent_t Native(DeviceEvent* event) { return reinterpret_cast<cudaEvent_t>(event); }
inline cudaGraphExec_t Native(DeviceGraph* graph) { return reinterpret_cast<cudaGraphExec_t>(graph); }

// A library by its soname: where SHOAL_CUDA_LIBRARIES says, where the loader looks, of the toolkit, of Python's packages. Null: `why`
// says what was tried. It stays loaded.
void* OpenLibrary(const char* soname, std::string* why);

// Memory for intermediate results of one operation (kernels/cuda/launch.h).
DeviceResult Scratch(DeviceStream* stream, int64_t bytes, void** memory);
void ForgetScratch(DeviceStream* stream);  // That is about to end.

// Products of dense matrices by cuBLASLt (kernels/cuda/matmul_cublas.cc): whether the library could be loaded.
DeviceResult MatMulReady();

const DeviceKernels* Kernels();

}  // namespace shoal::cuda
