#include "parallel/placement/topology.h"

#include <algorithm>

namespace shoal {

int Topology::hosts() const {
  return host_of_rank.empty() ? 0 : *std::max_element(host_of_rank.begin(), host_of_rank.end()) + 1;
}

std::vector<int> Topology::RanksOf(int host) const {
  std::vector<int> ranks;
  for (int rank = 0; rank < this->ranks(); ++rank) {
    if (HostOf(rank) == host) ranks.push_back(rank);
  }
  return ranks;
}

std::vector<std::vector<int>> Topology::RanksByHost() const {
  std::vector<std::vector<int>> ranks(static_cast<size_t>(hosts()));
  for (int rank = 0; rank < this->ranks(); ++rank) ranks[static_cast<size_t>(HostOf(rank))].push_back(rank);
  return ranks;
}

Topology TopologyOf(const std::vector<int64_t>& host_labels) {
  Topology topology;
  std::vector<int64_t> seen;
  for (int64_t label : host_labels) {
    const auto found = std::find(seen.begin(), seen.end(), label);
    topology.host_of_rank.push_back(static_cast<int>(found - seen.begin()));
    if (found == seen.end()) seen.push_back(label);
  }
  return topology;
}

}  // namespace shoal
