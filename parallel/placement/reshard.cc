#include "parallel/placement/reshard.h"

#include <algorithm>
#include <tuple>

#include "parallel/placement/apportion.h"
#include "parallel/placement/placement.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

class Resharding {
 public:
  Resharding(absl::Span<const std::vector<int64_t>> loads, const Topology& topology, const OwnerMap& current, int overlap,
             int slack_percent)
      : loads_(loads), topology_(topology), current_(current), slack_percent_(slack_percent), owners_(current),
        ranks_of_host_(topology.RanksByHost()) {
    SHOAL_CHECK_EQ(loads.size(), current.size());
    for (size_t layer = 0; layer < loads.size(); ++layer) {
      SHOAL_CHECK_EQ(loads[layer].size(), current[layer].size());
      order_.push_back(ByDescending(loads[layer]));
      size_t hot = 0;
      while (hot < order_[layer].size() && static_cast<int>(hot) < overlap && LoadAt(layer, hot) > 0) ++hot;
      hot_.push_back(hot);
    }
    DealPlaces();
  }

  OwnerMap Run() {
    std::vector<int64_t> hottest_cold;
    for (size_t layer = 0; layer < loads_.size(); ++layer) {
      hottest_cold.push_back(hot_[layer] < order_[layer].size() ? LoadAt(layer, hot_[layer]) : -1);
    }
    for (int layer : ByDescending(hottest_cold)) PlaceCold(static_cast<size_t>(layer));
    PlaceHot();
    const bool even = current_places_ == dealt_places_;
    return even && Unevenness(current_) <= Unevenness(owners_) ? current_ : owners_;
  }

 private:
  int64_t LoadAt(size_t layer, size_t place) const {
    return loads_[layer][static_cast<size_t>(order_[layer][place])];
  }
  size_t HostOf(int rank) const { return static_cast<size_t>(topology_.HostOf(rank)); }

  // Equal numbers of places; the extra ones go to the ranks that own most now.
  void DealPlaces() {
    const int ranks = topology_.ranks();
    current_places_.resize(static_cast<size_t>(ranks));
    int64_t experts = 0;
    for (const std::vector<int>& layer : current_) {
      experts += static_cast<int64_t>(layer.size());
      for (int owner : layer) ++current_places_[static_cast<size_t>(owner)];
    }
    free_.resize(static_cast<size_t>(ranks));
    host_free_.resize(ranks_of_host_.size());
    int turn = 0;
    for (int rank : ByDescending(current_places_)) {
      free_[static_cast<size_t>(rank)] = EvenPart(experts, ranks, turn++).count;
      host_free_[HostOf(rank)] += free_[static_cast<size_t>(rank)];
    }
    dealt_places_ = free_;
  }

  void Assign(size_t layer, int expert, int rank) {
    owners_[layer][static_cast<size_t>(expert)] = rank;
    --free_[static_cast<size_t>(rank)];
    --host_free_[HostOf(rank)];
  }

  void ClearLoads() {
    rank_load_.assign(free_.size(), 0);
    host_load_.assign(ranks_of_host_.size(), 0);
  }

  // A host's load counts per rank it has. Least loaded first, then where the expert is, then fewest free places (Algorithm 2).
  int LeastLoaded(int owner) const {
    const auto less_loaded = [&](size_t a, size_t b) {
      const int64_t load_a = host_load_[a] * static_cast<int64_t>(ranks_of_host_[b].size());
      const int64_t load_b = host_load_[b] * static_cast<int64_t>(ranks_of_host_[a].size());
      return std::tuple(load_a, a != HostOf(owner), host_free_[a]) < std::tuple(load_b, b != HostOf(owner), host_free_[b]);
    };
    size_t host = ranks_of_host_.size();
    for (size_t h = 0; h < ranks_of_host_.size(); ++h) {
      if (host_free_[h] > 0 && (host == ranks_of_host_.size() || less_loaded(h, host))) host = h;
    }
    SHOAL_CHECK_LT(host, ranks_of_host_.size());
    const auto key = [&](int rank) {
      return std::tuple(rank_load_[static_cast<size_t>(rank)], rank != owner, free_[static_cast<size_t>(rank)]);
    };
    int best = -1;
    for (int rank : ranks_of_host_[host]) {
      if (free_[static_cast<size_t>(rank)] > 0 && (best < 0 || key(rank) < key(best))) best = rank;
    }
    return best;
  }

  // Whether a load more keeps the rank and its host near the mean; an empty rank is as good as any other.
  bool MayStay(int owner, int64_t load, int64_t layer_load) const {
    const size_t host = HostOf(owner);
    const int64_t ranks = topology_.ranks(), on_host = static_cast<int64_t>(ranks_of_host_[host].size());
    const int64_t rank_load = rank_load_[static_cast<size_t>(owner)];
    const auto near_mean = [&](int64_t sum, int64_t of_ranks) {
      return sum * ranks * 100 <= layer_load * of_ranks * (100 + slack_percent_);
    };
    return free_[static_cast<size_t>(owner)] > 0 && (rank_load == 0 || near_mean(rank_load + load, 1)) &&
           near_mean(host_load_[host] + load, on_host);
  }

  void PlaceCold(size_t layer) {
    ClearLoads();
    int64_t layer_load = 0;
    for (size_t i = hot_[layer]; i < order_[layer].size(); ++i) layer_load += LoadAt(layer, i);
    for (size_t i = hot_[layer]; i < order_[layer].size(); ++i) {
      const int expert = order_[layer][i], owner = current_[layer][static_cast<size_t>(expert)];
      const int64_t load = LoadAt(layer, i);
      const int rank = MayStay(owner, load, layer_load) ? owner : LeastLoaded(owner);
      rank_load_[static_cast<size_t>(rank)] += load;
      host_load_[HostOf(rank)] += load;
      Assign(layer, expert, rank);
    }
  }

  // Where they are if there is room; else where the layer has fewest of its hot experts: their owners send to all others.
  void PlaceHot() {
    std::vector<std::vector<int>> homeless(loads_.size());
    for (size_t layer = 0; layer < loads_.size(); ++layer) {
      for (size_t i = 0; i < hot_[layer]; ++i) {
        const int expert = order_[layer][i], owner = current_[layer][static_cast<size_t>(expert)];
        if (free_[static_cast<size_t>(owner)] > 0) {
          Assign(layer, expert, owner);
        } else {
          homeless[layer].push_back(expert);
        }
      }
    }
    for (size_t layer = 0; layer < loads_.size(); ++layer) {
      ClearLoads();
      for (size_t i = 0; i < hot_[layer]; ++i) CountHot(owners_[layer][static_cast<size_t>(order_[layer][i])], 1);
      for (int expert : homeless[layer]) {  // Still entered at the old owner.
        const int owner = current_[layer][static_cast<size_t>(expert)];
        CountHot(owner, -1);
        const int rank = LeastLoaded(owner);
        CountHot(rank, 1);
        Assign(layer, expert, rank);
      }
    }
  }

  void CountHot(int rank, int64_t change) {
    rank_load_[static_cast<size_t>(rank)] += change;
    host_load_[HostOf(rank)] += change;
  }

  // The cold load of the fullest rank and, per rank, of the fullest host, summed over layers.
  int64_t Unevenness(const OwnerMap& owners) {
    int64_t sum = 0;
    for (size_t layer = 0; layer < loads_.size(); ++layer) {
      ClearLoads();
      for (size_t i = hot_[layer]; i < order_[layer].size(); ++i) {
        const int owner = owners[layer][static_cast<size_t>(order_[layer][i])];
        rank_load_[static_cast<size_t>(owner)] += LoadAt(layer, i);
        host_load_[HostOf(owner)] += LoadAt(layer, i);
      }
      int64_t host = 0;
      for (size_t h = 0; h < host_load_.size(); ++h) {
        host = std::max(host, host_load_[h] / static_cast<int64_t>(ranks_of_host_[h].size()));
      }
      sum += *std::max_element(rank_load_.begin(), rank_load_.end()) + host;
    }
    return sum;
  }

  const absl::Span<const std::vector<int64_t>> loads_;
  const Topology& topology_;
  const OwnerMap& current_;
  const int slack_percent_;
  OwnerMap owners_;
  std::vector<std::vector<int>> ranks_of_host_;
  std::vector<std::vector<int>> order_;           // Of each layer: experts by descending load,
  std::vector<size_t> hot_;                       // of which the first `hot_` are materialised anyway.
  std::vector<int64_t> current_places_, dealt_places_;  // Experts of each rank, over all layers.
  std::vector<int64_t> free_, host_free_;         // Places left.
  std::vector<int64_t> rank_load_, host_load_;    // In the layer at hand.
};

}  // namespace

OwnerMap Reshard(absl::Span<const std::vector<int64_t>> loads, const Topology& topology, const OwnerMap& current, int overlap,
                 int slack_percent) {
  return Resharding(loads, topology, current, overlap, slack_percent).Run();
}

std::vector<OwnerMove> MovesBetween(const OwnerMap& before, const OwnerMap& after) {
  SHOAL_CHECK_EQ(before.size(), after.size());
  std::vector<OwnerMove> moves;
  for (size_t layer = 0; layer < before.size(); ++layer) {
    SHOAL_CHECK_EQ(before[layer].size(), after[layer].size());
    for (size_t e = 0; e < before[layer].size(); ++e) {
      if (before[layer][e] == after[layer][e]) continue;
      moves.push_back({static_cast<int>(layer), static_cast<int>(e), before[layer][e], after[layer][e]});
    }
  }
  return moves;
}

}  // namespace shoal
