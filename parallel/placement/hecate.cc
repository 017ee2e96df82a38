#include "parallel/placement/hecate.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "parallel/placement/apportion.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int64_t kWorthSending = 50;  // Calibration saves more than one part of so many.

// Adds copies of chosen experts on some of the ranks. Ranks are known by their index in `ranks`.
class Filler {
 public:
  // experts: by descending load. free: copies that each rank of the topology can still take; kept up to date.
  Filler(const Topology& topology, std::vector<int> ranks, const ExpertPlacement& start, std::vector<int> experts,
         std::vector<int>* free)
      : ranks_(std::move(ranks)), experts_(std::move(experts)), free_(*free), copies_(experts_.size()) {
    std::map<int, std::vector<size_t>> by_host;
    for (size_t r = 0; r < ranks_.size(); ++r) by_host[topology.HostOf(ranks_[r])].push_back(r);
    for (auto& [host, members] : by_host) hosts_.push_back(std::move(members));
    on_.resize(experts_.size() * ranks_.size());
    lacking_.assign(ranks_.size(), static_cast<int>(experts_.size()));
    for (size_t i = 0; i < experts_.size(); ++i) {
      for (size_t r = 0; r < ranks_.size(); ++r) {
        const bool held = start[static_cast<size_t>(experts_[i])].On(ranks_[r]);
        On(i, r) = held;
        copies_[i] += held;
        lacking_[r] -= held;
      }
    }
  }

  void Fill(absl::Span<const int64_t> loads, ExpertPlacement* placement) {
    const int64_t ranks = static_cast<int64_t>(ranks_.size());
    int64_t wanted = 0, places = 0;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      wanted += lacking_[r];
      places += std::min(lacking_[r], Free(r));
    }
    std::vector<int64_t> target(experts_.size(), ranks);
    if (places < wanted) {
      std::vector<int64_t> weights;
      for (int expert : experts_) weights.push_back(loads[static_cast<size_t>(expert)]);
      target = Apportion(places + std::accumulate(copies_.begin(), copies_.end(), int64_t{0}), weights, ranks);
    }
    for (size_t i = 0; i < experts_.size(); ++i) AddCopies(i, target[i], placement);
    // Places that the experts they were meant for could not use.
    for (size_t i = 0; i < experts_.size(); ++i) AddCopies(i, ranks, placement);
  }

 private:
  char& On(size_t i, size_t rank) { return on_[i * ranks_.size() + rank]; }
  int& Free(size_t rank) { return free_[static_cast<size_t>(ranks_[rank])]; }

  struct Candidate {
    int64_t copies = 0, free = 0;  // Of the host.
    size_t rank = 0;               // Its rank with most free places.
  };

  // The hosts that can take a copy of expert i, those with fewest copies only, most free places first.
  std::vector<Candidate> Emptiest(size_t i) {
    std::vector<Candidate> candidates;
    for (const std::vector<size_t>& host : hosts_) {
      Candidate candidate;
      std::pair<int, int> best = {0, 0};
      for (size_t r : host) {
        candidate.copies += On(i, r);
        candidate.free += Free(r);
        // Of equally free ranks the one that lacks fewest experts: others have less use for its place.
        const std::pair<int, int> key = {Free(r), -lacking_[r]};
        if (On(i, r) || key.first == 0 || (best.first > 0 && key <= best)) continue;
        best = key;
        candidate.rank = r;
      }
      if (best.first == 0) continue;
      if (!candidates.empty() && candidate.copies < candidates[0].copies) candidates.clear();
      if (candidates.empty() || candidate.copies == candidates[0].copies) candidates.push_back(candidate);
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.free > b.free; });
    return candidates;
  }

  // Until expert i has `target` copies or nobody can take one.
  void AddCopies(size_t i, int64_t target, ExpertPlacement* placement) {
    while (copies_[i] < target) {
      // A host that got a copy comes after the others, so the order holds until each has had its turn.
      const std::vector<Candidate> candidates = Emptiest(i);
      if (candidates.empty()) return;
      for (const Candidate& candidate : candidates) {
        if (copies_[i] == target) return;
        On(i, candidate.rank) = 1;
        --Free(candidate.rank);
        --lacking_[candidate.rank];
        ++copies_[i];
        (*placement)[static_cast<size_t>(experts_[i])].holders.push_back(ranks_[candidate.rank]);
      }
    }
  }

  const std::vector<int> ranks_, experts_;
  std::vector<int>& free_;
  std::vector<std::vector<size_t>> hosts_;  // Ranks of each host.
  std::vector<char> on_;                    // [experts, ranks]
  std::vector<int64_t> copies_;             // By expert, on `ranks`, owner included.
  std::vector<int> lacking_;                // By rank: experts it does not hold.
};

void SortHolders(ExpertPlacement* placement) {
  for (ExpertCopies& copies : *placement) std::sort(copies.holders.begin(), copies.holders.end());
}

// The `count` highest loads above 0, descending.
std::vector<int> Hottest(absl::Span<const int64_t> loads, int count) {
  std::vector<int> hottest = ByDescending(loads);
  hottest.resize(std::min(hottest.size(), static_cast<size_t>(std::max(count, 0))));
  while (!hottest.empty() && loads[static_cast<size_t>(hottest.back())] <= 0) hottest.pop_back();
  return hottest;
}

// The hottest experts of a host, hottest first, as many as bring `count` from other hosts; with one host, `count`.
std::vector<int> HottestOfHost(int host, absl::Span<const int> owners, absl::Span<const int64_t> loads,
                               const Topology& topology, int count) {
  const bool one_host = topology.hosts() == 1;
  std::vector<int> hottest;
  for (int expert : Hottest(loads, static_cast<int>(loads.size()))) {
    const bool enters = one_host || topology.HostOf(owners[static_cast<size_t>(expert)]) != host;
    if (enters && count-- == 0) break;
    hottest.push_back(expert);
  }
  return hottest;
}

bool AllFitEverywhere(absl::Span<const int> owners, int ranks, const MaterialiseBudget& budget) {
  const int experts = static_cast<int>(owners.size());
  if (budget.overlap < experts) return false;
  std::vector<int> owned(static_cast<size_t>(ranks));
  for (int owner : owners) ++owned[static_cast<size_t>(owner)];
  return experts - *std::min_element(owned.begin(), owned.end()) <= budget.memory;
}

ExpertPlacement AllOnAll(absl::Span<const int> owners, int ranks) {
  ExpertPlacement placement = OwnersOnly(owners);
  for (ExpertCopies& copies : placement) {
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank != copies.owner) copies.holders.push_back(rank);
    }
  }
  return placement;
}

std::vector<int> AllRanks(const Topology& topology) {
  std::vector<int> ranks(static_cast<size_t>(topology.ranks()));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

}  // namespace

LoadWindow::LoadWindow(int layers, int experts, int steps)
    : experts_(static_cast<size_t>(experts)), sum_LE_(static_cast<size_t>(layers) * experts_) {
  SHOAL_CHECK(layers >= 0 && experts >= 0 && steps >= 1);
  ring_.assign(static_cast<size_t>(steps), sum_LE_);
}

void LoadWindow::Add(absl::Span<const int64_t> counts_LE) {
  SHOAL_CHECK_EQ(counts_LE.size(), sum_LE_.size());
  std::vector<int64_t>& oldest = ring_[next_];
  next_ = (next_ + 1) % ring_.size();
  for (size_t i = 0; i < sum_LE_.size(); ++i) {
    sum_LE_[i] += counts_LE[i] - oldest[i];
    oldest[i] = counts_LE[i];
  }
}

absl::Span<const int64_t> LoadWindow::Predicted(int layer) const {
  return absl::MakeConstSpan(sum_LE_).subspan(static_cast<size_t>(layer) * experts_, experts_);
}

std::vector<absl::Span<const int64_t>> LoadWindow::Recent() const {
  std::vector<absl::Span<const int64_t>> recent;
  for (size_t i = 0; i < ring_.size(); ++i) recent.push_back(ring_[(next_ + i) % ring_.size()]);
  return recent;
}

int OverlapBudget(const Topology& topology, const OverlapInputs& inputs) {
  SHOAL_CHECK_GT(inputs.expert_bytes, 0);
  int64_t entries = 1;
  if (topology.hosts() > 1 && inputs.entry == OverlapInputs::Entry::kOncePerRank) {
    std::vector<int64_t> ranks(static_cast<size_t>(topology.hosts()));
    for (int host : topology.host_of_rank) ++ranks[static_cast<size_t>(host)];
    entries = *std::max_element(ranks.begin(), ranks.end());
  }
  using Wide = __int128;  // A second at 100 GB/s is 1e20 byte-nanoseconds.
  const Wide free_ns = std::max<int64_t>(inputs.other_work_ns, 0), rate = std::max<int64_t>(inputs.link_bytes_per_s, 0);
  const Wide bytes = free_ns * rate / 1'000'000'000;
  return static_cast<int>(std::min<Wide>(bytes / (Wide{inputs.expert_bytes} * entries), std::numeric_limits<int>::max()));
}

ExpertPlacement Materialise(absl::Span<const int> owners, absl::Span<const int64_t> loads, const Topology& topology,
                            const MaterialiseBudget& budget) {
  SHOAL_CHECK_EQ(owners.size(), loads.size());
  if (owners.empty() || budget.overlap <= 0 || budget.memory <= 0) return OwnersOnly(owners);
  if (AllFitEverywhere(owners, topology.ranks(), budget)) return AllOnAll(owners, topology.ranks());
  ExpertPlacement placement = OwnersOnly(owners);
  std::vector<int> free(static_cast<size_t>(topology.ranks()), budget.memory);
  Filler(topology, AllRanks(topology), placement, Hottest(loads, budget.overlap), &free).Fill(loads, &placement);
  SortHolders(&placement);
  return placement;
}

ExpertPlacement MaterialisePerHost(absl::Span<const int> owners, absl::Span<const int64_t> loads_HE, const Topology& topology,
                                   const MaterialiseBudget& budget) {
  const size_t experts = owners.size();
  SHOAL_CHECK_EQ(loads_HE.size(), static_cast<size_t>(topology.hosts()) * experts);
  if (owners.empty() || budget.overlap <= 0 || budget.memory <= 0) return OwnersOnly(owners);
  if (AllFitEverywhere(owners, topology.ranks(), budget)) return AllOnAll(owners, topology.ranks());
  const ExpertPlacement start = OwnersOnly(owners);
  ExpertPlacement placement = start;
  std::vector<int> free(static_cast<size_t>(topology.ranks()), budget.memory);
  int host = 0;
  for (std::vector<int>& ranks : topology.RanksByHost()) {
    const absl::Span<const int64_t> loads = loads_HE.subspan(static_cast<size_t>(host) * experts, experts);
    std::vector<int> hottest = HottestOfHost(host++, owners, loads, topology, budget.overlap);
    Filler(topology, std::move(ranks), start, std::move(hottest), &free).Fill(loads, &placement);
  }
  SortHolders(&placement);
  return placement;
}

Calibration Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows, const Topology& topology,
                      const CalibrateOptions& options) {
  const int experts = static_cast<int>(planned.size());
  const auto step_ps = [&](const ExpertPlacement& placement) {
    return StepPs(RowsOf(topology, SplitTokens(options.rule, topology, placement, rows)), options.costs.layer);
  };
  const auto return_ps = [&](const ExpertPlacement& placement) { return ReturnCopiesPs(topology, placement, options.costs); };
  const std::vector<int64_t> loads = ColumnSums(rows, experts);
  std::vector<int> left(static_cast<size_t>(topology.ranks()), options.budget.memory);
  for (const ExpertCopies& copies : planned) {
    for (int holder : copies.holders) --left[static_cast<size_t>(holder)];
  }
  for (int& places : left) places = std::max(places, 0);
  Calibration best{planned};
  const int64_t planned_ps = step_ps(planned), planned_return_ps = return_ps(planned);
  int64_t least = planned_ps / kWorthSending;  // To be saved.
  const int most = std::min(options.budget.overlap, experts);
  for (int count = 1, last = 0; last < most; count *= 2) {
    last = std::min(count, most);
    ExpertPlacement more = planned;
    std::vector<int> free = left;
    Filler(topology, AllRanks(topology), planned, Hottest(loads, last), &free).Fill(loads, &more);
    SortHolders(&more);
    const int64_t gain = planned_ps - step_ps(more);
    const int64_t cost =
        GatherPs(topology, planned, more, options.costs.layer) + std::max<int64_t>(0, return_ps(more) - planned_return_ps);
    if (gain - cost <= least) continue;
    least = gain - cost;
    best = {std::move(more), gain, cost};
  }
  return best;
}

}  // namespace shoal
