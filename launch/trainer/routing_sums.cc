#include "launch/trainer/routing_sums.h"

#include <cmath>

#include "runtime/base/status.h"
#include "runtime/kernels/router.h"

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

void StepRouting::SumOnStream(const Tensor& routing, Stream& stream) {
  on_stream_ = routing;
  sums_.push_back(EmptyHost(routing.shape(), DType::kF64, stream));
  Copy(routing, sums_.back(), stream);
}

BalanceGradient StepRouting::Balance() const {
  return ComputeBalanceGradient(model_, NumMoeLayers(model_), sequences_ * seq_, sequences_);
}

std::vector<RoutingGradient> StepRouting::GradientsOf(const BalanceGradient& balance, const Tensor& dprob) const {
  const float share = 1.0f / static_cast<float>(parts_);
  std::vector<RoutingGradient> gradients(static_cast<size_t>(NumMoeLayers(model_)));
  for (size_t layer = 0; layer < gradients.size(); ++layer) {
    gradients[layer].z_scale = balance.z_scale * share;
    gradients[layer].seq_aux_scale = balance.seq_aux_scale * share;
    if (!dprob.empty()) gradients[layer].dprob = dprob.Rows(static_cast<int64_t>(layer), 1).Reshape({dprob.dim(1)});
  }
  return gradients;
}

std::vector<RoutingGradient> StepRouting::Gradients(Stream& stream) const {
  const BalanceGradient balance = Balance();
  if (balance.by_count == 0) return GradientsOf(balance, Tensor());
  Stream cpu;
  Stream& where = on_stream_.empty() ? cpu : stream;
  const Tensor sums = on_stream_.empty() ? sums_.back() : on_stream_;
  const Tensor dprob = Empty({NumMoeLayers(model_), model_.num_local_experts}, DType::kF32, where);
  kernels::GradientOfCounts(sums, RoutingSums::kCounts,
                            balance.of_all_layers ? kernels::CountsOf::kAllLayers : kernels::CountsOf::kEachLayer,
                            balance.by_count / parts_, dprob, where);
  return GradientsOf(balance, on_stream_.empty() ? ToDevice(dprob, stream) : dprob);
}

std::vector<RoutingGradient> StepRouting::GradientsWithoutSums() const { return GradientsOf(Balance(), Tensor()); }

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
