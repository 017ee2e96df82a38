#include "runtime/kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void CrossEntropy(const Tensor& logits, const Tensor& targets, float scale, const Tensor& loss,
                  const Tensor& dlogits, Stream&) {
  const int64_t C = logits.dim(0), V = logits.dim(1);
  for (int64_t c = 0; c < C; ++c) {
    std::vector<double> logit(static_cast<size_t>(V));
    for (int64_t i = 0; i < V; ++i) logit[static_cast<size_t>(i)] = Get(logits, c * V + i);
    const double max = *std::max_element(logit.begin(), logit.end());
    double sum = 0;
    for (double value : logit) sum += std::exp(value - max);
    const int64_t target = GetIndex(targets, c);
    Set(loss, c, max + std::log(sum) - logit[static_cast<size_t>(target)]);
    if (dlogits.empty()) continue;
    for (int64_t i = 0; i < V; ++i) {
      const double prob = std::exp(logit[static_cast<size_t>(i)] - max) / sum;
      Set(dlogits, c * V + i, static_cast<double>(scale) * (prob - (i == target ? 1 : 0)));
    }
  }
}

}  // namespace shoal::kernels::ref
