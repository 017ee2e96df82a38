#include "runtime/kernels/optimizer.h"

#include <cmath>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

// Elements of one partial sum, whatever the number of threads.
constexpr int64_t kSumBlock = 16384;

AdamWCoefficients CoefficientsOf(const AdamWStep& step, const double* numbers) {
  return {.grad_scale = static_cast<float>(numbers[kGradScale]),
          .beta1 = static_cast<float>(step.beta1),
          .one_minus_beta1 = static_cast<float>(1 - step.beta1),
          .beta2 = static_cast<float>(step.beta2),
          .one_minus_beta2 = static_cast<float>(1 - step.beta2),
          .decay = static_cast<float>(numbers[kLearningRate] * step.weight_decay),
          .step_size = static_cast<float>(numbers[kStepSize]),
          .root_scale = static_cast<float>(numbers[kRootScale]),
          .epsilon = static_cast<float>(step.epsilon)};
}

}  // namespace

Tensor AdamWNumbersOf(const AdamWStep& step) {
  SHOAL_CHECK_GE(step.update, 1);
  const double n = static_cast<double>(step.update);
  const Tensor numbers = Zeros({kAdamWNumbers}, DType::kF64);
  double* const to = numbers.data<double>();
  to[kLearningRate] = step.learning_rate;
  to[kStepSize] = step.learning_rate / (1 - std::pow(step.beta1, n));
  to[kRootScale] = 1 / std::sqrt(1 - std::pow(step.beta2, n));
  to[kGradScale] = static_cast<double>(step.grad_scale);
  to[kApply] = 1;
  return numbers;
}

void AdamW(const AdamWStep& step, const Tensor& grad, const Tensor& master, const Tensor& m, const Tensor& v,
           const Tensor& copy, Stream& stream) {
  AdamW(step, ToDevice(AdamWNumbersOf(step), stream), grad, master, m, v, copy, stream);
}

void AdamW(const AdamWStep& step, const Tensor& numbers, const Tensor& grad, const Tensor& master, const Tensor& m,
           const Tensor& v, const Tensor& copy, Stream& stream) {
  const int64_t N = master.elements();
  CheckTensor(numbers, DType::kF64, {kAdamWNumbers}, "numbers");
  for (const Tensor* tensor : {&grad, &master, &m, &v}) {
    SHOAL_CHECK_EQ(tensor->elements(), N);
    SHOAL_CHECK(tensor->dtype() == DType::kF32) << "AdamW on " << Name(tensor->dtype());
  }
  SHOAL_CHECK(copy.empty() || copy.elements() == N) << copy.elements() << " elements of the copy for " << N;
  const InnerAct act = copy.empty() ? kInnerF32 : CheckAct(copy.Reshape({N}), {N}, "copy");
  if (Offloaded(stream, &DeviceKernels::adamw, step.beta1, step.beta2, step.epsilon, step.weight_decay, numbers, grad, master, m, v,
                copy)) {
    return;
  }
  if (numbers.data<double>()[kApply] == 0) return;
  const AdamWCoefficients coefficients = CoefficientsOf(step, numbers.data<double>());
  const auto update = Inner().adamw[act];
  ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
    void* to = copy.empty() ? nullptr : static_cast<char*>(copy.raw()) + begin * SizeOf(copy.dtype());
    update(coefficients, grad.data<float>() + begin, master.data<float>() + begin, m.data<float>() + begin,
           v.data<float>() + begin, to, end - begin);
  });
}

void ClipGradients(const Tensor& squares, const Tensor& losses, double clip, const Tensor& numbers, Stream& stream) {
  CheckTensor(squares, DType::kF64, {squares.elements()}, "squares");
  CheckTensor(losses, DType::kF64, {losses.elements()}, "losses");
  CheckTensor(numbers, DType::kF64, {kAdamWNumbers}, "numbers");
  if (Offloaded(stream, &DeviceKernels::clip_gradients, squares, losses, clip, numbers)) return;
  double total = 0;
  for (double square : squares.span<double>()) total += square;
  const double norm = std::sqrt(total);
  bool finite = std::isfinite(norm);
  for (double loss : losses.span<double>()) finite = finite && std::isfinite(loss);
  double* const to = numbers.data<double>();
  to[kGradScale] = clip > 0 && norm > clip ? static_cast<double>(static_cast<float>(clip / (norm + 1e-6))) : 1;
  to[kApply] = finite ? 1 : 0;
  to[kGradNorm] = norm;
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
