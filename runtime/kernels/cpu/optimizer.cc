#include "runtime/kernels/optimizer.h"

#include <cmath>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"

namespace shoal::kernels {
namespace {

// Elements of one partial sum, whatever the number of threads.
constexpr int64_t kSumBlock = 16384;

AdamWCoefficients CoefficientsOf(const AdamWStep& step) {
  const double n = static_cast<double>(step.update);
  return {.grad_scale = step.grad_scale,
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
           const Tensor& copy, Stream&) {
  const int64_t N = master.elements();
  for (const Tensor* tensor : {&grad, &master, &m, &v}) {
    SHOAL_CHECK_EQ(tensor->elements(), N);
    SHOAL_CHECK(tensor->dtype() == DType::kF32) << "AdamW on " << Name(tensor->dtype());
  }
  SHOAL_CHECK_GE(step.update, 1);
  SHOAL_CHECK(copy.empty() || copy.elements() == N) << copy.elements() << " elements of the copy for " << N;
  const InnerAct act = copy.empty() ? kInnerF32 : CheckAct(copy.Reshape({N}), {N}, "copy");
  const AdamWCoefficients coefficients = CoefficientsOf(step);
  const auto update = Inner().adamw[act];
  ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
    void* to = copy.empty() ? nullptr : static_cast<char*>(copy.raw()) + begin * SizeOf(copy.dtype());
    update(coefficients, grad.data<float>() + begin, master.data<float>() + begin, m.data<float>() + begin,
           v.data<float>() + begin, to, end - begin);
  });
}

double SumOfSquares(const Tensor& x, Stream&) {
  const int64_t N = x.elements();
  if (N == 0) return 0;
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
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block];
  return sum;
}

}  // namespace shoal::kernels
