// Synthetic routing, for simulations, tests and benchmarks: how many rows each rank's tokens have for each expert, step after
// step. The popularity of a layer's experts is log-normal and drifts; every rank sees it with noise of its own. Drawn from
// counter-based random numbers and rounded to integers, so a seed gives the same trace to every process that runs this binary.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

struct TraceOptions {
  int layers = 1, ranks = 1, experts = 1;
  int choices = 1;  // Distinct experts of a token; at most `experts`.
  int64_t tokens_per_rank = 0;
  double sigma = 1.0;       // Of the logarithm of an expert's popularity; 0: all alike.
  double drift = 0.03;      // A step keeps sqrt(1 - drift^2) of that logarithm and draws the rest anew.
  double rank_noise = 0.2;  // Sigma of what a rank adds in one step.
  // Lasting tastes: `taste_ranks` consecutive ranks (those of a host, say) share what they add for ever.
  double taste_sigma = 0;
  int taste_ranks = 1;
  uint64_t seed = 0;
};

class RoutingTrace {
 public:
  explicit RoutingTrace(const TraceOptions& options);  // At step 0.

  int64_t step() const { return step_; }
  // rows_SE [ranks, experts] of the present step: exactly tokens_per_rank * choices per rank, at most tokens_per_rank each.
  std::vector<int64_t> Rows(int layer) const;
  void Advance();  // To the next step.

 private:
  double Normal(uint32_t kind, int layer, int rank, int expert, int64_t step) const;

  const TraceOptions options_;
  int64_t step_ = 0;
  std::vector<double> popularity_LE_;  // Logarithms.
};

}  // namespace shoal
