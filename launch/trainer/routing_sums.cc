#include "launch/trainer/routing_sums.h"

#include <cmath>

#include "runtime/base/status.h"

namespace shoal {
namespace {

void AddRounded(absl::Span<const double> from, std::vector<int64_t>* to) {
  to->resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] += std::llround(from[i]);
}

}  // namespace

int64_t StepRouting::Bytes(const ModelConfig& model) {
  return NumMoeLayers(model) * RoutingSums::Width(model.num_local_experts) * SizeOf(DType::kF64);
}

absl::StatusOr<double> StepRouting::Sum(const Tensor& routing, Communicator* control, Order order) {
  if (control != nullptr) {
    SHOAL_RETURN_IF_ERROR(control->AllReduce(routing, routing, ReduceOp::kSum, {.label = "routing sums", .order = order}).Await(),
                          "summing what routers did");
  }
  sums_.push_back(routing);
  return static_cast<double>(routing.bytes());
}

RoutingTotals StepRouting::TotalsOf(const Tensor& sums) const {
  RoutingTotals totals{.tokens = sequences_ * seq_, .sequences = sequences_};
  for (int64_t layer = 0; layer < NumMoeLayers(model_); ++layer) {
    const RoutingSums of = RoutingSums::Row(sums, layer);
    totals.z_sums.push_back(of.z().data<double>()[0]);
    totals.seq_aux_sums.push_back(of.seq_aux().data<double>()[0]);
    const absl::Span<const double> counts = of.counts().span<double>(), probs = of.probs().span<double>();
    totals.counts.emplace_back(counts.begin(), counts.end());
    totals.prob_sums.emplace_back(probs.begin(), probs.end());
  }
  return totals;
}

std::vector<RoutingGradient> StepRouting::GradientsOf(const BalanceLoss& balance) const {
  const double share = 1.0 / static_cast<double>(parts_);
  std::vector<RoutingGradient> gradients(static_cast<size_t>(NumMoeLayers(model_)));
  for (size_t layer = 0; layer < gradients.size(); ++layer) {
    gradients[layer].z_scale = balance.z_scale * static_cast<float>(share);
    gradients[layer].seq_aux_scale = balance.seq_aux_scale * static_cast<float>(share);
    if (balance.dprob.empty()) continue;
    gradients[layer].dprob = Empty({model_.num_local_experts}, DType::kF32);
    for (int e = 0; e < model_.num_local_experts; ++e) {
      gradients[layer].dprob.data<float>()[e] = balance.dprob[layer][static_cast<size_t>(e)] * static_cast<float>(share);
    }
  }
  return gradients;
}

std::vector<RoutingGradient> StepRouting::Gradients() const {
  return GradientsOf(ComputeBalanceLoss(model_, TotalsOf(sums_.back())));
}

std::vector<RoutingGradient> StepRouting::GradientsWithoutSums() const {
  RoutingTotals totals{.tokens = sequences_ * seq_, .sequences = sequences_};
  totals.counts.resize(static_cast<size_t>(NumMoeLayers(model_)));
  return GradientsOf(ComputeBalanceLoss(model_, totals));
}

void StepRouting::Finish(RoutingReport* report) const {
  const size_t layers = static_cast<size_t>(NumMoeLayers(model_));
  report->expert_counts.resize(layers);
  report->unrouted.resize(layers);
  if (model_.has_capacity()) report->dropped.resize(layers);
  const double share = 1.0 / static_cast<double>(parts_);
  for (const Tensor& sums : sums_) {
    const BalanceLoss balance = ComputeBalanceLoss(model_, TotalsOf(sums));
    report->aux += balance.aux * share;
    report->z += balance.z * share;
    report->seq_aux += balance.seq_aux * share;
    for (size_t layer = 0; layer < layers; ++layer) {
      const RoutingSums of = RoutingSums::Row(sums, static_cast<int64_t>(layer));
      report->unrouted[layer] += std::llround(of.unrouted().data<double>()[0]);
      AddRounded(of.counts().span<double>(), &report->expert_counts[layer]);
      if (model_.has_capacity()) AddRounded(of.dropped().span<double>(), &report->dropped[layer]);
    }
  }
}

}  // namespace shoal
