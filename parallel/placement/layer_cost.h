// What a placement costs one expert layer: rows that ranks compute and that links carry, and the time that follows. Used to
// compare placements, not to predict a step: fixed costs per message are left out. Pure integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/dispatch.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"

namespace shoal {

// Picoseconds, so that small rows on fast devices are not 0. A row is a token's vector on its way to one expert.
struct LayerCosts {
  int64_t row_work_ps = 0;      // An expert's work on a row, forward.
  int64_t row_send_ps = 0;      // A row into or out of a rank.
  int64_t row_cross_ps = 0;     // A row into or out of a host.
  int64_t expert_send_ps = 0;   // An expert's weights into a rank.
  int64_t expert_cross_ps = 0;  // An expert's weights into a host.
};

// Rows of an expert layer under a split. "In" and "out" do not count what stays on the rank or on the host.
struct LayerRows {
  std::vector<int64_t> work, rank_in, rank_out;  // By rank.
  std::vector<int64_t> host_in, host_out;        // By host.
  int64_t total = 0, local = 0;                  // `local`: computed where they come from.
};

LayerRows RowsOf(const Topology& topology, absl::Span<const std::vector<DispatchShare>> shares);

// Forward pass of the layer: there, the slowest rank's work, and back.
int64_t ForwardPs(const LayerRows& rows, const LayerCosts& costs);

// Forward and backward pass; backward is twice the work and as much to send.
int64_t StepPs(const LayerRows& rows, const LayerCosts& costs);

// Bringing the weights of experts to the ranks that hold them in `to` and not in `from`. An expert enters a host once.
int64_t GatherPs(const Topology& topology, const ExpertPlacement& from, const ExpertPlacement& to, const LayerCosts& costs);

// Column sums of a row-major [rows, columns] matrix: of rows_SE the load of each expert.
std::vector<int64_t> ColumnSums(absl::Span<const int64_t> matrix, int columns);

// Rows of each host for each expert [hosts, experts] of those of each rank [ranks, experts].
std::vector<int64_t> SumByHost(const Topology& topology, absl::Span<const int64_t> rows, int experts);

}  // namespace shoal
