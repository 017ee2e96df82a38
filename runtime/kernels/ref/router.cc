#include "runtime/kernels/router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream&) {
  const int64_t T = logits.dim(0), E = logits.dim(1), K = chosen.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> logit(static_cast<size_t>(E));
    for (int64_t e = 0; e < E; ++e) logit[static_cast<size_t>(e)] = Get(logits, t * E + e);
    const double max = *std::max_element(logit.begin(), logit.end());
    double sum = 0;
    for (double value : logit) sum += std::exp(value - max);
    Set(logz, t, max + std::log(sum));
    const auto prob = [&](size_t e) { return std::exp(logit[e] - max) / sum; };
    for (int64_t e = 0; e < E; ++e) Set(probs, t * E + e, prob(static_cast<size_t>(e)));
    std::vector<size_t> order(static_cast<size_t>(E));
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logit[a] > logit[b]; });
    double chosen_sum = 0;
    for (size_t k = 0; k < static_cast<size_t>(K); ++k) chosen_sum += prob(order[k]);
    for (int64_t k = 0; k < K; ++k) {
      const size_t expert = order[static_cast<size_t>(k)];
      Set(chosen, t * K + k, static_cast<double>(expert));
      Set(weights, t * K + k, renormalize == Renormalize::kYes ? prob(expert) / chosen_sum : prob(expert));
    }
  }
}

void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream&) {
  const int64_t T = probs.dim(0), E = probs.dim(1), K = chosen.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> dprobs(static_cast<size_t>(E));  // dL/dp.
    if (!dprob.empty()) {
      for (int64_t e = 0; e < E; ++e) dprobs[static_cast<size_t>(e)] = Get(dprob, e);
    }
    double chosen_sum = 0, along = 0;
    for (int64_t k = 0; k < K; ++k) {
      chosen_sum += Get(probs, t * E + GetIndex(chosen, t * K + k));
      along += Get(dweights, t * K + k) * Get(weights, t * K + k);
    }
    for (int64_t k = 0; k < K; ++k) {
      const double d = Get(dweights, t * K + k);
      dprobs[static_cast<size_t>(GetIndex(chosen, t * K + k))] +=
          renormalize == Renormalize::kYes ? (d - along) / chosen_sum : d;
    }
    double dot = 0;
    for (int64_t e = 0; e < E; ++e) dot += dprobs[static_cast<size_t>(e)] * Get(probs, t * E + e);
    for (int64_t e = 0; e < E; ++e) {
      const double by_logz = z_scale == 0 ? 0.0 : 2 * static_cast<double>(z_scale) * Get(logz, t);
      Set(dlogits, t * E + e, Get(probs, t * E + e) * (dprobs[static_cast<size_t>(e)] - dot + by_logz));
    }
  }
}

}  // namespace shoal::kernels::ref
