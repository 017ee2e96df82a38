#include "parallel/expert/expert_summary.h"

#include <algorithm>
#include <numeric>

#include "parallel/placement/layer_cost.h"

namespace shoal {
namespace {

double MaxOverMean(const std::vector<int64_t>& values) {
  const int64_t sum = std::accumulate(values.begin(), values.end(), int64_t{0});
  if (sum == 0) return 0;
  return static_cast<double>(*std::max_element(values.begin(), values.end())) *
         static_cast<double>(values.size()) / static_cast<double>(sum);
}

int64_t HolderCount(const ExpertPlacement& placement) {
  int64_t count = 0;
  for (const ExpertCopies& copies : placement) count += static_cast<int64_t>(copies.holders.size());
  return count;
}

}  // namespace

ExpertSummary SummariseExperts(const Workload& workload, const Topology& topology, const Graph& graph) {
  ExpertSummary summary;
  double layers = 0;
  int64_t total = 0, on_rank = 0, across = 0;
  for (const ExpertWork& work : workload.experts) {
    summary.copies_per_layer +=
        static_cast<double>(HolderCount(work.placement)) / static_cast<double>(workload.experts.size());
    if (work.rows.empty()) continue;
    layers += 1;
    const double hottest = MaxOverMean(ColumnSums(work.rows, static_cast<int>(work.placement.size())));
    const LayerRows rows =
        RowsOf(topology, SplitTokens(workload.dispatch, topology, work.placement, work.rows));
    summary.expert_max_over_mean += hottest;
    summary.hottest_expert = std::max(summary.hottest_expert, hottest);
    summary.rank_max_over_mean += MaxOverMean(rows.work);
    total += rows.total;
    on_rank += rows.local;
    across += std::accumulate(rows.host_out.begin(), rows.host_out.end(), int64_t{0});
  }
  for (const Task& task : graph.tasks) {
    if (task.op != Op::kMaterialise && task.op != Op::kReduceExperts) continue;
    const int index = workload.experts_of_layer[static_cast<size_t>(task.layer)];
    const int64_t copies = HolderCount(workload.experts[static_cast<size_t>(index)].placement);
    if (task.op == Op::kMaterialise) summary.weight_bytes += copies * workload.expert_weight_bytes;
    if (task.op == Op::kReduceExperts) summary.gradient_bytes += copies * workload.expert_gradient_bytes;
  }
  if (layers == 0 || total == 0) return summary;
  summary.expert_max_over_mean /= layers;
  summary.rank_max_over_mean /= layers;
  summary.stay_rank = static_cast<double>(on_rank) / static_cast<double>(total);
  summary.stay_host = static_cast<double>(total - across) / static_cast<double>(total);
  return summary;
}

}  // namespace shoal
