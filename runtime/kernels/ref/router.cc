#include "runtime/kernels/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

void Softmax(const Tensor& logits, const Tensor& probs, const Tensor& logz, Stream&) {
  const int64_t T = logits.dim(0), E = logits.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    double max = Get(logits, t * E), sum = 0;
    for (int64_t e = 1; e < E; ++e) max = std::max(max, Get(logits, t * E + e));
    for (int64_t e = 0; e < E; ++e) sum += std::exp(Get(logits, t * E + e) - max);
    for (int64_t e = 0; e < E; ++e) Set(probs, t * E + e, std::exp(Get(logits, t * E + e) - max) / sum);
    Set(logz, t, max + std::log(sum));
  }
}

void SoftmaxBackward(const Tensor& probs, const Tensor& logz, const Tensor& dprobs, float z_scale, const Tensor& dlogits,
                     Stream&) {
  const int64_t T = probs.dim(0), E = probs.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    double dot = 0;
    for (int64_t e = 0; e < E; ++e) dot += Get(dprobs, t * E + e) * Get(probs, t * E + e);
    const double by_logz = z_scale == 0 ? 0.0 : 2 * static_cast<double>(z_scale) * Get(logz, t);
    for (int64_t e = 0; e < E; ++e) {
      Set(dlogits, t * E + e, Get(probs, t * E + e) * (Get(dprobs, t * E + e) - dot + by_logz));
    }
  }
}

void TopKSigmoid(const Tensor& logits, const Tensor& bias, float scale, const Tensor& scores, const Tensor& chosen,
                 const Tensor& weights, Stream&) {
  const int64_t T = logits.dim(0), E = logits.dim(1), K = chosen.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> score(static_cast<size_t>(E)), biased(static_cast<size_t>(E));
    for (int64_t e = 0; e < E; ++e) {
      const size_t at = static_cast<size_t>(e);
      score[at] = 1 / (1 + std::exp(-Get(logits, t * E + e)));
      biased[at] = score[at] + Get(bias, e);
      Set(scores, t * E + e, score[at]);
    }
    std::vector<size_t> order(static_cast<size_t>(E));
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return biased[a] > biased[b]; });
    double sum = 0;
    for (size_t k = 0; k < static_cast<size_t>(K); ++k) sum += score[order[k]];
    for (int64_t k = 0; k < K; ++k) {
      const size_t expert = order[static_cast<size_t>(k)];
      Set(chosen, t * K + k, static_cast<double>(expert));
      Set(weights, t * K + k, static_cast<double>(scale) * score[expert] / sum);
    }
  }
}

void TopKSigmoidBackward(const Tensor& scores, const Tensor& chosen, const Tensor& weights, float scale, const Tensor& dweights,
                         const Tensor& dshare, const Tensor& dlogits, Stream&) {
  const int64_t T = scores.dim(0), E = scores.dim(1), K = chosen.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> dscore(static_cast<size_t>(E));
    if (!dshare.empty()) {
      const int64_t row = t / (T / dshare.dim(0)) * E;
      double sum = 0, along = 0;
      for (int64_t e = 0; e < E; ++e) {
        sum += Get(scores, t * E + e);
        along += Get(dshare, row + e) * Get(scores, t * E + e);
      }
      for (int64_t e = 0; e < E; ++e) dscore[static_cast<size_t>(e)] = (Get(dshare, row + e) - along / sum) / sum;
    }
    double sum = 0, along = 0;
    for (int64_t k = 0; k < K; ++k) {
      sum += Get(scores, t * E + GetIndex(chosen, t * K + k));
      along += Get(dweights, t * K + k) * Get(weights, t * K + k);
    }
    for (int64_t k = 0; k < K; ++k) {
      const size_t expert = static_cast<size_t>(GetIndex(chosen, t * K + k));
      dscore[expert] += (static_cast<double>(scale) * Get(dweights, t * K + k) - along) / sum;
    }
    for (int64_t e = 0; e < E; ++e) {
      const double score = Get(scores, t * E + e);
      Set(dlogits, t * E + e, dscore[static_cast<size_t>(e)] * score * (1 - score));
    }
  }
}

void SumShares(const Tensor& scores, const Tensor& sums, Stream&) {
  const int64_t T = scores.dim(0), E = scores.dim(1), Q = sums.dim(0);
  for (int64_t i = 0; i < Q * E; ++i) Set(sums, i, 0);
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += Get(scores, t * E + e);
    for (int64_t e = 0; e < E; ++e) AddAt(sums, t / (T / Q) * E + e, Get(scores, t * E + e) / sum);
  }
}

void TopTokens(const Tensor& scores, int64_t C, const Tensor& score, const Tensor& token, Stream&) {
  const int64_t T = scores.dim(0), E = scores.dim(1);
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> order(static_cast<size_t>(T));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return Get(scores, a * E + e) > Get(scores, b * E + e); });
    Set(token, e, C == 0 ? -1.0 : static_cast<double>(order[static_cast<size_t>(C - 1)]));
    Set(score, e, C == 0 ? std::numeric_limits<double>::infinity() : Get(scores, order[static_cast<size_t>(C - 1)] * E + e));
  }
}

void NormalizeRows(const Tensor& x, const Tensor& y, const Tensor& norm, Stream&) {
  const int64_t R = x.dim(0), N = x.dim(1);
  for (int64_t r = 0; r < R; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < N; ++i) squares += Get(x, r * N + i) * Get(x, r * N + i);
    const double length = std::max(std::sqrt(squares), static_cast<double>(kNormMin));
    Set(norm, r, length);
    for (int64_t i = 0; i < N; ++i) Set(y, r * N + i, Get(x, r * N + i) / length);
  }
}

void NormalizeRowsBackward(const Tensor& dy, const Tensor& y, const Tensor& norm, const Tensor& dx, Stream&) {
  const int64_t R = y.dim(0), N = y.dim(1);
  for (int64_t r = 0; r < R; ++r) {
    double along = 0;
    for (int64_t i = 0; i < N; ++i) along += Get(dy, r * N + i) * Get(y, r * N + i);
    if (Get(norm, r) <= static_cast<double>(kNormMin)) along = 0;
    for (int64_t i = 0; i < N; ++i) Set(dx, r * N + i, (Get(dy, r * N + i) - Get(y, r * N + i) * along) / Get(norm, r));
  }
}

}  // namespace shoal::kernels::ref
