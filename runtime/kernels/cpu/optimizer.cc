#include "runtime/kernels/optimizer.h"

#include <cmath>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

// Elements of one partial sum, whatever the number of threads.
constexpr int64_t kSumBlock = 16384;

AdamWCoefficients CoefficientsOf(const AdamWStep& step, float grad_scale) {
  const double n = static_cast<double>(step.update);
  return {.grad_scale = grad_scale,
          .beta1 = static_cast<float>(step.beta1),
          .one_minus_beta1 = static_cast<float>(1 - step.beta1),
          .beta2 = static_cast<float>(step.beta2),
          .one_minus_beta2 = static_cast<float>(1 - step.beta2),
          .decay = static_cast<float>(step.learning_rate * step.weight_decay),
          .step_size = static_cast<float>(step.learning_rate / (1 - std::pow(step.beta1, n))),
          .root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, n))),
          .epsilon = static_cast<float>(step.epsilon)};
}

}  // namespace

void AdamW(const AdamWStep& step, const Tensor& grad, const Tensor& master, const Tensor& m, const Tensor& v,
           const Tensor& copy, Stream& stream) {
  Tensor grad_scale(const_cast<float*>(&step.grad_scale), {1}, DType::kF32);
  if (stream.device() != nullptr) grad_scale = Upload(grad_scale, stream);
  AdamW(step, grad_scale, grad, master, m, v, copy, stream);
}

void AdamW(const AdamWStep& step, const Tensor& grad_scale, const Tensor& grad, const Tensor& master, const Tensor& m,
           const Tensor& v, const Tensor& copy, Stream& stream) {
  const int64_t N = master.elements();
  CheckTensor(grad_scale, DType::kF32, {1}, "grad_scale");
  for (const Tensor* tensor : {&grad, &master, &m, &v}) {
    SHOAL_CHECK_EQ(tensor->elements(), N);
    SHOAL_CHECK(tensor->dtype() == DType::kF32) << "AdamW on " << Name(tensor->dtype());
  }
  SHOAL_CHECK_GE(step.update, 1);
  SHOAL_CHECK(copy.empty() || copy.elements() == N) << copy.elements() << " elements of the copy for " << N;
  const InnerAct act = copy.empty() ? kInnerF32 : CheckAct(copy.Reshape({N}), {N}, "copy");
  if (Offloaded(stream, &DeviceKernels::adamw, step.learning_rate, step.beta1, step.beta2, step.epsilon, step.weight_decay,
                step.update, grad_scale, grad, master, m, v, copy)) {
    return;
  }
  const AdamWCoefficients coefficients = CoefficientsOf(step, grad_scale.data<float>()[0]);
  const auto update = Inner().adamw[act];
  ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
    void* to = copy.empty() ? nullptr : static_cast<char*>(copy.raw()) + begin * SizeOf(copy.dtype());
    update(coefficients, grad.data<float>() + begin, master.data<float>() + begin, m.data<float>() + begin,
           v.data<float>() + begin, to, end - begin);
  });
}

void SumOfSquares(const Tensor& x, const Tensor& sum, Stream& stream) {
  const int64_t N = x.elements();
  CheckTensor(sum, DType::kF64, {1}, "sum");
  SHOAL_CHECK(x.dtype() == DType::kF32) << "sum of squares of " << Name(x.dtype());
  if (Offloaded(stream, &DeviceKernels::sum_of_squares, x, sum)) return;
  sum.data<double>()[0] = 0;
  if (N == 0) return;
  const float* data = x.data<float>();
  const int64_t blocks = (N + kSumBlock - 1) / kSumBlock;
  const Tensor partials = Empty({blocks}, DType::kF64);
  double* partial = partials.data<double>();
  const auto sum_of_squares = Inner().sum_of_squares;
  ParallelFor(blocks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      partial[block] = sum_of_squares(data + block * kSumBlock, std::min(kSumBlock, N - block * kSumBlock));
    }
  });
  for (int64_t block = 0; block < blocks; ++block) sum.data<double>()[0] += partial[block];
}

double SumOfSquares(const Tensor& x, Stream& stream) {
  const Tensor sum = Empty({1}, DType::kF64, stream);
  SumOfSquares(x, sum, stream);
  const absl::StatusOr<Tensor> host = Download(sum, stream);
  if (!host.ok()) stream.Fail(host.status());
  return host.ok() ? host->data<double>()[0] : 0;
}

}  // namespace shoal::kernels
