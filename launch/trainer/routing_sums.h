// What the routers of a step did, over all ranks: from the sums of each part of the batch (RoutingSums) to the gradients of auxiliary
// losses, while the step runs, and to the losses and counts of the step, at its end.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "models/routers/balance.h"
#include "models/routers/router.h"

namespace shoal {

struct RoutingReport {
  double aux = 0, z = 0, seq_aux = 0;               // Before their coefficients, over the global batch; the same on every rank.
  std::vector<std::vector<int64_t>> expert_counts;  // Per MoE layer, choices over the global batch.
  std::vector<std::vector<int64_t>> dropped;        // Of these, refused for capacity; empty: the router never drops.
  std::vector<int64_t> unrouted;                    // Per MoE layer, tokens without any expert.
};

// Of one step. Not thread-safe: its calls follow each other.
class StepRouting {
 public:
  // `sequences` of `seq` tokens in each of `parts` parts of the batch, over all ranks.
  StepRouting(const ModelConfig& model, int parts, int64_t sequences, int64_t seq)
      : model_(model), parts_(parts), sequences_(sequences), seq_(seq) {}

  // Bytes of the sums of all layers.
  static int64_t Bytes(const ModelConfig& model);

  // The next part's sums, routing [layers, RoutingSums::Width] (f64) in host memory, become those over all ranks. Collective and
  // blocking, unless `control` is null: one rank. Bytes.
  absl::StatusOr<double> Sum(const Tensor& routing, Communicator* control, Order order);
  // The same of one rank whose sums are in memory of the stream: they come to the host without anybody waiting.
  void SumOnStream(const Tensor& routing, Stream& stream);
  // How auxiliary losses enter the backward pass of that part, by MoE layer. Never waits.
  std::vector<RoutingGradient> Gradients(Stream& stream) const;
  // The same where they need no sums (StepShape::balance); before Sum.
  std::vector<RoutingGradient> GradientsWithoutSums() const;

  // Of all parts, when the streams of SumOnStream have been waited for.
  void Finish(RoutingReport* report) const;

 private:
  RoutingTotals TotalsOf(const Tensor& sums) const;
  std::vector<RoutingGradient> GradientsOf(const BalanceGradient& balance, const Tensor& dprob) const;
  BalanceGradient Balance() const;

  ModelConfig model_;
  int parts_;
  int64_t sequences_, seq_;
  std::vector<Tensor> sums_;  // By part, in host memory.
  Tensor on_stream_;          // Of the last part where SumOnStream has them.
};

}  // namespace shoal
