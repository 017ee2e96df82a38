#include "parallel/placement/baselines.h"

#include <algorithm>
#include <numeric>

#include "parallel/placement/apportion.h"
#include "parallel/placement/placement.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

LayerRows EvenRows(const ExpertPlacement& placement, absl::Span<const int64_t> rows, const Topology& topology) {
  return RowsOf(topology, SplitTokens(DispatchRule::kNearest, topology, placement, rows));
}

std::vector<int64_t> CopiesOnRanks(const ExpertPlacement& placement, int ranks) {
  std::vector<int64_t> count(static_cast<size_t>(ranks));
  for (const ExpertCopies& copies : placement) {
    ++count[static_cast<size_t>(copies.owner)];
    for (int holder : copies.holders) ++count[static_cast<size_t>(holder)];
  }
  return count;
}

// Indices by the load of an expert on each of its copies, highest first.
std::vector<int> ByLoadPerCopy(const ExpertPlacement& placement, absl::Span<const int64_t> loads) {
  std::vector<int64_t> per_copy;
  for (size_t e = 0; e < placement.size(); ++e) {
    per_copy.push_back(loads[e] * 1024 / static_cast<int64_t>(placement[e].holders.size() + 1));
  }
  return ByDescending(per_copy);
}

// One more copy of `expert` on the least busy rank with room; if none has room, in place of a copy of the expert with least
// load per copy. False if there is no such place.
bool Expand(int expert, absl::Span<const int64_t> loads, absl::Span<const int64_t> work, int slots_per_rank,
            ExpertPlacement* placement) {
  ExpertCopies& copies = (*placement)[static_cast<size_t>(expert)];
  const std::vector<int64_t> used = CopiesOnRanks(*placement, static_cast<int>(work.size()));
  int target = -1;
  for (int rank = 0; rank < static_cast<int>(work.size()); ++rank) {
    if (copies.On(rank) || used[static_cast<size_t>(rank)] >= slots_per_rank) continue;
    if (target < 0 || work[static_cast<size_t>(rank)] < work[static_cast<size_t>(target)]) target = rank;
  }
  if (target < 0) {
    const std::vector<int> order = ByLoadPerCopy(*placement, loads);
    for (auto coldest = order.rbegin(); coldest != order.rend() && target < 0; ++coldest) {
      std::vector<int>& holders = (*placement)[static_cast<size_t>(*coldest)].holders;
      const auto victim = std::find_if(holders.begin(), holders.end(), [&](int rank) { return !copies.On(rank); });
      if (*coldest == expert || victim == holders.end()) continue;
      target = *victim;
      holders.erase(victim);
    }
  }
  if (target < 0) return false;
  copies.holders.insert(std::upper_bound(copies.holders.begin(), copies.holders.end(), target), target);
  return true;
}

}  // namespace

std::vector<int> ContiguousOwners(int experts, int ranks) {
  std::vector<int> owners;
  for (int e = 0; e < experts; ++e) owners.push_back(static_cast<int>(int64_t{e} * ranks / experts));
  return owners;
}

ExpertPlacement FasterMoeShadows(absl::Span<const int> owners, absl::Span<const int64_t> rows, const Topology& topology,
                                 const LayerCosts& costs) {
  const ExpertPlacement plain = OwnersOnly(owners);
  ExpertPlacement best = plain, shadowed = plain;
  int64_t best_ps = StepPs(EvenRows(plain, rows, topology), costs);
  for (int expert : ByDescending(ColumnSums(rows, static_cast<int>(owners.size())))) {
    ExpertCopies& copies = shadowed[static_cast<size_t>(expert)];
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      if (rank != copies.owner) copies.holders.push_back(rank);
    }
    const int64_t ps = StepPs(EvenRows(shadowed, rows, topology), costs) + 2 * GatherPs(topology, plain, shadowed, costs);
    if (ps >= best_ps) break;
    best_ps = ps;
    best = shadowed;
  }
  return best;
}

std::vector<int> SmartMoeOwners(absl::Span<const int64_t> loads, const Topology& topology) {
  const int ranks = topology.ranks();
  std::vector<int64_t> load(static_cast<size_t>(ranks)), room(load.size()), host_load(static_cast<size_t>(topology.hosts()));
  for (int rank = 0; rank < ranks; ++rank) {
    room[static_cast<size_t>(rank)] = EvenPart(static_cast<int64_t>(loads.size()), ranks, rank).count;
  }
  const auto key = [&](size_t rank) {
    return std::pair(load[rank], host_load[static_cast<size_t>(topology.HostOf(static_cast<int>(rank)))]);
  };
  std::vector<int> owners(loads.size());
  for (int expert : ByDescending(loads)) {
    size_t lightest = room.size();
    for (size_t rank = 0; rank < room.size(); ++rank) {
      if (room[rank] > 0 && (lightest == room.size() || key(rank) < key(lightest))) lightest = rank;
    }
    owners[static_cast<size_t>(expert)] = static_cast<int>(lightest);
    load[lightest] += loads[static_cast<size_t>(expert)];
    host_load[static_cast<size_t>(topology.HostOf(static_cast<int>(lightest)))] += loads[static_cast<size_t>(expert)];
    --room[lightest];
  }
  return owners;
}

int64_t FlexMoeStepPs(const ExpertPlacement& placement, absl::Span<const int64_t> rows, const Topology& topology,
                      const LayerCosts& costs) {
  // A ring all-reduce over n copies moves 2 (n - 1) / n of the gradients into each of them.
  std::vector<int64_t> reduce_ps(static_cast<size_t>(topology.ranks()));
  for (const ExpertCopies& copies : placement) {
    const int64_t n = static_cast<int64_t>(copies.holders.size()) + 1;
    bool crosses = false;
    for (int holder : copies.holders) crosses |= topology.HostOf(holder) != topology.HostOf(copies.owner);
    const int64_t expert_ps = crosses ? std::max(costs.expert_send_ps, costs.expert_cross_ps) : costs.expert_send_ps;
    const int64_t ps = 2 * (n - 1) * expert_ps / n;
    reduce_ps[static_cast<size_t>(copies.owner)] += ps;
    for (int holder : copies.holders) reduce_ps[static_cast<size_t>(holder)] += ps;
  }
  return StepPs(EvenRows(placement, rows, topology), costs) + *std::max_element(reduce_ps.begin(), reduce_ps.end());
}

ExpertPlacement FlexMoeAdjust(const ExpertPlacement& current, absl::Span<const int64_t> rows, const Topology& topology,
                              const FlexMoeOptions& options) {
  const std::vector<int64_t> loads = ColumnSums(rows, static_cast<int>(current.size()));
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  ExpertPlacement best = current;
  int64_t best_ps = FlexMoeStepPs(best, rows, topology, options.costs);
  while (total > 0) {
    const std::vector<int64_t> work = EvenRows(best, rows, topology).work;
    const int64_t most = *std::max_element(work.begin(), work.end());
    if (most * topology.ranks() * 100 <= total * options.trigger_percent) break;
    ExpertPlacement changed = best;
    if (!Expand(ByLoadPerCopy(best, loads)[0], loads, work, options.slots_per_rank, &changed)) break;
    const int64_t ps = FlexMoeStepPs(changed, rows, topology, options.costs);
    if (ps >= best_ps) break;
    best_ps = ps;
    best = std::move(changed);
  }
  return best;
}

}  // namespace shoal
