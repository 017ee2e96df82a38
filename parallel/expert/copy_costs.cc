#include "parallel/expert/copy_costs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace shoal {
namespace {

int64_t Picoseconds(double ns) { return std::llround(std::clamp(ns * 1e3, -1e15, 1e15)); }

CostModel ModelOf(const CostTable& table, Op op, Phase phase, Lane lane = Lane::kCompute) {
  const auto found = table.models.find({op, phase, lane});
  return found == table.models.end() ? CostModel() : found->second;
}

// A byte of rows on its way; 0: unknown.
double LinkNs(const CostTable& table, Lane lane) {
  const double ns = ModelOf(table, Op::kDispatch, Phase::kForward, lane).ns_per_unit;
  return ns > 0 ? ns : ModelOf(table, Op::kReturn, Phase::kForward, lane).ns_per_unit;
}

// The mean over layers of a dense bucket's bytes.
double BucketBytes(const std::vector<int64_t>& buckets, double layers) {
  return static_cast<double>(std::accumulate(buckets.begin(), buckets.end(), int64_t{0})) / layers;
}

}  // namespace

std::optional<CopyCosts> MeasuredCopyCosts(const CostTable& table, const StepShape& shape,
                                           const Workload& workload, const Topology& topology) {
  const auto model = [&](Op op, Phase phase) { return ModelOf(table, op, phase); };
  const double forward = model(Op::kExperts, Phase::kForward).ns_per_unit;
  const double backward = model(Op::kExperts, Phase::kBackward).ns_per_unit +
                          model(Op::kExpertsWeight, Phase::kBackward).ns_per_unit;
  const bool inter = topology.hosts() > 1;
  const Lane lane = inter ? Lane::kInter : Lane::kIntra;
  const double intra_ns = shape.intra ? LinkNs(table, Lane::kIntra) : 0;
  const double inter_ns = inter ? LinkNs(table, Lane::kInter) : 0;
  if (forward <= 0 || (shape.intra && intra_ns <= 0) || (inter && inter_ns <= 0)) return std::nullopt;
  size_t ranks_of_host = 1;
  for (const std::vector<int>& ranks : topology.RanksByHost())
    ranks_of_host = std::max(ranks_of_host, ranks.size());
  const double host_ns = inter_ns / static_cast<double>(ranks_of_host);

  CopyCosts costs;
  const double row_bytes = static_cast<double>(workload.row_bytes);
  const double expert_bytes = static_cast<double>(workload.expert_weight_bytes);
  costs.layer = {.row_work_ps = Picoseconds(backward > 0 ? (forward + backward) / 3 : forward),
                 .row_send_ps = Picoseconds(intra_ns * row_bytes),
                 .row_cross_ps = Picoseconds(host_ns * row_bytes),
                 .expert_send_ps = Picoseconds(intra_ns * expert_bytes),
                 .expert_cross_ps = Picoseconds(host_ns * expert_bytes)};
  costs.gradient_percent = static_cast<int>(workload.expert_gradient_bytes * 100 /
                                            std::max<int64_t>(1, workload.expert_weight_bytes));
  costs.gather_twice = shape.experts == ExpertPolicy::kRematerialise;

  const double tokens =
      static_cast<double>(*std::max_element(workload.tokens.begin(), workload.tokens.end()));
  const double layers = static_cast<double>(shape.layers.size());
  const bool shared = std::any_of(shape.layers.begin(), shape.layers.end(),
                                  [](const LayerShape& layer) { return layer.shared_expert; });
  const auto hidden = [&](Phase phase, const CostModel& dense, double dense_bytes, Op copies) {
    double ns = -ModelOf(table, copies, phase, lane).fixed_ns;
    for (Op op : {Op::kAttention, Op::kRoute}) ns += model(op, phase).Predict(tokens);
    if (shared) ns += model(Op::kShared, phase).Predict(tokens);
    return Picoseconds(ns - dense.Predict(dense_bytes));
  };
  costs.hidden_forward_ps = hidden(Phase::kForward, ModelOf(table, Op::kGather, Phase::kForward, lane),
                                   BucketBytes(workload.bucket_bytes, layers), Op::kMaterialise);
  double gradients =
      BucketBytes(workload.bucket_elements, layers) * static_cast<double>(workload.gradient_bytes);
  if (costs.gather_twice && shape.dense == DensePolicy::kSharded)
    gradients += BucketBytes(workload.bucket_bytes, layers);
  costs.hidden_backward_ps = hidden(Phase::kBackward, ModelOf(table, Op::kReduce, Phase::kBackward, lane),
                                    gradients, Op::kReduceExperts);
  return costs;
}

}  // namespace shoal
