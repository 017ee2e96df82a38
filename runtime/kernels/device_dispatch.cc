#include "runtime/kernels/device_dispatch.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace shoal::kernels {
namespace {

// "RmsNorm" of "void shoal::kernels::RmsNorm(const shoal::Tensor&, ...)".
std::string_view FunctionName(std::string_view signature) {
  const std::string_view head = signature.substr(0, signature.find('('));
  return head.substr(head.find_last_of(": ") + 1);
}

}  // namespace

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
  site.stream.Fail(site.stream.device()->StatusOf(result, FunctionName(site.where.function_name())));
}

}  // namespace shoal::kernels
