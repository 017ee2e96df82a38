#include "parallel/placement/tuner.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <tuple>

#include "parallel/placement/apportion.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

using Wide = unsigned __int128;

// Evaluations of one call, times ranks and hosts: some tenths of a second. Small problems end earlier, after `restarts`.
constexpr int64_t kWorkMax = 150'000'000;
// With this many experts or fewer, each step tries all of them, with more only those that the bottleneck hangs on.
constexpr size_t kAllExperts = 24;
// Experts that are tried because the rank, or host, that sends most uses them most.
constexpr size_t kUsedExperts = 8;
constexpr int kDisturbances = 3;

// What is minimised: the time, then its unevenness over ranks and hosts, which shows a way across plateaus.
struct Score {
  int64_t forward_ps = 0;
  Wide uneven = 0;
  friend auto operator<=>(const Score&, const Score&) = default;
};

// Owners under construction; the owner of an unplaced expert is -1, and all its rows count as sent.
class Assignment {
 public:
  Assignment(absl::Span<const int64_t> rows, const Topology& topology, const TuneOptions& options)
      : topology_(topology), options_(options), load_(ColumnSums(rows, Experts(rows, topology))),
        by_rank_(rows.begin(), rows.end()), by_host_(SumByHost(topology, rows, experts())) {
    const size_t ranks = static_cast<size_t>(topology.ranks()), hosts = static_cast<size_t>(topology.hosts());
    owners_.assign(load_.size(), -1);
    work_.assign(ranks, 0);
    count_.assign(ranks, 0);
    rank_in_.assign(ranks, 0);
    host_in_.assign(hosts, 0);
    for (size_t r = 0; r < ranks; ++r) rank_out_.push_back(SumOf(by_rank_, r));
    for (size_t h = 0; h < hosts; ++h) host_out_.push_back(SumOf(by_host_, h));
    max_per_rank_ = options.experts_per_rank_max > 0 ? options.experts_per_rank_max : experts();
    SHOAL_CHECK_GE(int64_t{max_per_rank_} * topology.ranks(), int64_t{experts()});
  }

  int experts() const { return static_cast<int>(load_.size()); }
  int ranks() const { return topology_.ranks(); }
  const std::vector<int>& owners() const { return owners_; }
  const std::vector<int64_t>& load() const { return load_; }
  int OwnerOf(int expert) const { return owners_[static_cast<size_t>(expert)]; }
  bool HasRoom(int rank) const { return count_[static_cast<size_t>(rank)] < max_per_rank_; }

  void Move(int expert, int rank) {
    Enter(expert, OwnerOf(expert), -1);
    Enter(expert, rank, 1);
    owners_[static_cast<size_t>(expert)] = rank;
  }

  void Swap(int a, int b) {
    const int owner = OwnerOf(a);
    Move(a, OwnerOf(b));
    Move(b, owner);
  }

  void Reset(const std::vector<int>& owners) {
    for (int e = 0; e < experts(); ++e) Move(e, owners[static_cast<size_t>(e)]);
  }

  Score Evaluate() const {
    const LayerCosts& costs = options_.costs;
    int64_t work = 0, traffic = 0;
    Wide uneven = 0;
    for (size_t r = 0; r < work_.size(); ++r) {
      const int64_t send = std::max(rank_in_[r], rank_out_[r]) * costs.row_send_ps;
      const int64_t compute = work_[r] * costs.row_work_ps;
      work = std::max(work, compute);
      traffic = std::max(traffic, send);
      uneven += Square(compute + 2 * send);
    }
    for (size_t h = 0; h < host_in_.size(); ++h) {
      const int64_t cross = std::max(host_in_[h], host_out_[h]) * costs.row_cross_ps;
      traffic = std::max(traffic, cross);
      uneven += Square(2 * cross);
    }
    return {work + 2 * traffic, uneven};
  }

  // Experts whose move may lower the time: those of the rank with most work and of the rank and host that receive most, and
  // those that the rank and host that send most use most.
  std::vector<int> Candidates() const {
    std::vector<int> candidates(load_.size());
    std::iota(candidates.begin(), candidates.end(), 0);
    if (load_.size() <= kAllExperts) return candidates;
    const int busiest = Fullest(work_);
    const bool send = options_.costs.row_send_ps > 0, cross = options_.costs.row_cross_ps > 0;
    const int rank_in = send ? Fullest(rank_in_) : -1, host_in = cross ? Fullest(host_in_) : -1;
    candidates.clear();
    for (int e = 0; e < experts(); ++e) {
      const int owner = OwnerOf(e);
      if (owner == busiest || owner == rank_in || topology_.HostOf(owner) == host_in) candidates.push_back(e);
    }
    const auto add_used = [&](const std::vector<int64_t>& rows, int place) {
      const size_t begin = static_cast<size_t>(place) * load_.size();
      const std::vector<int> order = ByDescending(absl::MakeConstSpan(rows).subspan(begin, load_.size()));
      candidates.insert(candidates.end(), order.begin(), order.begin() + kUsedExperts);
    };
    if (send) add_used(by_rank_, Fullest(rank_out_));
    if (cross) add_used(by_host_, Fullest(host_out_));
    std::sort(candidates.begin(), candidates.end());
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
    return candidates;
  }

 private:
  static int Experts(absl::Span<const int64_t> rows, const Topology& topology) {
    SHOAL_CHECK(topology.ranks() > 0 && rows.size() % static_cast<size_t>(topology.ranks()) == 0);
    return static_cast<int>(rows.size() / static_cast<size_t>(topology.ranks()));
  }
  static Wide Square(int64_t value) { return static_cast<Wide>(value) * static_cast<Wide>(value); }
  static int Fullest(const std::vector<int64_t>& values) {
    return static_cast<int>(std::max_element(values.begin(), values.end()) - values.begin());
  }
  int64_t SumOf(const std::vector<int64_t>& matrix, size_t row) const {
    const auto begin = matrix.begin() + static_cast<ptrdiff_t>(row * load_.size());
    return std::accumulate(begin, begin + static_cast<ptrdiff_t>(load_.size()), int64_t{0});
  }

  // sign 1: the expert comes to the rank, -1: it leaves; rank -1: nowhere.
  void Enter(int expert, int rank, int64_t sign) {
    if (rank < 0) return;
    const size_t e = static_cast<size_t>(expert), r = static_cast<size_t>(rank);
    const size_t h = static_cast<size_t>(topology_.HostOf(rank));
    const int64_t of_rank = by_rank_[r * load_.size() + e], of_host = by_host_[h * load_.size() + e];
    work_[r] += sign * load_[e];
    count_[r] += static_cast<int>(sign);
    rank_in_[r] += sign * (load_[e] - of_rank);
    rank_out_[r] -= sign * of_rank;
    host_in_[h] += sign * (load_[e] - of_host);
    host_out_[h] -= sign * of_host;
  }

  const Topology& topology_;
  const TuneOptions& options_;
  const std::vector<int64_t> load_;               // Rows of each expert.
  const std::vector<int64_t> by_rank_, by_host_;  // Rows of each rank, and of each host, for each expert.
  std::vector<int> owners_, count_;
  std::vector<int64_t> work_, rank_in_, rank_out_, host_in_, host_out_;
  int max_per_rank_ = 0;
};

class Search {
 public:
  explicit Search(Assignment* assignment)
      : assignment_(*assignment), work_of_evaluation_(assignment->ranks()) {}

  // Experts by descending load, each where it costs least with what is placed so far.
  void PlaceGreedily() {
    for (int expert : ByDescending(assignment_.load())) {
      int best = -1;
      Score best_score;
      for (int rank = 0; rank < assignment_.ranks(); ++rank) {
        if (!assignment_.HasRoom(rank)) continue;
        assignment_.Move(expert, rank);
        const Score score = Evaluate();
        assignment_.Move(expert, -1);
        if (best < 0 || score < best_score) std::tie(best, best_score) = std::tuple(rank, score);
      }
      assignment_.Move(expert, best);
    }
  }

  // The best move or swap of a candidate, again and again until none improves the score, which is returned.
  Score Descend() {
    Score score = Evaluate();
    while (work_ < kWorkMax) {
      Score best = score;
      int best_expert = -1, best_other = -1, best_rank = -1;
      for (int expert : assignment_.Candidates()) {
        const int owner = assignment_.OwnerOf(expert);
        for (int rank = 0; rank < assignment_.ranks(); ++rank) {
          if (rank == owner || !assignment_.HasRoom(rank)) continue;
          assignment_.Move(expert, rank);
          const Score now = Evaluate();
          if (now < best) std::tie(best, best_expert, best_other, best_rank) = std::tuple(now, expert, -1, rank);
          assignment_.Move(expert, owner);
        }
        for (int other = 0; other < assignment_.experts(); ++other) {
          if (assignment_.OwnerOf(other) == owner) continue;
          assignment_.Swap(expert, other);
          const Score now = Evaluate();
          if (now < best) std::tie(best, best_expert, best_other, best_rank) = std::tuple(now, expert, other, -1);
          assignment_.Swap(expert, other);
        }
      }
      if (best_expert < 0) break;
      if (best_other >= 0) {
        assignment_.Swap(best_expert, best_other);
      } else {
        assignment_.Move(best_expert, best_rank);
      }
      score = best;
    }
    return score;
  }

  void Disturb(std::mt19937_64& random) {
    for (int i = 0; i < kDisturbances; ++i) {
      const auto any = [&](int bound) { return static_cast<int>(random() % static_cast<uint64_t>(bound)); };
      const int expert = any(assignment_.experts()), rank = any(assignment_.ranks()), other = any(assignment_.experts());
      if (assignment_.HasRoom(rank)) {
        assignment_.Move(expert, rank);
      } else {
        assignment_.Swap(expert, other);
      }
    }
  }

  bool Exhausted() const { return work_ >= kWorkMax; }

 private:
  Score Evaluate() {
    work_ += work_of_evaluation_;
    return assignment_.Evaluate();
  }

  Assignment& assignment_;
  const int64_t work_of_evaluation_;
  int64_t work_ = 0;
};

}  // namespace

TunedOwners TuneOwners(absl::Span<const int64_t> rows, absl::Span<const int> start, const Topology& topology,
                       const TuneOptions& options) {
  Assignment assignment(rows, topology, options);
  if (assignment.experts() == 0) return {};
  const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0}), ranks = topology.ranks();
  const int64_t largest = *std::max_element(assignment.load().begin(), assignment.load().end());
  const int64_t bound_ps = std::max((total + ranks - 1) / ranks, largest) * options.costs.row_work_ps;
  Search search(&assignment);
  search.PlaceGreedily();
  Score best = search.Descend();
  std::vector<int> owners = assignment.owners();
  const auto keep_if_better = [&](const Score& score) {
    if (score < best) std::tie(best, owners) = std::tuple(score, assignment.owners());
  };
  if (!start.empty()) {
    SHOAL_CHECK_EQ(start.size(), owners.size());
    assignment.Reset({start.begin(), start.end()});
    keep_if_better(search.Descend());
  }
  std::mt19937_64 random(0);
  for (int restart = 0; restart < options.restarts && best.forward_ps > bound_ps && !search.Exhausted(); ++restart) {
    assignment.Reset(owners);
    search.Disturb(random);
    keep_if_better(search.Descend());
  }
  return {std::move(owners), best.forward_ps, bound_ps};
}

}  // namespace shoal
