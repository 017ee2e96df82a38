#include "runtime/kernels/router.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

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

// Of a tally: tokens that are worth a block of their own, and how many blocks there are at most, because each that gives slots to pairs
// reads the counts of all (a device's cache has room for them).
constexpr int64_t kTallyTokens = 32, kTallyBlocks = 256;

// The first of the tokens of a part of `parts`, which may be the one behind the last.
int64_t EvenBegin(int64_t tokens, int64_t parts, int64_t part) { return part * (tokens / parts) + std::min(part, tokens % parts); }

void CheckTally(const Tally& tally, int64_t E) {
  if (tally.counts.empty()) return;
  const int64_t B = tally.counts.dim(0);
  SHOAL_CHECK(tally.pieces >= 1 && B >= 1 && B % tally.pieces == 0) << B << " blocks of " << tally.pieces << " pieces";
  CheckTensor(tally.counts, DType::kI32, {B, E}, "counts");
  if (!tally.sums.empty()) CheckTensor(tally.sums, DType::kF64, {B, E + 1}, "sums");
}

// probs_TE and logz_T are read where the tally has sums.
void FillTally(const Tally& tally, const Tensor& chosen, const Tensor& probs, const Tensor& logz) {
  if (tally.counts.empty()) return;
  const int64_t T = chosen.dim(0), K = chosen.dim(1), B = tally.counts.dim(0), E = tally.counts.dim(1), each = B / tally.pieces;
  const auto sum_rows = Inner().sum_rows;
  ParallelFor(B, GrainOfRows((K + (tally.sums.empty() ? 0 : E)) * (T / B + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t piece = EvenBegin(T, tally.pieces, block / each), tokens = EvenBegin(T, tally.pieces, block / each + 1) - piece;
      const int64_t first = piece + EvenBegin(tokens, each, block % each), last = piece + EvenBegin(tokens, each, block % each + 1);
      int32_t* counts = tally.counts.data<int32_t>() + block * E;
      std::fill_n(counts, E, 0);
      for (int64_t i = first * K; i < last * K; ++i) ++counts[chosen.data<int32_t>()[i]];
      if (tally.sums.empty()) continue;
      double* sums = tally.sums.data<double>() + block * (E + 1);
      std::fill_n(sums, E + 1, 0.0);
      sum_rows(probs.data<float>(), sums, E, first, last);
      for (int64_t t = first; t < last; ++t) {
        const double value = static_cast<double>(logz.data<float>()[t]);
        sums[E] += value * value;
      }
    }
  });
}

}  // namespace

Tally MakeTally(int64_t tokens, int64_t experts, int pieces, TallySums sums, Stream& stream) {
  const int64_t worth = (tokens / pieces + kTallyTokens - 1) / kTallyTokens;
  const int64_t blocks = pieces * std::clamp<int64_t>(worth, 1, std::max<int64_t>(1, kTallyBlocks / pieces));
  Tally tally{.pieces = pieces, .counts = Empty({blocks, experts}, DType::kI32, stream), .sums = {}};
  if (sums == TallySums::kYes) tally.sums = Empty({blocks, experts + 1}, DType::kF64, stream);
  return tally;
}

void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream& stream, const Tally& tally) {
  const int64_t T = logits.dim(0), E = logits.dim(1), K = chosen.dim(1);
  SHOAL_CHECK(E >= 1 && K >= 1 && K <= E) << K << " of " << E << " experts";
  CheckTensor(logits, DType::kF32, {T, E}, "logits");
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  const bool renormal = renormalize == Renormalize::kYes;
  CheckTally(tally, E);
  if (Offloaded(stream, &DeviceKernels::topk_softmax, logits, renormal, probs, chosen, weights, logz, tally.pieces, tally.counts,
                tally.sums)) {
    return;
  }
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
  FillTally(tally, chosen, probs, logz);
}

void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream& stream) {
  const int64_t T = probs.dim(0), E = probs.dim(1), K = chosen.dim(1);
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  CheckTensor(dweights, DType::kF32, {T, K}, "dweights");
  CheckTensor(dlogits, DType::kF32, {T, E}, "dlogits");
  if (!dprob.empty()) CheckTensor(dprob, DType::kF32, {E}, "dprob");
  const bool renormal = renormalize == Renormalize::kYes;
  if (Offloaded(stream, &DeviceKernels::topk_softmax_backward, probs, chosen, weights, logz, renormal, dweights, dprob, z_scale,
                dlogits)) {
    return;
  }
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

void Softmax(const Tensor& logits, const Tensor& probs, const Tensor& logz, Stream& stream) {
  const int64_t T = logits.dim(0), E = logits.dim(1);
  CheckTensor(logits, DType::kF32, {T, E}, "logits");
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  if (Offloaded(stream, &DeviceKernels::softmax, logits, probs, logz)) return;
  const Tensor sums = Empty({T}, DType::kF32);
  const SoftmaxArgs args = {.logits = logits.data<float>(),
                            .probs = probs.data<float>(),
                            .max = logz.data<float>(),
                            .sum = sums.data<float>(),
                            .width = E};
  const auto softmax = Inner().softmax;
  ParallelFor(T, GrainOfRows(2 * E), [&](int64_t begin, int64_t end) {
    softmax(args, begin, end);
    for (int64_t t = begin; t < end; ++t) args.max[t] += std::log(args.sum[t]);
  });
}

void SoftmaxBackward(const Tensor& probs, const Tensor& logz, const Tensor& dprobs, float z_scale, const Tensor& dlogits,
                     Stream& stream) {
  const int64_t T = probs.dim(0), E = probs.dim(1);
  CheckTensor(probs, DType::kF32, {T, E}, "probs");
  CheckTensor(logz, DType::kF32, {T}, "logz");
  CheckTensor(dprobs, DType::kF32, {T, E}, "dprobs");
  CheckTensor(dlogits, DType::kF32, {T, E}, "dlogits");
  if (Offloaded(stream, &DeviceKernels::softmax_backward, probs, logz, dprobs, z_scale, dlogits)) return;
  const InnerKernels& inner = Inner();
  ParallelFor(T, GrainOfRows(3 * E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const SoftmaxBackwardArgs row = {.probs = probs.data<float>() + t * E,
                                       .dprob = dprobs.data<float>() + t * E,
                                       .dlogits = dlogits.data<float>() + t * E,
                                       .width = E};
      const float by_logz = z_scale == 0 ? 0.0f : 2 * z_scale * logz.data<float>()[t];
      inner.softmax_backward(row, by_logz - inner.dot(row.probs, row.dprob, E), 0);
    }
  });
}

void TopKSigmoid(const Tensor& logits, const Tensor& bias, float scale, const Tensor& scores, const Tensor& chosen,
                 const Tensor& weights, Stream& stream, const Tally& tally) {
  const int64_t T = logits.dim(0), E = logits.dim(1), K = chosen.dim(1);
  SHOAL_CHECK(E >= 1 && K >= 1 && K <= E) << K << " of " << E << " experts";
  SHOAL_CHECK(tally.sums.empty()) << "sums of probabilities that are none";
  CheckTally(tally, E);
  CheckTensor(logits, DType::kF32, {T, E}, "logits");
  CheckTensor(bias, DType::kF32, {E}, "bias");
  CheckTensor(scores, DType::kF32, {T, E}, "scores");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  if (Offloaded(stream, &DeviceKernels::topk_sigmoid, logits, bias, scale, scores, chosen, weights, tally.pieces, tally.counts)) return;
  const auto sigmoid = Inner().sigmoid;
  ParallelFor(T, GrainOfRows(3 * E), [&](int64_t begin, int64_t end) {
    std::vector<float> biased(static_cast<size_t>(E));
    sigmoid(logits.data<float>() + begin * E, scores.data<float>() + begin * E, (end - begin) * E);
    for (int64_t t = begin; t < end; ++t) {
      const float* score = scores.data<float>() + t * E;
      int32_t* choice = chosen.data<int32_t>() + t * K;
      float* weight = weights.data<float>() + t * K;
      for (int64_t e = 0; e < E; ++e) biased[static_cast<size_t>(e)] = score[e] + bias.data<float>()[e];
      ChooseTopK(biased.data(), E, K, choice);
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += weight[k] = score[choice[k]];
      for (int64_t k = 0; k < K; ++k) weight[k] *= scale / sum;
    }
  });
  FillTally(tally, chosen, scores, Tensor());
}

void TopKSigmoidBackward(const Tensor& scores, const Tensor& chosen, const Tensor& weights, float scale, const Tensor& dweights,
                         const Tensor& dshare, const Tensor& dlogits, Stream& stream) {
  const int64_t T = scores.dim(0), E = scores.dim(1), K = chosen.dim(1), Q = dshare.empty() ? 1 : dshare.dim(0);
  SHOAL_CHECK(T % Q == 0) << T << " tokens of " << Q << " sequences";
  CheckTensor(scores, DType::kF32, {T, E}, "scores");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(dweights, DType::kF32, {T, K}, "dweights");
  CheckTensor(dlogits, DType::kF32, {T, E}, "dlogits");
  if (!dshare.empty()) CheckTensor(dshare, DType::kF32, {Q, E}, "dshare");
  if (Offloaded(stream, &DeviceKernels::topk_sigmoid_backward, scores, chosen, weights, scale, dweights, dshare, dlogits)) return;
  const auto dot = Inner().dot;
  ParallelFor(T, GrainOfRows(3 * E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* score = scores.data<float>() + t * E;
      const int32_t* choice = chosen.data<int32_t>() + t * K;
      const float* dweight = dweights.data<float>() + t * K;
      float* dlogit = dlogits.data<float>() + t * E;
      // First dL/dscore.
      std::fill_n(dlogit, E, 0.0f);
      if (!dshare.empty()) {
        const float* d = dshare.data<float>() + t / (T / Q) * E;
        float sum = 0;
        for (int64_t e = 0; e < E; ++e) sum += score[e];
        const float along = dot(d, score, E) / sum;
        for (int64_t e = 0; e < E; ++e) dlogit[e] = (d[e] - along) / sum;
      }
      float chosen_sum = 0, along = 0;
      for (int64_t k = 0; k < K; ++k) {
        chosen_sum += score[choice[k]];
        along += dweight[k] * weights.data<float>()[t * K + k];
      }
      for (int64_t k = 0; k < K; ++k) dlogit[choice[k]] += (scale * dweight[k] - along) / chosen_sum;
      for (int64_t e = 0; e < E; ++e) dlogit[e] *= score[e] * (1 - score[e]);
    }
  });
}

void SumShares(const Tensor& scores, const Tensor& sums, Stream& stream) {
  const int64_t T = scores.dim(0), E = scores.dim(1), Q = sums.dim(0);
  CheckTensor(scores, DType::kF32, {T, E}, "scores");
  CheckTensor(sums, DType::kF64, {Q, E}, "sums");
  SHOAL_CHECK(Q == 0 ? T == 0 : T % Q == 0) << T << " tokens of " << Q << " sequences";
  if (Offloaded(stream, &DeviceKernels::sum_shares, scores, sums)) return;
  const int64_t seq = Q == 0 ? 0 : T / Q;
  ParallelFor(Q, GrainOfRows(2 * seq * E), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      double* own = sums.data<double>() + q * E;
      std::fill_n(own, E, 0.0);
      for (int64_t t = q * seq; t < (q + 1) * seq; ++t) {
        const float* score = scores.data<float>() + t * E;
        double sum = 0;
        for (int64_t e = 0; e < E; ++e) sum += static_cast<double>(score[e]);
        for (int64_t e = 0; e < E; ++e) own[e] += static_cast<double>(score[e]) / sum;
      }
    }
  });
}

void TopTokens(const Tensor& scores, int64_t C, const Tensor& score, const Tensor& token, Stream& stream) {
  const int64_t T = scores.dim(0), E = scores.dim(1);
  SHOAL_CHECK(C >= 0 && C <= T && T <= UINT32_MAX) << C << " of " << T << " tokens";
  CheckTensor(scores, DType::kF32, {T, E}, "scores");
  CheckTensor(score, DType::kF32, {E}, "score");
  CheckTensor(token, DType::kI64, {E}, "token");
  if (Offloaded(stream, &DeviceKernels::top_tokens, scores, C, score, token)) return;
  std::fill_n(score.data<float>(), E, std::numeric_limits<float>::infinity());
  std::fill_n(token.data<int64_t>(), E, int64_t{-1});
  if (C == 0) return;
  ParallelFor(E, GrainOfRows(8 * T), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(static_cast<size_t>(T));  // Greater is better: the score, then the earlier token.
    for (int64_t e = begin; e < end; ++e) {
      for (int64_t t = 0; t < T; ++t) {
        const uint32_t order = static_cast<uint32_t>(OrderOf(scores.data<float>()[t * E + e])) ^ 0x80000000u;
        keys[static_cast<size_t>(t)] = uint64_t{order} << 32 | (UINT32_MAX - static_cast<uint32_t>(t));
      }
      std::nth_element(keys.begin(), keys.begin() + (C - 1), keys.end(), std::greater<>());
      const int64_t worst = UINT32_MAX - static_cast<uint32_t>(keys[static_cast<size_t>(C - 1)]);
      token.data<int64_t>()[e] = worst;
      score.data<float>()[e] = scores.data<float>()[worst * E + e];
    }
  });
}

void NormalizeRows(const Tensor& x, const Tensor& y, const Tensor& norm, Stream& stream) {
  const int64_t R = x.dim(0), N = x.dim(1);
  CheckTensor(x, DType::kF32, {R, N}, "x");
  CheckTensor(y, DType::kF32, {R, N}, "y");
  CheckTensor(norm, DType::kF32, {R}, "norm");
  if (Offloaded(stream, &DeviceKernels::normalize_rows, x, y, norm)) return;
  const auto dot = Inner().dot;
  ParallelFor(R, GrainOfRows(2 * N), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x.data<float>() + r * N;
      const float length = std::max(std::sqrt(dot(row, row, N)), kNormMin);
      norm.data<float>()[r] = length;
      for (int64_t i = 0; i < N; ++i) y.data<float>()[r * N + i] = row[i] / length;
    }
  });
}

void NormalizeRowsBackward(const Tensor& dy, const Tensor& y, const Tensor& norm, const Tensor& dx, Stream& stream) {
  const int64_t R = y.dim(0), N = y.dim(1);
  CheckTensor(dy, DType::kF32, {R, N}, "dy");
  CheckTensor(y, DType::kF32, {R, N}, "y");
  CheckTensor(norm, DType::kF32, {R}, "norm");
  CheckTensor(dx, DType::kF32, {R, N}, "dx");
  if (Offloaded(stream, &DeviceKernels::normalize_rows_backward, dy, y, norm, dx)) return;
  const auto dot = Inner().dot;
  ParallelFor(R, GrainOfRows(3 * N), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = y.data<float>() + r * N;
      const float* drow = dy.data<float>() + r * N;
      const float length = norm.data<float>()[r];
      // Below the bound the length is a constant.
      const float along = length > kNormMin ? dot(row, drow, N) : 0.0f;
      for (int64_t i = 0; i < N; ++i) dx.data<float>()[r * N + i] = (drow[i] - row[i] * along) / length;
    }
  });
}

void SumOverTokens(const Tensor& values, const Tensor& sums, Stream& stream) {
  const int64_t T = values.dim(0), E = values.dim(1);
  CheckTensor(values, DType::kF32, {T, E}, "values");
  CheckTensor(sums, DType::kF64, {E}, "sums");
  if (Offloaded(stream, &DeviceKernels::sum_over_tokens, values, sums)) return;
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

void SumTally(const Tally& tally, const Tensor& totals, Stream& stream) {
  const int64_t B = tally.counts.dim(0), E = tally.counts.dim(1), P = tally.pieces;
  CheckTally(tally, E);
  CheckTensor(totals, DType::kF64, {P * E + (tally.sums.empty() ? 0 : E + 1)}, "totals");
  if (Offloaded(stream, &DeviceKernels::sum_tally, tally.pieces, tally.counts, tally.sums, totals)) return;
  double* const to = totals.data<double>();
  std::fill_n(to, totals.elements(), 0.0);
  for (int64_t block = 0; block < B; ++block) {
    double* counts = to + block / (B / P) * E;
    for (int64_t e = 0; e < E; ++e) counts[e] += tally.counts.data<int32_t>()[block * E + e];
    if (tally.sums.empty()) continue;
    for (int64_t i = 0; i <= E; ++i) to[P * E + i] += tally.sums.data<double>()[block * (E + 1) + i];
  }
}

void OrderByExpert(const Tensor& chosen, const Tally& tally, const Tensor& offset, const Tensor& segments, const Tensor& slot,
                   const Tensor& token, const TallyTotals& totals, Stream& stream) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1), E = segments.dim(0);
  SHOAL_CHECK(T * K < INT32_MAX) << T << " tokens with " << K << " choices";
  SHOAL_CHECK(tally.pieces == 1 && !tally.counts.empty()) << "choices of " << tally.pieces << " pieces, or not counted";
  CheckTally(tally, E);
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(offset, DType::kI32, {T + 1}, "offset");
  CheckTensor(segments, DType::kI32, {E, 3}, "segments");
  CheckTensor(slot, DType::kI32, {T * K}, "slot");
  CheckTensor(token, DType::kI32, {T * K}, "token");
  const bool adds = !totals.counts.empty(), adds_sums = adds && !tally.sums.empty();
  if (adds) CheckTensor(totals.counts, DType::kF64, {E}, "counts");
  if (adds_sums) CheckTensor(totals.probs, DType::kF64, {E}, "probs");
  if (adds_sums) CheckTensor(totals.z, DType::kF64, {1}, "z");
  if (Offloaded(stream, &DeviceKernels::order_by_expert, chosen, tally.counts, tally.sums, offset, segments, slot, token, totals.counts,
                totals.probs, totals.z)) {
    return;
  }
  const Tensor own = Empty({E + (tally.sums.empty() ? 0 : E + 1)}, DType::kF64);
  SumTally(tally, own, stream);
  const double* sums = own.data<double>();
  for (int64_t t = 0; t <= T; ++t) offset.data<int32_t>()[t] = static_cast<int32_t>(t * K);
  std::vector<int32_t> next(static_cast<size_t>(E));
  int32_t first = 0;
  for (int64_t e = 0; e < E; ++e) {
    int32_t* segment = segments.data<int32_t>() + 3 * e;
    segment[0] = static_cast<int32_t>(e);
    segment[1] = next[static_cast<size_t>(e)] = first;
    segment[2] = static_cast<int32_t>(sums[e]);
    first += segment[2];
    if (adds) totals.counts.data<double>()[e] += sums[e];
    if (adds_sums) totals.probs.data<double>()[e] += sums[E + e];
  }
  if (adds_sums) *totals.z.data<double>() += sums[2 * E];
  for (int64_t pair = 0; pair < T * K; ++pair) {
    const int32_t place = next[static_cast<size_t>(chosen.data<int32_t>()[pair])]++;
    slot.data<int32_t>()[pair] = place;
    token.data<int32_t>()[place] = static_cast<int32_t>(pair / K);
  }
}

void OrderByShares(const Tensor& chosen, const Tally& tally, const Tensor& shares, const Tensor& offset, const Tensor& slot,
                   const Tensor& token, Stream& stream) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1), E = tally.counts.dim(1), P = tally.pieces;
  SHOAL_CHECK(T * K < INT32_MAX) << T << " tokens with " << K << " choices";
  CheckTally(tally, E);
  SHOAL_CHECK(shares.elements() > P * E && (shares.elements() - P * E - 1) % 2 == 0) << shares.elements() << " numbers of shares";
  CheckTensor(shares, DType::kI32, {shares.elements()}, "shares");
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(offset, DType::kI32, {T + 1}, "offset");
  CheckTensor(slot, DType::kI32, {T * K}, "slot");
  CheckTensor(token, DType::kI32, {T * K}, "token");
  if (Offloaded(stream, &DeviceKernels::order_by_shares, chosen, tally.pieces, tally.counts, shares, offset, slot, token)) return;
  for (int64_t t = 0; t <= T; ++t) offset.data<int32_t>()[t] = static_cast<int32_t>(t * K);
  const int32_t *first = shares.data<int32_t>(), *share = first + P * E + 1;
  std::vector<int32_t> next(static_cast<size_t>(E));
  for (int64_t piece = 0; piece < P; ++piece, first += E) {
    std::fill(next.begin(), next.end(), 0);
    for (int64_t pair = EvenBegin(T, P, piece) * K; pair < EvenBegin(T, P, piece + 1) * K; ++pair) {
      const int32_t expert = chosen.data<int32_t>()[pair], number = next[static_cast<size_t>(expert)]++;
      int64_t of = first[expert];
      while (number >= share[2 * of]) ++of;
      const int32_t row = number + share[2 * of + 1];
      slot.data<int32_t>()[pair] = row;
      token.data<int32_t>()[row] = static_cast<int32_t>(pair / K);
    }
  }
}

void GradientOfCounts(const Tensor& sums, int64_t first, CountsOf counts, double scale, const Tensor& dprob, Stream& stream) {
  const int64_t L = sums.dim(0), N = sums.dim(1), E = dprob.dim(1);
  SHOAL_CHECK(first >= 0 && first + E <= N) << first << "+" << E << " of " << N << " columns";
  CheckTensor(sums, DType::kF64, {L, N}, "sums");
  CheckTensor(dprob, DType::kF32, {L, E}, "dprob");
  const bool all = counts == CountsOf::kAllLayers;
  if (Offloaded(stream, &DeviceKernels::gradient_of_counts, sums, first, all, scale, dprob)) return;
  for (int64_t at = 0; at < L * E; ++at) {
    const int64_t begin = all ? 0 : at / E, end = all ? L : at / E + 1;
    double count = 0;
    for (int64_t layer = begin; layer < end; ++layer) count += sums.data<double>()[layer * N + first + at % E];
    dprob.data<float>()[at] = static_cast<float>(scale * count);
  }
}

void SequenceLoads(const Tensor& chosen, float scale, const Tensor& load, Stream& stream) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1), Q = load.dim(0), E = load.dim(1);
  SHOAL_CHECK(Q == 0 ? T == 0 : T % Q == 0) << T << " tokens of " << Q << " sequences";
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(load, DType::kF32, {Q, E}, "load");
  if (Offloaded(stream, &DeviceKernels::sequence_loads, chosen, scale, load)) return;
  if (Q == 0) return;
  const int64_t pairs = T / Q * K;
  const float fair = static_cast<float>(pairs) / static_cast<float>(E);
  std::fill_n(load.data<float>(), Q * E, 0.0f);
  for (int64_t i = 0; i < T * K; ++i) ++load.data<float>()[i / pairs * E + chosen.data<int32_t>()[i]];
  for (float& value : load.span<float>()) value = scale * (value / fair);
}

void AddSequenceLoss(const Tensor& load, const Tensor& shares, double scale, const Tensor& loss, Stream& stream) {
  const int64_t Q = load.dim(0), E = load.dim(1);
  CheckTensor(load, DType::kF32, {Q, E}, "load");
  CheckTensor(shares, DType::kF64, {Q, E}, "shares");
  CheckTensor(loss, DType::kF64, {1}, "loss");
  if (Offloaded(stream, &DeviceKernels::add_sequence_loss, load, shares, scale, loss)) return;
  double sum = 0;
  for (int64_t i = 0; i < load.elements(); ++i) sum += static_cast<double>(load.data<float>()[i]) * shares.data<double>()[i];
  *loss.data<double>() += scale * sum;
}

void DivideBy(const Tensor& x, const Tensor& by, const Tensor& y, Stream& stream) {
  const int64_t R = x.dim(0), N = x.dim(1);
  CheckTensor(x, DType::kF32, {R, N}, "x");
  CheckTensor(y, DType::kF32, {R, N}, "y");
  CheckTensor(by, DType::kF32, {1}, "by");
  if (Offloaded(stream, &DeviceKernels::divide_by, x, by, y)) return;
  for (int64_t i = 0; i < y.elements(); ++i) y.data<float>()[i] = x.data<float>()[i] / *by.data<float>();
}

void DivideByBackward(const Tensor& dy, const Tensor& y, const Tensor& by, const Tensor& dby, Stream& stream) {
  const int64_t R = y.dim(0), N = y.dim(1);
  CheckTensor(dy, DType::kF32, {R, N}, "dy");
  CheckTensor(y, DType::kF32, {R, N}, "y");
  CheckTensor(by, DType::kF32, {1}, "by");
  CheckTensor(dby, DType::kF32, {1}, "dby");
  if (Offloaded(stream, &DeviceKernels::divide_by_backward, dy, y, by, dby)) return;
  double dot = 0;
  for (int64_t i = 0; i < y.elements(); ++i) dot += static_cast<double>(dy.data<float>()[i]) * static_cast<double>(y.data<float>()[i]);
  *dby.data<float>() -= static_cast<float>(dot / static_cast<double>(*by.data<float>()));
}

}  // namespace shoal::kernels
