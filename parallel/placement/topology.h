// Which host each rank is on. A plain value, the same on every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace shoal {

struct Topology {
  std::vector<int> host_of_rank;  // Hosts are numbered from 0 without gaps, in the order of their first rank.

  static Topology OneHost(int ranks) { return {std::vector<int>(static_cast<size_t>(ranks), 0)}; }

  int ranks() const { return static_cast<int>(host_of_rank.size()); }
  int hosts() const;
  int HostOf(int rank) const { return host_of_rank[static_cast<size_t>(rank)]; }
  std::vector<int> RanksOf(int host) const;  // Ascending.
  std::vector<std::vector<int>> RanksByHost() const;
  friend bool operator==(const Topology&, const Topology&) = default;
};

// From any labels of hosts (node ranks, hashes of names): the same numbering on every rank.
Topology TopologyOf(const std::vector<int64_t>& host_labels);

}  // namespace shoal
