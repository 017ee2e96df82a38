#include "runtime/kernels/gated_matmul.h"

#include "runtime/kernels/device_dispatch.h"
#include "runtime/kernels/group_lists.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::kernels {
namespace {

void CheckGated(const Tensor& x, const Tensor& gate_up, const Tensor& h) {
  SHOAL_CHECK(x.rank() == 2 && gate_up.rank() == 2 && h.rank() == 2 && gate_up.dim(0) == h.dim(0) && gate_up.dim(1) == 2 * h.dim(1) &&
              x.dtype() == gate_up.dtype() && gate_up.dtype() == h.dtype())
      << Name(x.dtype()) << ShapeString(x.shape()) << " to " << Name(gate_up.dtype()) << ShapeString(gate_up.shape()) << " and "
      << Name(h.dtype()) << ShapeString(h.shape());
}

}  // namespace

void GroupedMatMulSwiGlu(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments, const Tensor& gate_up,
                         const Tensor& h, Stream& stream, Numerics numerics) {
  CheckGated(x, gate_up, h);
  if (stream.device() != nullptr) {
    const GroupLists lists = UploadLists(weights, segments, stream);
    Offloaded(stream, &DeviceKernels::grouped_matmul_swiglu, x, lists.matrices, lists.segments, gate_up, h);
    return;
  }
  GroupedMatMul(x, weights, segments, gate_up, stream, numerics);
  SwiGlu(gate_up, h, stream);
}

void GroupedMatMulSwiGlu(const Tensor& x, const Tensor& weights, const Tensor& segments, const Tensor& gate_up, const Tensor& h,
                         Stream& stream) {
  CheckGated(x, gate_up, h);
  if (Offloaded(stream, &DeviceKernels::grouped_matmul_swiglu, x, weights, segments, gate_up, h)) return;
  GroupedMatMul(x, weights, segments, gate_up, stream);
  SwiGlu(gate_up, h, stream);
}

}  // namespace shoal::kernels
