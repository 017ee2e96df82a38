#include "runtime/kernels/router.h"

#include <bit>
#include <cmath>
#include <vector>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"

namespace shoal::kernels {
namespace {

// Tokens of one partial sum, whatever the number of threads.
constexpr int64_t kTokensPerBlock = 256;

// Orders floats as integers, so that NaN has a place too and a choice is always K different experts. -0
// equals 0.
int32_t OrderOf(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// The K greatest of E logits, greatest first, ties to the lower index. By logits, not by probabilities:
// softmax is monotonic, but its rounding and underflow tie what differs. Insertion into a sorted list: after
// a few dozen experts nearly all others fail its one comparison with the last.
void ChooseTopK(const float* logits, int64_t E, int64_t K, int32_t* chosen) {
  int64_t held = 0;
  for (int64_t expert = 0; expert < E; ++expert) {
    const int32_t order = OrderOf(logits[expert]);
    if (held == K && order <= OrderOf(logits[chosen[K - 1]])) continue;
    int64_t place = held < K ? held++ : K - 1;
    for (; place > 0 && order > OrderOf(logits[chosen[place - 1]]); --place)
      chosen[place] = chosen[place - 1];
    chosen[place] = static_cast<int32_t>(expert);
  }
}

}  // namespace

void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream&) {
  const int64_t T = logits.dim(0), E = logits.dim(1), K = chosen.dim(1);
  SHOAL_CHECK(E >= 1 && K >= 1 && K <= E) << K << " of " << E << " experts";
  CheckTensor(logits, DType::kF32, {T, E}, "logits");
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  const auto softmax = Inner().softmax;
  ParallelFor(T, GrainOfRows(2 * E), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(end - begin));
    const float* logit = logits.data<float>();
    float* log_sum = logz.data<float>();
    const SoftmaxArgs args = {.logits = logit + begin * E,
                              .probs = probs.data<float>() + begin * E,
                              .max = log_sum + begin,
                              .sum = sums.data(),
                              .width = E};
    for (int64_t t = begin; t < end; ++t) ChooseTopK(logit + t * E, E, K, chosen.data<int32_t>() + t * K);
    softmax(args, 0, end - begin);
    for (int64_t t = begin; t < end; ++t) {
      log_sum[t] += std::log(sums[static_cast<size_t>(t - begin)]);
      const float* prob = probs.data<float>() + t * E;
      const int32_t* choice = chosen.data<int32_t>() + t * K;
      float* weight = weights.data<float>() + t * K;
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += weight[k] = prob[choice[k]];
      if (renormalize == Renormalize::kNo) continue;
      for (int64_t k = 0; k < K; ++k) weight[k] /= sum;
    }
  });
}

void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream&) {
  const int64_t T = probs.dim(0), E = probs.dim(1), K = chosen.dim(1);
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  CheckTensor(dweights, DType::kF32, {T, K}, "dweights");
  CheckTensor(dlogits, DType::kF32, {T, E}, "dlogits");
  if (!dprob.empty()) CheckTensor(dprob, DType::kF32, {E}, "dprob");
  const SoftmaxBackwardArgs args = {.probs = probs.data<float>(),
                                    .dprob = dprob.empty() ? nullptr : dprob.data<float>(),
                                    .dlogits = dlogits.data<float>(),
                                    .width = E};
  const InnerKernels& inner = Inner();
  ParallelFor(T, GrainOfRows(2 * E), [&](int64_t begin, int64_t end) {
    std::vector<float> dchosen(static_cast<size_t>(K));  // dL/dp of the chosen, by their weights.
    for (int64_t t = begin; t < end; ++t) {
      const float* prob = args.probs + t * E;
      const int32_t* choice = chosen.data<int32_t>() + t * K;
      const float* weight = weights.data<float>() + t * K;
      const float* dweight = dweights.data<float>() + t * K;
      float chosen_sum = 0, along = 0;
      for (int64_t k = 0; k < K; ++k) {
        chosen_sum += prob[choice[k]];
        along += dweight[k] * weight[k];
      }
      float dot = args.dprob == nullptr ? 0.0f : inner.dot(prob, args.dprob, E);
      for (int64_t k = 0; k < K; ++k) {
        const float d = renormalize == Renormalize::kYes ? (dweight[k] - along) / chosen_sum : dweight[k];
        dchosen[static_cast<size_t>(k)] = d;
        dot += prob[choice[k]] * d;
      }
      const float by_logz = 2 * z_scale * logz.data<float>()[t];
      inner.softmax_backward(args, (z_scale == 0 ? 0.0f : by_logz) - dot, t);
      for (int64_t k = 0; k < K; ++k) {
        args.dlogits[t * E + choice[k]] += prob[choice[k]] * dchosen[static_cast<size_t>(k)];
      }
    }
  });
}

void SumOverTokens(const Tensor& values, const Tensor& sums, Stream&) {
  const int64_t T = values.dim(0), E = values.dim(1);
  CheckTensor(values, DType::kF32, {T, E}, "values");
  CheckTensor(sums, DType::kF64, {E}, "sums");
  const int64_t blocks = (T + kTokensPerBlock - 1) / kTokensPerBlock;
  const Tensor partials = Zeros({blocks, E}, DType::kF64);
  double* partial = partials.data<double>();
  const auto sum_rows = Inner().sum_rows;
  ParallelFor(blocks, GrainOfRows(kTokensPerBlock * E), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokensPerBlock;
      sum_rows(values.data<float>(), partial + block * E, E, first, std::min(first + kTokensPerBlock, T));
    }
  });
  for (int64_t expert = 0; expert < E; ++expert) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * E + expert];
    sums.data<double>()[expert] = sum;
  }
}

}  // namespace shoal::kernels
