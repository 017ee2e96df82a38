#include "runtime/kernels/optimizer.h"

#include <cmath>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void AdamW(const AdamWStep& step, const Tensor& grad, const Tensor& master, const Tensor& m, const Tensor& v,
           const Tensor& copy, Stream&) {
  const double n = static_cast<double>(step.update);
  const double correction1 = 1 - std::pow(step.beta1, n), correction2 = 1 - std::pow(step.beta2, n);
  for (int64_t i = 0; i < master.elements(); ++i) {
    const double g = Get(grad, i) * static_cast<double>(step.grad_scale);
    const double m_new = step.beta1 * Get(m, i) + (1 - step.beta1) * g;
    const double v_new = step.beta2 * Get(v, i) + (1 - step.beta2) * g * g;
    const double decayed = Get(master, i) * (1 - step.learning_rate * step.weight_decay);
    const double root = std::sqrt(v_new) / std::sqrt(correction2);
    Set(m, i, m_new);
    Set(v, i, v_new);
    Set(master, i, decayed - step.learning_rate / correction1 * m_new / (root + step.epsilon));
    if (!copy.empty()) Set(copy, i, Get(master, i));
  }
}

double SumOfSquares(const Tensor& x, Stream&) {
  double sum = 0;
  for (int64_t i = 0; i < x.elements(); ++i) sum += Get(x, i) * Get(x, i);
  return sum;
}

}  // namespace shoal::kernels::ref
