// The plug-in's table of kernels.
#include "runtime/device/cuda/runtime.h"
#include "runtime/kernels/cuda/kernels.h"
#include "runtime/kernels/cuda/matmul_cublas.h"

namespace shoal::cuda {

const DeviceKernels* Kernels() {
  static const DeviceKernels kernels = [] {
    DeviceKernels all = OwnKernels();
    all.matmul = MatMul;
    return all;
  }();
  return &kernels;
}

}  // namespace shoal::cuda
