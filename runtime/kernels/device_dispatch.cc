#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {

DeviceTensor ToDeviceTensor(const Tensor& tensor) {
  DeviceTensor out;
  SHOAL_CHECK_LE(tensor.rank(), 4);
  out.data = tensor.empty() ? nullptr : tensor.raw();
  out.elements = tensor.elements();
  out.rank = tensor.rank();
  out.dtype = tensor.dtype();
  for (int axis = 0; axis < tensor.rank(); ++axis) out.shape[axis] = tensor.dim(axis);
  return out;
}

void TakeResult(const DispatchSite& site, const DeviceResult& result) {
  if (result.code == DeviceResult::Code::kOk) return;
  site.stream.Fail(site.stream.device()->StatusOf(result, site.function));
}

}  // namespace shoal::kernels
