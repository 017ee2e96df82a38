#include "runtime/kernels/norm.h"

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {
// Tokens of one partial sum of the weight's gradient, whatever the number of threads.
constexpr int64_t kTokensPerBlock = 64;
}  // namespace

void RmsNorm(const Tensor& x, const Tensor& delta, const Tensor& weight, float epsilon, const Tensor& sum,
             const Tensor& y, const Tensor& rstd, Stream& stream) {
  const int64_t T = x.dim(0), D = x.dim(1);
  CheckTensor(x, DType::kF32, {T, D}, "x");
  CheckTensor(weight, DType::kF32, {D}, "weight");
  CheckTensor(rstd, DType::kF32, {T}, "rstd");
  const InnerAct act = CheckAct(y, {T, D}, "y");
  if (!delta.empty()) {
    SHOAL_CHECK_EQ(CheckAct(delta, {T, D}, "delta"), act);
    CheckTensor(sum, DType::kF32, {T, D}, "sum");
  }
  if (Offloaded(stream, &DeviceKernels::rms_norm, x, delta, weight, epsilon, sum, y, rstd)) return;
  const RmsNormArgs args = {.x = x.data<float>(),
                            .delta = delta.empty() ? nullptr : delta.raw(),
                            .weight = weight.data<float>(),
                            .epsilon = epsilon,
                            .sum = delta.empty() ? nullptr : sum.data<float>(),
                            .y = y.raw(),
                            .rstd = rstd.data<float>(),
                            .width = D};
  const auto rows = Inner().rms_norm[act];
  ParallelFor(T, GrainOfRows(D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void RmsNormBackward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                     const Tensor& dx, const Tensor& dweight, Stream& stream) {
  const int64_t T = x.dim(0), D = x.dim(1);
  CheckTensor(x, DType::kF32, {T, D}, "x");
  CheckTensor(weight, DType::kF32, {D}, "weight");
  CheckTensor(rstd, DType::kF32, {T}, "rstd");
  CheckTensor(dx, DType::kF32, {T, D}, "dx");
  CheckTensor(dweight, DType::kF32, {D}, "dweight");
  const InnerAct act = CheckAct(dy, {T, D}, "dy");
  if (Offloaded(stream, &DeviceKernels::rms_norm_backward, dy, x, weight, rstd, dx, dweight)) return;
  const RmsNormBackwardArgs args = {.dy = dy.raw(),
                                    .x = x.data<float>(),
                                    .weight = weight.data<float>(),
                                    .rstd = rstd.data<float>(),
                                    .dx = dx.data<float>(),
                                    .width = D};
  const InnerKernels& inner = Inner();
  const int64_t blocks = (T + kTokensPerBlock - 1) / kTokensPerBlock;
  const Tensor partials = Empty({blocks, D}, DType::kF32);
  float* partial = partials.data<float>();
  ParallelFor(blocks, GrainOfRows(D * kTokensPerBlock), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokensPerBlock;
      inner.rms_norm_backward[act](args, partial + block * D, first, std::min(first + kTokensPerBlock, T));
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    inner.add_to[kInnerF32](partial + block * D, dweight.data<float>(), D);
  }
}

}  // namespace shoal::kernels
