#include "parallel/expert/expert_mover.h"

#include <algorithm>

namespace shoal {
namespace {

int ExpertsOf(const OwnerMap& owners) { return owners.empty() ? 0 : static_cast<int>(owners.front().size()); }

}  // namespace

ExpertMover::ExpertMover(Topology topology, OwnerMap owners, const Options& options)
    : topology_(std::move(topology)),
      options_(options),
      owners_(std::move(owners)),
      window_(static_cast<int>(owners_.size()), topology_.hosts() * ExpertsOf(owners_), options.window) {}

void ExpertMover::Observe(absl::Span<const std::vector<int64_t>> rows) {
  std::vector<int64_t> counts;
  for (const std::vector<int64_t>& layer : rows) {
    const std::vector<int64_t> of_hosts = SumByHost(topology_, layer, ExpertsOf(owners_));
    counts.insert(counts.end(), of_hosts.begin(), of_hosts.end());
  }
  window_.Add(counts);
  ++steps_;
}

std::optional<OwnerMap> ExpertMover::Reshard() {
  if (options_.reshard_interval == 0 || steps_ == 0 || steps_ % options_.reshard_interval != 0) return std::nullopt;
  std::vector<std::vector<int64_t>> loads;
  for (size_t layer = 0; layer < owners_.size(); ++layer) {
    loads.push_back(ColumnSums(window_.Predicted(static_cast<int>(layer)), ExpertsOf(owners_)));
  }
  OwnerMap owners = shoal::Reshard(loads, topology_, owners_, std::min(overlap_, options_.copies));
  if (owners == owners_) return std::nullopt;
  owners_ = owners;
  return owners;
}

std::vector<ExpertPlacement> ExpertMover::Placement() const {
  std::vector<ExpertPlacement> placement;
  const MaterialiseBudget budget{overlap_, options_.copies};
  for (size_t layer = 0; layer < owners_.size(); ++layer) {
    const absl::Span<const int64_t> loads = window_.Predicted(static_cast<int>(layer));
    placement.push_back(topology_.hosts() > 1
                            ? MaterialisePerHost(owners_[layer], loads, topology_, budget)
                            : Materialise(owners_[layer], ColumnSums(loads, ExpertsOf(owners_)), topology_, budget));
  }
  return placement;
}

}  // namespace shoal
