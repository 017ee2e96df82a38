#include "parallel/placement/copies.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "parallel/placement/hecate.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int64_t kWorthChanging = 50;  // A change saves at least one part of so many.

int64_t Largest(const std::vector<int64_t>& values) {
  return *std::max_element(values.begin(), values.end());
}

int64_t HolderCount(const ExpertPlacement& placement) {
  int64_t count = 0;
  for (const ExpertCopies& copies : placement) count += static_cast<int64_t>(copies.holders.size());
  return count;
}

// What of the copies nothing hides in the backward pass, when one gather takes `gather_ps`.
int64_t ReturnPs(int64_t gather_ps, const CopyCosts& costs) {
  if (gather_ps == 0) return 0;
  const int64_t backward = gather_ps * costs.gradient_percent / 100 + (costs.gather_twice ? gather_ps : 0);
  return std::max<int64_t>(0, backward - costs.hidden_backward_ps);
}

// And in both passes.
int64_t ExposedPs(int64_t gather_ps, const CopyCosts& costs) {
  if (gather_ps == 0) return 0;
  return std::max<int64_t>(0, gather_ps - costs.hidden_forward_ps) + ReturnPs(gather_ps, costs);
}

// Gives the busiest rank's experts more copies, on the ranks that compute least, until it is not busier than
// others would be. Copies of an expert are taken to share its rows equally, wherever they come from.
class Relief {
 public:
  Relief(absl::Span<const int> owners, absl::Span<const int64_t> loads, const Topology& topology, int room)
      : topology_(topology),
        loads_(loads),
        placement_(OwnersOnly(owners)),
        here_(static_cast<size_t>(topology.ranks())),
        work_(here_.size()),
        free_(here_.size(), room) {
    for (size_t e = 0; e < owners.size(); ++e) Put(static_cast<int>(e), owners[e]);
  }

  // One copy more; false: none helps.
  bool Add() {
    // Ranks by falling work: where the busiest cannot be relieved nothing can.
    const size_t busiest = static_cast<size_t>(std::max_element(work_.begin(), work_.end()) - work_.begin());
    int best = -1, target = -1;
    int64_t best_saved = 0;
    for (int expert : here_[busiest]) {
      const int64_t copies = Copies(expert), load = loads_[static_cast<size_t>(expert)];
      const int64_t saved = load / copies - load / (copies + 1);
      if (saved <= best_saved) continue;
      const int rank = LeastBusyWithout(expert);
      if (rank < 0 || work_[static_cast<size_t>(rank)] + load / (copies + 1) >= work_[busiest]) continue;
      best = expert;
      target = rank;
      best_saved = saved;
    }
    if (best < 0) return false;
    AddCopy(best, target);
    return true;
  }

  ExpertPlacement Placement() const {
    ExpertPlacement sorted = placement_;
    for (ExpertCopies& copies : sorted) std::sort(copies.holders.begin(), copies.holders.end());
    return sorted;
  }

 private:
  int64_t Copies(int expert) const {
    return 1 + static_cast<int64_t>(placement_[static_cast<size_t>(expert)].holders.size());
  }
  int64_t Share(int expert) const { return loads_[static_cast<size_t>(expert)] / Copies(expert); }
  void Put(int expert, int rank) {
    here_[static_cast<size_t>(rank)].push_back(expert);
    work_[static_cast<size_t>(rank)] += Share(expert);
  }

  bool On(int expert, int rank) const { return placement_[static_cast<size_t>(expert)].On(rank); }
  int OnHost(int expert, int host) const {
    const ExpertCopies& copies = placement_[static_cast<size_t>(expert)];
    int count = topology_.HostOf(copies.owner) == host ? 1 : 0;
    for (int holder : copies.holders) count += topology_.HostOf(holder) == host ? 1 : 0;
    return count;
  }
  int LeastBusyWithout(int expert) const {
    int best = -1;
    for (int rank = 0; rank < topology_.ranks(); ++rank) {
      if (free_[static_cast<size_t>(rank)] == 0 || On(expert, rank)) continue;
      const auto key = [&](int r) {
        return std::tuple(work_[static_cast<size_t>(r)], OnHost(expert, topology_.HostOf(r)));
      };
      if (best < 0 || key(rank) < key(best)) best = rank;
    }
    return best;
  }

  void AddCopy(int expert, int rank) {
    ExpertCopies& copies = placement_[static_cast<size_t>(expert)];
    const int64_t before = Share(expert);
    copies.holders.insert(std::lower_bound(copies.holders.begin(), copies.holders.end(), rank), rank);
    const int64_t less = before - Share(expert);
    work_[static_cast<size_t>(copies.owner)] -= less;
    for (int holder : copies.holders) {
      if (holder != rank) work_[static_cast<size_t>(holder)] -= less;
    }
    --free_[static_cast<size_t>(rank)];
    Put(expert, rank);
  }

  const Topology& topology_;
  const absl::Span<const int64_t> loads_;
  ExpertPlacement placement_;
  std::vector<std::vector<int>> here_;  // Experts of each rank.
  std::vector<int64_t> work_;           // Rows of each rank.
  std::vector<int> free_;
};

// The best plan so far.
class Contest {
 public:
  Contest(const Topology& topology, absl::Span<const int64_t> rows, const CopyOptions& options)
      : topology_(topology), rows_(rows), options_(options) {}

  void Enter(ExpertPlacement placement) {
    const int64_t gather = CopiesPs(topology_, placement, options_.costs.layer);
    if (ExposedPs(gather, options_.costs) >= best_ps_) return;  // Whatever it saves.
    const int64_t ps = StepWithCopiesPs(topology_, placement, rows_, options_.rule, options_.costs);
    const int64_t copies = HolderCount(placement);
    if (std::pair(ps, copies) >= std::pair(best_ps_, best_copies_)) return;
    best_ps_ = ps;
    best_copies_ = copies;
    best_ = std::move(placement);
  }
  const ExpertPlacement& best() const { return best_; }
  int64_t best_ps() const { return best_ps_; }

 private:
  const Topology& topology_;
  const absl::Span<const int64_t> rows_;
  const CopyOptions& options_;
  ExpertPlacement best_;
  int64_t best_ps_ = std::numeric_limits<int64_t>::max(), best_copies_ = 0;
};

// Calls fn(1), fn(2), fn(4), ... and fn(most).
template <typename Fn>
void ForPowers(int most, Fn fn) {
  for (int count = 1, last = 0; last < most; count *= 2) fn(last = std::min(count, most));
}

void EnterAll(absl::Span<const int> owners, absl::Span<const int64_t> rows, const Topology& topology,
              const CopyOptions& options, Contest* contest) {
  const int experts = static_cast<int>(owners.size());
  const std::vector<int64_t> loads = ColumnSums(rows, experts);
  const int room = std::min(options.room, experts);
  Relief relief(owners, loads, topology, room);
  bool more = true;
  int added = 0;
  ForPowers(room * topology.ranks(), [&](int copies) {
    if (!more) return;
    while (added < copies && (more = relief.Add())) ++added;
    contest->Enter(relief.Placement());
  });
  const std::vector<int64_t> by_host = SumByHost(topology, rows, experts);
  ForPowers(experts, [&](int hottest) {
    ForPowers(std::min(room, hottest), [&](int places) {
      const MaterialiseBudget budget = {.overlap = hottest, .memory = places};
      contest->Enter(Materialise(owners, loads, topology, budget));
      if (topology.hosts() > 1) contest->Enter(MaterialisePerHost(owners, by_host, topology, budget));
    });
  });
}

}  // namespace

int64_t CopiesPs(const Topology& topology, const ExpertPlacement& placement, const LayerCosts& costs) {
  const size_t ranks = static_cast<size_t>(topology.ranks()), hosts = static_cast<size_t>(topology.hosts());
  std::vector<int64_t> rank_in(ranks), rank_out(ranks), host_in(hosts), host_out(hosts);
  std::vector<std::vector<int>> holders(hosts);
  for (size_t expert = 0; expert < placement.size(); ++expert) {
    const ExpertCopies& copies = placement[expert];
    const size_t home = static_cast<size_t>(topology.HostOf(copies.owner));
    for (int holder : copies.holders) {
      ++rank_in[static_cast<size_t>(holder)];
      holders[static_cast<size_t>(topology.HostOf(holder))].push_back(holder);
    }
    for (int holder : copies.holders) {
      const size_t host = static_cast<size_t>(topology.HostOf(holder));
      std::vector<int>& here = holders[host];
      if (here.empty()) continue;  // Counted.
      const size_t owner = static_cast<size_t>(copies.owner), count = here.size();
      if (host == home) {
        rank_out[owner] += static_cast<int64_t>(count);
      } else {
        ++rank_out[owner];
        ++host_out[home];
        ++host_in[host];
        rank_out[static_cast<size_t>(here[expert % count])] += static_cast<int64_t>(count) - 1;
      }
      here.clear();
    }
  }
  return std::max(std::max(Largest(rank_in), Largest(rank_out)) * costs.expert_send_ps,
                  std::max(Largest(host_in), Largest(host_out)) * costs.expert_cross_ps);
}

int64_t ReturnCopiesPs(const Topology& topology, const ExpertPlacement& placement, const CopyCosts& costs) {
  return ReturnPs(CopiesPs(topology, placement, costs.layer), costs);
}

int64_t StepWithCopiesPs(const Topology& topology, const ExpertPlacement& placement,
                         absl::Span<const int64_t> rows, DispatchRule rule, const CopyCosts& costs) {
  return StepPs(RowsOf(topology, SplitTokens(rule, topology, placement, rows)), costs.layer) +
         ExposedPs(CopiesPs(topology, placement, costs.layer), costs);
}

ExpertPlacement ChooseCopies(absl::Span<const int> owners, absl::Span<const int64_t> rows,
                             const Topology& topology, const CopyOptions& options,
                             const ExpertPlacement& before) {
  const ExpertPlacement none = OwnersOnly(owners);
  if (owners.empty() || options.room <= 0) return none;
  const auto step_ps = [&](const ExpertPlacement& placement) {
    return StepWithCopiesPs(topology, placement, rows, options.rule, options.costs);
  };
  ExpertPlacement keep = none;
  int64_t keep_ps = step_ps(none);
  Contest contest(topology, rows, options);
  contest.Enter(none);
  if (!before.empty() && before != none) {
    SHOAL_CHECK_EQ(before.size(), owners.size());
    if (const int64_t ps = step_ps(before); ps <= keep_ps) {
      keep = before;
      keep_ps = ps;
    }
  }
  contest.Enter(keep);
  EnterAll(owners, rows, topology, options, &contest);
  return contest.best_ps() <= keep_ps - keep_ps / kWorthChanging ? contest.best() : keep;
}

}  // namespace shoal
