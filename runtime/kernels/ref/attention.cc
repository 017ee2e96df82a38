#include "runtime/kernels/attention.h"

#include <algorithm>
#include <cmath>

#include "runtime/base/check.h"
#include "runtime/kernels/ref/attention_f64.h"

namespace shoal::kernels::ref {
namespace {

std::vector<double> ToF64(const Tensor& x) {
  std::vector<double> values(static_cast<size_t>(x.elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = x.dtype() == DType::kBF16 ? static_cast<float>(x.data<BFloat16>()[i]) : x.data<float>()[i];
  }
  return values;
}

void FromF64(const std::vector<double>& values, const Tensor& x) {
  SHOAL_CHECK_EQ(static_cast<int64_t>(values.size()), x.elements());
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = static_cast<float>(values[i]);
    if (x.dtype() == DType::kBF16) {
      x.data<BFloat16>()[i] = BFloat16(value);
    } else {
      x.data<float>()[i] = value;
    }
  }
}

double Dot(const double* a, const double* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Offsets of one query head's vectors in qkv and of its KV head's.
struct Head {
  int64_t q, k, v;
  Head(const AttentionShape& shape, int head) {
    const int64_t kv_head = head / (shape.heads / shape.kv_heads);
    q = static_cast<int64_t>(head) * shape.dim;
    k = shape.q_width() + kv_head * shape.dim;
    v = k + shape.kv_width();
  }
};

// The first token that `token` sees, both counted over all sequences.
int64_t FirstToken(const AttentionShape& shape, absl::Span<const int32_t> first, int64_t token) {
  return token / shape.seq * shape.seq + (first.empty() ? 0 : first[static_cast<size_t>(token)]);
}

absl::Span<const int32_t> ValuesOf(const Tensor& first) {
  return first.empty() ? absl::Span<const int32_t>() : first.span<int32_t>();
}

// The probabilities of the keys first_token .. token for one query; returns the log of the denominator.
double Probabilities(const AttentionShape& shape, const std::vector<double>& qkv, const Head& head,
                     int64_t first_token, int64_t token, std::vector<double>& probs) {
  const double scale = 1 / std::sqrt(static_cast<double>(shape.dim));
  const int64_t width = shape.qkv_width();
  probs.clear();
  for (int64_t key = first_token; key <= token; ++key) {
    probs.push_back(scale * Dot(&qkv[token * width + head.q], &qkv[key * width + head.k], shape.dim));
  }
  const double max = *std::max_element(probs.begin(), probs.end());
  double sum = 0;
  for (double& p : probs) sum += p = std::exp(p - max);
  for (double& p : probs) p /= sum;
  return max + std::log(sum);
}

}  // namespace

AttentionF64 AttentionForwardF64(const AttentionShape& shape, const std::vector<double>& qkv,
                                 absl::Span<const int32_t> first_key) {
  const int64_t tokens = shape.rows * shape.seq;
  AttentionF64 result;
  result.out.assign(static_cast<size_t>(tokens * shape.q_width()), 0.0);
  result.lse.assign(static_cast<size_t>(tokens * shape.heads), 0.0);
  std::vector<double> probs;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t first = FirstToken(shape, first_key, token);
    for (int h = 0; h < shape.heads; ++h) {
      const Head head(shape, h);
      result.lse[token * shape.heads + h] = Probabilities(shape, qkv, head, first, token, probs);
      for (int64_t key = first; key <= token; ++key) {
        for (int i = 0; i < shape.dim; ++i) {
          result.out[token * shape.q_width() + head.q + i] +=
              probs[key - first] * qkv[key * shape.qkv_width() + head.v + i];
        }
      }
    }
  }
  return result;
}

std::vector<double> AttentionBackwardF64(const AttentionShape& shape, const std::vector<double>& qkv,
                                         absl::Span<const int32_t> first_key,
                                         const std::vector<double>& dout) {
  const int64_t tokens = shape.rows * shape.seq;
  const int64_t width = shape.qkv_width();
  const double scale = 1 / std::sqrt(static_cast<double>(shape.dim));
  std::vector<double> dqkv(qkv.size(), 0.0);
  std::vector<double> probs, dprobs;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t first = FirstToken(shape, first_key, token);
    for (int h = 0; h < shape.heads; ++h) {
      const Head head(shape, h);
      Probabilities(shape, qkv, head, first, token, probs);
      const double* dout_row = &dout[token * shape.q_width() + head.q];
      double delta = 0;
      dprobs.clear();
      for (int64_t key = first; key <= token; ++key) {
        dprobs.push_back(Dot(dout_row, &qkv[key * width + head.v], shape.dim));
        delta += probs[key - first] * dprobs.back();
      }
      for (int64_t key = first; key <= token; ++key) {
        const double p = probs[key - first];
        const double dscore = scale * p * (dprobs[key - first] - delta);
        for (int i = 0; i < shape.dim; ++i) {
          dqkv[token * width + head.q + i] += dscore * qkv[key * width + head.k + i];
          dqkv[key * width + head.k + i] += dscore * qkv[token * width + head.q + i];
          dqkv[key * width + head.v + i] += p * dout_row[i];
        }
      }
    }
  }
  return dqkv;
}

void Attention(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out,
               const Tensor& lse, Stream&) {
  const AttentionF64 result = AttentionForwardF64(shape, ToF64(qkv), ValuesOf(first));
  FromF64(result.out, out);
  FromF64(result.lse, lse);
}

void AttentionBackward(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor&,
                       const Tensor&, const Tensor& dout, const Tensor& dqkv, Stream&) {
  FromF64(AttentionBackwardF64(shape, ToF64(qkv), ValuesOf(first), ToF64(dout)), dqkv);
}

}  // namespace shoal::kernels::ref
