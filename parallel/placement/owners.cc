#include "parallel/placement/owners.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "parallel/placement/eplb.h"
#include "parallel/placement/reshard.h"
#include "parallel/placement/tuner.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

size_t At(int index) { return static_cast<size_t>(index); }

std::vector<int64_t> OwnedByRank(const OwnerMap& owners, int ranks) {
  std::vector<int64_t> owned(At(ranks));
  for (const std::vector<int>& layer : owners) {
    for (int owner : layer) ++owned[At(owner)];
  }
  return owned;
}

// As many experts as a rank has places for.
std::vector<int64_t> PlacesOf(const OwnerMap& current, int ranks) {
  std::vector<int64_t> places = OwnedByRank(current, ranks);
  const int64_t experts = std::accumulate(places.begin(), places.end(), int64_t{0}),
                mean = (experts + ranks - 1) / ranks;
  for (int64_t& count : places) count = std::max(count, mean);
  return places;
}

// Moves experts from ranks that own too many to those with places left: the one with least load, to where its
// layer has least.
void FitPlaces(absl::Span<const std::vector<int64_t>> loads, const std::vector<int64_t>& places,
               OwnerMap* owners) {
  const int ranks = static_cast<int>(places.size());
  std::vector<int64_t> owned = OwnedByRank(*owners, ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    while (owned[At(rank)] > places[At(rank)]) {
      size_t layer = 0, expert = 0;
      int64_t least = -1;
      for (size_t l = 0; l < owners->size(); ++l) {
        for (size_t e = 0; e < (*owners)[l].size(); ++e) {
          if ((*owners)[l][e] != rank || (least >= 0 && loads[l][e] >= least)) continue;
          least = loads[l][e];
          layer = l;
          expert = e;
        }
      }
      std::vector<int64_t> work(places.size());
      for (size_t e = 0; e < loads[layer].size(); ++e) work[At((*owners)[layer][e])] += loads[layer][e];
      int to = -1;
      for (int r = 0; r < ranks; ++r) {
        if (owned[At(r)] < places[At(r)] && (to < 0 || work[At(r)] < work[At(to)])) to = r;
      }
      SHOAL_CHECK_GE(to, 0);
      (*owners)[layer][expert] = to;
      --owned[At(rank)];
      ++owned[At(to)];
    }
  }
}

// Packs of EPLB are all alike to it: which rank gets which is free, so ranks get those of which they own
// most.
std::vector<int> RanksOfPacks(absl::Span<const int> expert_of_slot, absl::Span<const int> owners, int ranks) {
  const size_t each = expert_of_slot.size() / At(ranks);
  std::vector<std::tuple<int, int, int>> pairs;  // Less those in common, pack, rank.
  for (int pack = 0; pack < ranks; ++pack) {
    std::vector<int> common(At(ranks));
    for (size_t i = 0; i < each; ++i) ++common[At(owners[At(expert_of_slot[At(pack) * each + i])])];
    for (int rank = 0; rank < ranks; ++rank) pairs.emplace_back(-common[At(rank)], pack, rank);
  }
  std::sort(pairs.begin(), pairs.end());
  std::vector<int> rank_of_pack(At(ranks), -1);
  std::vector<char> taken(At(ranks));
  for (const auto& [_, pack, rank] : pairs) {
    if (rank_of_pack[At(pack)] >= 0 || taken[At(rank)]) continue;
    rank_of_pack[At(pack)] = rank;
    taken[At(rank)] = 1;
  }
  return rank_of_pack;
}

// Owners of a layer from EPLB's packs with at most one place for a copy per rank. An expert that stays in one
// of its packs does not move.
std::vector<int> EplbOwners(absl::Span<const int64_t> loads, absl::Span<const int> current, int room,
                            std::vector<int64_t>* owned) {
  const int experts = static_cast<int>(loads.size()), ranks = static_cast<int>(owned->size());
  const int each = (experts + ranks - 1) / ranks + std::min(room, 1);
  const absl::StatusOr<std::vector<int>> slots =
      BalanceReplicas(loads, {.slots = each * ranks, .ranks = ranks});
  SHOAL_CHECK(slots.ok()) << slots.status();
  const std::vector<int> rank_of_pack = RanksOfPacks(*slots, current, ranks);
  std::vector<std::vector<int>> on(loads.size());
  for (size_t slot = 0; slot < slots->size(); ++slot)
    on[At((*slots)[slot])].push_back(rank_of_pack[slot / At(each)]);
  std::vector<int> owners(current.begin(), current.end());
  for (size_t e = 0; e < on.size(); ++e) {
    if (std::find(on[e].begin(), on[e].end(), current[e]) == on[e].end()) {
      owners[e] = *std::min_element(on[e].begin(), on[e].end(), [&](int a, int b) {
        return std::pair((*owned)[At(a)], a) < std::pair((*owned)[At(b)], b);
      });
    }
    ++(*owned)[At(owners[e])];
  }
  return owners;
}

OwnerMap Proposed(absl::Span<const std::vector<int64_t>> rows, absl::Span<const std::vector<int64_t>> loads,
                  const Topology& topology, const OwnerMap& current, const OwnerOptions& options) {
  if (options.policy == OwnerPolicy::kHecate) return Reshard(loads, topology, current, options.overlap);
  const int ranks = topology.ranks();
  OwnerMap owners;
  std::vector<int64_t> owned(At(ranks));
  for (size_t layer = 0; layer < current.size(); ++layer) {
    if (options.policy == OwnerPolicy::kEplb) {
      owners.push_back(EplbOwners(loads[layer], current[layer], options.copies.room, &owned));
      continue;
    }
    TuneOptions tune{.costs = options.copies.costs.layer};
    tune.experts_per_rank_max = (static_cast<int>(current[layer].size()) + ranks - 1) / ranks;
    const std::vector<int64_t> here = OwnedByRank({current[layer]}, ranks);
    const bool fits = *std::max_element(here.begin(), here.end()) <= tune.experts_per_rank_max;
    const auto start = fits ? absl::MakeConstSpan(current[layer]) : absl::Span<const int>();
    owners.push_back(TuneOwners(rows[layer], start, topology, tune).owners);
  }
  FitPlaces(loads, PlacesOf(current, ranks), &owners);
  return owners;
}

}  // namespace

int64_t MovePs(const Topology& topology, const OwnerMap& before, const OwnerMap& after,
               const LayerCosts& costs, int move_percent) {
  SHOAL_CHECK_EQ(before.size(), after.size());
  int64_t ps = 0;
  for (size_t layer = 0; layer < before.size(); ++layer) {
    ExpertPlacement both = OwnersOnly(before[layer]);
    for (size_t e = 0; e < both.size(); ++e) {
      if (after[layer][e] != before[layer][e]) both[e].holders = {after[layer][e]};
    }
    ps += CopiesPs(topology, both, costs) * move_percent / 100;
  }
  return ps;
}

OwnerMap ChooseOwners(absl::Span<const std::vector<int64_t>> rows, const Topology& topology,
                      const OwnerMap& current, const OwnerOptions& options) {
  SHOAL_CHECK_EQ(rows.size(), current.size());
  std::vector<std::vector<int64_t>> loads;
  for (size_t layer = 0; layer < rows.size(); ++layer) {
    loads.push_back(ColumnSums(rows[layer], static_cast<int>(current[layer].size())));
  }
  OwnerMap owners = Proposed(rows, loads, topology, current, options);
  if (owners == current || options.steps == 0) return owners;
  using Wide = __int128;
  Wide saved_ps = 0;
  const auto step_ps = [&](size_t layer, const std::vector<int>& of) {
    const ExpertPlacement placement = ChooseCopies(of, rows[layer], topology, options.copies);
    return StepWithCopiesPs(topology, placement, rows[layer], options.copies.rule, options.copies.costs);
  };
  for (size_t layer = 0; layer < rows.size(); ++layer) {
    if (owners[layer] != current[layer])
      saved_ps += step_ps(layer, current[layer]) - step_ps(layer, owners[layer]);
  }
  const Wide cost_ps = MovePs(topology, current, owners, options.copies.costs.layer, options.move_percent);
  return saved_ps * options.steps > cost_ps ? owners : current;
}

}  // namespace shoal
