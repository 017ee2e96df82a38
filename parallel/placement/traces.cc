#include "parallel/placement/traces.h"

#include <algorithm>
#include <cmath>

#include "parallel/placement/apportion.h"
#include "runtime/base/check.h"
#include "runtime/kernels/cpu/philox.h"

namespace shoal {
namespace {

enum Kind : uint32_t { kPopularity, kRankNoise, kTaste };

// exp and log from operations that IEEE 754 rounds in one way: the C library's differ between processors.
double Exp(double x) {
  const double whole = std::nearbyint(x * 1.4426950408889634);
  const double r = x - whole * 0.6931471805599453;
  double sum = 1;
  for (int n = 16; n >= 1; --n) sum = 1 + sum * r / n;
  return std::ldexp(sum, static_cast<int>(whole));
}

double Log(double x) {
  int exponent = 0;
  const double m = std::frexp(x, &exponent);
  const double z = (m - 0.75) / (m + 0.75), zz = z * z;  // log(m / 0.75) = 2 artanh(z), |z| <= 0.2.
  double sum = 0;
  for (int n = 25; n >= 1; n -= 2) sum = sum * zz + 1.0 / n;
  return exponent * 0.6931471805599453 - 0.2876820724517809 + 2 * z * sum;
}

}  // namespace

RoutingTrace::RoutingTrace(const TraceOptions& options) : options_(options) {
  SHOAL_CHECK(options.layers >= 1 && options.ranks >= 1 && options.experts >= 1 && options.tokens_per_rank >= 0);
  SHOAL_CHECK(options.choices >= 1 && options.choices <= options.experts);
  SHOAL_CHECK(options.drift >= 0 && options.drift <= 1 && options.taste_ranks >= 1);
  for (int layer = 0; layer < options.layers; ++layer) {
    for (int expert = 0; expert < options.experts; ++expert) {
      popularity_LE_.push_back(options.sigma * Normal(kPopularity, layer, 0, expert, 0));
    }
  }
}

// Marsaglia's polar method; a rejected pair goes on to the next draw of the same counter.
double RoutingTrace::Normal(uint32_t kind, int layer, int rank, int expert, int64_t step) const {
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(options_.seed), static_cast<uint32_t>(options_.seed >> 32)};
  for (uint32_t attempt = 0;; ++attempt) {
    const std::array<uint32_t, 4> words = kernels::Philox(
        {static_cast<uint32_t>(step), static_cast<uint32_t>(expert) | kind << 20 | attempt << 24,
         static_cast<uint32_t>(rank), static_cast<uint32_t>(layer)}, key);
    const double u = (words[0] + 0.5) * 0x1p-31 - 1, v = (words[1] + 0.5) * 0x1p-31 - 1, s = u * u + v * v;
    if (s > 0 && s < 1) return u * std::sqrt(-2 * Log(s) / s);
  }
}

std::vector<int64_t> RoutingTrace::Rows(int layer) const {
  const size_t experts = static_cast<size_t>(options_.experts);
  std::vector<int64_t> rows;
  rows.reserve(experts * static_cast<size_t>(options_.ranks));
  std::vector<double> logarithm(experts);
  std::vector<int64_t> weight(experts);
  for (int rank = 0; rank < options_.ranks; ++rank) {
    for (size_t e = 0; e < experts; ++e) {
      const int expert = static_cast<int>(e);
      logarithm[e] = popularity_LE_[static_cast<size_t>(layer) * experts + e];
      if (options_.rank_noise > 0) logarithm[e] += options_.rank_noise * Normal(kRankNoise, layer, rank, expert, step_);
      if (options_.taste_sigma > 0) {
        logarithm[e] += options_.taste_sigma * Normal(kTaste, layer, rank / options_.taste_ranks, expert, 0);
      }
    }
    const double largest = *std::max_element(logarithm.begin(), logarithm.end());
    for (size_t e = 0; e < experts; ++e) {
      weight[e] = 1 + static_cast<int64_t>(Exp(std::max(logarithm[e] - largest, -40.0)) * 0x1p40);
    }
    const std::vector<int64_t> mine =
        Apportion(options_.tokens_per_rank * options_.choices, weight, options_.tokens_per_rank);
    rows.insert(rows.end(), mine.begin(), mine.end());
  }
  return rows;
}

void RoutingTrace::Advance() {
  ++step_;
  const double keep = std::sqrt(1 - options_.drift * options_.drift);
  size_t at = 0;
  for (int layer = 0; layer < options_.layers; ++layer) {
    for (int expert = 0; expert < options_.experts; ++expert, ++at) {
      popularity_LE_[at] = keep * popularity_LE_[at] +
                           options_.drift * options_.sigma * Normal(kPopularity, layer, 0, expert, step_);
    }
  }
}

}  // namespace shoal
