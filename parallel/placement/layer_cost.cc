#include "parallel/placement/layer_cost.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {
namespace {

int64_t Largest(const std::vector<int64_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

// Rows to their experts, or back.
int64_t OneWayPs(const LayerRows& rows, const LayerCosts& costs) {
  const int64_t send = std::max(Largest(rows.rank_in), Largest(rows.rank_out)) * costs.row_send_ps;
  const int64_t cross = std::max(Largest(rows.host_in), Largest(rows.host_out)) * costs.row_cross_ps;
  return std::max(send, cross);
}

}  // namespace

LayerRows RowsOf(const Topology& topology, absl::Span<const std::vector<DispatchShare>> shares) {
  const size_t ranks = static_cast<size_t>(topology.ranks()), hosts = static_cast<size_t>(topology.hosts());
  SHOAL_CHECK_EQ(shares.size(), ranks);
  LayerRows rows{std::vector<int64_t>(ranks), std::vector<int64_t>(ranks), std::vector<int64_t>(ranks),
                 std::vector<int64_t>(hosts), std::vector<int64_t>(hosts)};
  for (size_t source = 0; source < ranks; ++source) {
    const int from = topology.HostOf(static_cast<int>(source));
    for (const DispatchShare& share : shares[source]) {
      const size_t target = static_cast<size_t>(share.rank);
      const int to = topology.HostOf(share.rank);
      rows.work[target] += share.rows;
      rows.total += share.rows;
      if (target == source) {
        rows.local += share.rows;
        continue;
      }
      rows.rank_out[source] += share.rows;
      rows.rank_in[target] += share.rows;
      if (from == to) continue;
      rows.host_out[static_cast<size_t>(from)] += share.rows;
      rows.host_in[static_cast<size_t>(to)] += share.rows;
    }
  }
  return rows;
}

int64_t ForwardPs(const LayerRows& rows, const LayerCosts& costs) {
  return Largest(rows.work) * costs.row_work_ps + 2 * OneWayPs(rows, costs);
}

int64_t StepPs(const LayerRows& rows, const LayerCosts& costs) {
  return 3 * Largest(rows.work) * costs.row_work_ps + 4 * OneWayPs(rows, costs);
}

int64_t GatherPs(const Topology& topology, const ExpertPlacement& from, const ExpertPlacement& to, const LayerCosts& costs) {
  SHOAL_CHECK_EQ(from.size(), to.size());
  const size_t hosts = static_cast<size_t>(topology.hosts());
  std::vector<int64_t> into_rank(static_cast<size_t>(topology.ranks())), into_host(hosts);
  std::vector<size_t> had(hosts), gets(hosts);  // The last expert, counted from 1, that the host had, or gets.
  for (size_t e = 0; e < to.size(); ++e) {
    const auto host = [&](int rank) { return static_cast<size_t>(topology.HostOf(rank)); };
    had[host(from[e].owner)] = e + 1;
    for (int holder : from[e].holders) had[host(holder)] = e + 1;
    const auto bring = [&](int rank) {
      if (from[e].On(rank)) return;
      ++into_rank[static_cast<size_t>(rank)];
      if (had[host(rank)] == e + 1 || gets[host(rank)] == e + 1) return;
      gets[host(rank)] = e + 1;
      ++into_host[host(rank)];
    };
    bring(to[e].owner);
    for (int holder : to[e].holders) bring(holder);
  }
  return std::max(Largest(into_rank) * costs.expert_send_ps, Largest(into_host) * costs.expert_cross_ps);
}

std::vector<int64_t> ColumnSums(absl::Span<const int64_t> matrix, int columns) {
  std::vector<int64_t> sums(static_cast<size_t>(columns));
  SHOAL_CHECK(matrix.empty() || matrix.size() % sums.size() == 0);
  for (size_t row = 0; row < matrix.size(); row += sums.size()) {
    for (size_t c = 0; c < sums.size(); ++c) sums[c] += matrix[row + c];
  }
  return sums;
}

std::vector<int64_t> SumByHost(const Topology& topology, absl::Span<const int64_t> rows, int experts) {
  const size_t width = static_cast<size_t>(experts);
  SHOAL_CHECK_EQ(rows.size(), static_cast<size_t>(topology.ranks()) * width);
  std::vector<int64_t> sums(static_cast<size_t>(topology.hosts()) * width);
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const size_t from = static_cast<size_t>(rank) * width, to = static_cast<size_t>(topology.HostOf(rank)) * width;
    for (size_t e = 0; e < width; ++e) sums[to + e] += rows[from + e];
  }
  return sums;
}

}  // namespace shoal
