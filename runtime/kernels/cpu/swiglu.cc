#include "runtime/kernels/swiglu.h"

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {

void SwiGlu(const Tensor& gate_up, const Tensor& h, Stream& stream) {
  const int64_t R = h.dim(0), F = h.dim(1);
  const InnerAct act = CheckAct(h, {R, F}, "h");
  SHOAL_CHECK_EQ(CheckAct(gate_up, {R, 2 * F}, "gate_up"), act);
  if (Offloaded(stream, &DeviceKernels::swiglu, gate_up, h)) return;
  const auto rows = Inner().swiglu[act];
  ParallelFor(R, GrainOfRows(2 * F),
              [&](int64_t begin, int64_t end) { rows(gate_up.raw(), h.raw(), F, begin, end); });
}

void SwiGluBackward(const Tensor& dh, const Tensor& gate_up, const Tensor& dgate_up, const Tensor& h,
                    Stream& stream) {
  const int64_t R = dh.dim(0), F = dh.dim(1);
  const InnerAct act = CheckAct(dh, {R, F}, "dh");
  SHOAL_CHECK_EQ(CheckAct(gate_up, {R, 2 * F}, "gate_up"), act);
  SHOAL_CHECK_EQ(CheckAct(dgate_up, {R, 2 * F}, "dgate_up"), act);
  SHOAL_CHECK_EQ(CheckAct(h, {R, F}, "h"), act);
  if (Offloaded(stream, &DeviceKernels::swiglu_backward, dh, gate_up, dgate_up, h)) return;
  const auto rows = Inner().swiglu_backward[act];
  ParallelFor(R, GrainOfRows(3 * F), [&](int64_t begin, int64_t end) {
    rows(dh.raw(), gate_up.raw(), dgate_up.raw(), h.raw(), F, begin, end);
  });
}

}  // namespace shoal::kernels
