#include "parallel/placement/dispatch.h"

#include <algorithm>
#include <numeric>

#include "runtime/base/check.h"

namespace shoal {
namespace {

// Sweeps of water-filling over all choices. Each sweep lowers the sum of squared rows per rank; on random cases the fourth
// changes the maximum by less than a percent.
constexpr int kSweepsMax = 4;

// Rows of one expert that may go to any of several copies, from sources that hold none: those of one host that has copies,
// or those of all hosts that have none. Ranges of Splitter::pool_.
struct Choice {
  int expert = 0;
  int64_t rows = 0;
  size_t targets = 0, targets_end = 0;  // Ascending ranks.
  size_t sources = 0, sources_end = 0;
};

class Splitter {
 public:
  using Shares = std::vector<std::vector<DispatchShare>>;

  Splitter(const Topology& topology, const ExpertPlacement& placement, absl::Span<const int64_t> rows)
      : topology_(topology), placement_(placement), rows_(rows), held_(static_cast<size_t>(topology.ranks())) {
    SHOAL_CHECK_EQ(rows.size(), placement.size() * held_.size());
    by_host_.resize(held_.size());
    std::iota(by_host_.begin(), by_host_.end(), 0);
    std::stable_sort(by_host_.begin(), by_host_.end(), [&](int a, int b) { return topology.HostOf(a) < topology.HostOf(b); });
    for (int expert = 0; expert < static_cast<int>(placement.size()); ++expert) AddChoices(expert);
  }

  Shares Nearest() const {
    return Emit([this](const Choice& choice, Shares* shares) {
      for (size_t s = choice.sources; s < choice.sources_end; ++s) EmitEqually(choice, pool_[s], shares);
    });
  }

  Shares WaterFilled() {
    StartFromEqualShares();
    std::vector<size_t> order(choices_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return choices_[a].rows > choices_[b].rows; });
    bool changed = true;
    for (int sweep = 0; sweep < kSweepsMax && changed; ++sweep) {
      changed = false;
      for (size_t c : order) changed |= Refill(choices_[c]);
    }
    return Emit([this](const Choice& choice, Shares* shares) { EmitInOrder(choice, shares); });
  }

  Shares NearestWhole() const {
    return Emit([this](const Choice& choice, Shares* shares) {
      for (size_t s = choice.sources; s < choice.sources_end; ++s) {
        EmitWhole(choice, pool_[s], pool_[choice.targets + FirstExtra(choice, pool_[s])], shares);
      }
    });
  }

  // Longest processing time first: parcels of all choices, the largest first.
  Shares FilledWhole() {
    struct Parcel {
      int64_t rows = 0;
      size_t choice = 0, source = 0;
    };
    std::vector<Parcel> parcels;
    for (size_t c = 0; c < choices_.size(); ++c) {
      for (size_t s = choices_[c].sources; s < choices_[c].sources_end; ++s) {
        parcels.push_back({Rows(pool_[s], choices_[c].expert), c, s});
      }
    }
    std::stable_sort(parcels.begin(), parcels.end(), [](const Parcel& a, const Parcel& b) { return a.rows > b.rows; });
    AddRowsThatStay();
    std::vector<int> target(pool_.size());  // By place of the source.
    for (const Parcel& parcel : parcels) {
      const Choice& choice = choices_[parcel.choice];
      const auto first = pool_.begin() + static_cast<ptrdiff_t>(choice.targets);
      const auto last = pool_.begin() + static_cast<ptrdiff_t>(choice.targets_end);
      const auto load = [this](int rank) { return load_[static_cast<size_t>(rank)]; };
      target[parcel.source] = *std::min_element(first, last, [&](int a, int b) { return load(a) < load(b); });
      load_[static_cast<size_t>(target[parcel.source])] += parcel.rows;
    }
    return Emit([&](const Choice& choice, Shares* shares) {
      for (size_t s = choice.sources; s < choice.sources_end; ++s) EmitWhole(choice, pool_[s], target[s], shares);
    });
  }

 private:
  int64_t Rows(int source, int expert) const {
    return rows_[static_cast<size_t>(source) * placement_.size() + static_cast<size_t>(expert)];
  }

  void Hold(int expert, char held) {
    const ExpertCopies& copies = placement_[static_cast<size_t>(expert)];
    held_[static_cast<size_t>(copies.owner)] = held;
    for (int holder : copies.holders) held_[static_cast<size_t>(holder)] = held;
  }

  void AddChoices(int expert) {
    Hold(expert, 1);
    std::vector<int> far;  // Sources on hosts without a copy.
    for (size_t begin = 0, end; begin < by_host_.size(); begin = end) {
      const int host = topology_.HostOf(by_host_[begin]);
      std::vector<int> targets, sources;
      for (end = begin; end < by_host_.size() && topology_.HostOf(by_host_[end]) == host; ++end) {
        const int rank = by_host_[end];
        if (held_[static_cast<size_t>(rank)]) {
          targets.push_back(rank);
        } else if (Rows(rank, expert) > 0) {
          sources.push_back(rank);
        }
      }
      if (targets.empty()) {
        far.insert(far.end(), sources.begin(), sources.end());
      } else {
        AddChoice(expert, targets, sources);
      }
    }
    if (!far.empty()) {
      std::vector<int> all = placement_[static_cast<size_t>(expert)].holders;
      all.insert(std::upper_bound(all.begin(), all.end(), placement_[static_cast<size_t>(expert)].owner),
                 placement_[static_cast<size_t>(expert)].owner);
      AddChoice(expert, all, far);
    }
    Hold(expert, 0);
  }

  void AddChoice(int expert, const std::vector<int>& targets, const std::vector<int>& sources) {
    if (sources.empty()) return;
    Choice choice{expert, 0, pool_.size(), pool_.size() + targets.size()};
    pool_.insert(pool_.end(), targets.begin(), targets.end());
    choice.sources = pool_.size();
    pool_.insert(pool_.end(), sources.begin(), sources.end());
    choice.sources_end = pool_.size();
    for (int source : sources) choice.rows += Rows(source, expert);
    choices_.push_back(choice);
  }

  // The target, counted from the choice's first, that gets the first of the rows left over by an equal split.
  static size_t FirstExtra(const Choice& choice, int source) {
    return static_cast<size_t>(source + choice.expert) % (choice.targets_end - choice.targets);
  }

  void EmitEqually(const Choice& choice, int source, Shares* shares) const {
    const int64_t targets = static_cast<int64_t>(choice.targets_end - choice.targets);
    const int64_t rows = Rows(source, choice.expert), each = rows / targets, extra = rows % targets;
    int64_t turn = (targets - static_cast<int64_t>(FirstExtra(choice, source))) % targets;
    for (size_t t = choice.targets; t < choice.targets_end; ++t) {
      const int64_t share = each + (turn < extra ? 1 : 0);
      if (share > 0) (*shares)[static_cast<size_t>(source)].push_back({choice.expert, pool_[t], share});
      if (++turn == targets) turn = 0;
    }
  }

  void EmitWhole(const Choice& choice, int source, int target, Shares* shares) const {
    (*shares)[static_cast<size_t>(source)].push_back({choice.expert, target, Rows(source, choice.expert)});
  }

  // Sets load_ to what ranks compute of their own rows.
  void AddRowsThatStay() {
    load_.assign(held_.size(), 0);
    for (size_t e = 0; e < placement_.size(); ++e) {
      const int expert = static_cast<int>(e);
      load_[static_cast<size_t>(placement_[e].owner)] += Rows(placement_[e].owner, expert);
      for (int holder : placement_[e].holders) load_[static_cast<size_t>(holder)] += Rows(holder, expert);
    }
  }

  // Sets amount_ and load_ to those of Nearest(), in O(sources + targets) of each choice. Refilling a choice never raises
  // the maximum over its targets, so what comes of it is never worse than Nearest().
  void StartFromEqualShares() {
    amount_.assign(pool_.size(), 0);
    AddRowsThatStay();
    std::vector<int64_t> step;  // Differences between neighbouring targets' left-over rows.
    for (const Choice& choice : choices_) {
      const size_t targets = choice.targets_end - choice.targets;
      step.assign(targets + 1, 0);
      int64_t each = 0;
      for (size_t s = choice.sources; s < choice.sources_end; ++s) {
        const int64_t rows = Rows(pool_[s], choice.expert);
        each += rows / static_cast<int64_t>(targets);
        const size_t first = FirstExtra(choice, pool_[s]);
        const size_t last = first + static_cast<size_t>(rows % static_cast<int64_t>(targets));
        ++step[first];
        --step[std::min(last, targets)];
        if (last > targets) {
          ++step[0];
          --step[last - targets];
        }
      }
      for (size_t t = 0; t < targets; ++t) {
        each += step[t];
        amount_[choice.targets + t] = each;
        load_[static_cast<size_t>(pool_[choice.targets + t])] += each;
      }
    }
  }

  // Levels the choice's targets: takes its rows back and pours them in again from the emptiest target upwards. Returns
  // whether anything changed.
  bool Refill(const Choice& choice) {
    const size_t targets = choice.targets_end - choice.targets;
    if (targets == 1) return false;
    floor_.clear();
    for (size_t t = choice.targets; t < choice.targets_end; ++t) {
      floor_.push_back({load_[static_cast<size_t>(pool_[t])] - amount_[t], t});
    }
    std::sort(floor_.begin(), floor_.end());
    // The `wet` emptiest targets end at `level`, the first `extra` of them one above.
    size_t wet = 1;
    int64_t sum = floor_[0].first;
    while (wet < targets && floor_[wet].first * static_cast<int64_t>(wet) - sum <= choice.rows) sum += floor_[wet++].first;
    const int64_t level = (choice.rows + sum) / static_cast<int64_t>(wet);
    const int64_t extra = (choice.rows + sum) % static_cast<int64_t>(wet);
    bool changed = false;
    for (size_t i = 0; i < targets; ++i) {
      const auto [floor, t] = floor_[i];
      const int64_t amount = i < wet ? level - floor + (static_cast<int64_t>(i) < extra ? 1 : 0) : 0;
      changed |= amount != amount_[t];
      amount_[t] = amount;
      load_[static_cast<size_t>(pool_[t])] = floor + amount;
    }
    return changed;
  }

  // Cuts the amounts of the targets from the sources one after another: at most sources + targets shares.
  void EmitInOrder(const Choice& choice, Shares* shares) const {
    size_t t = choice.targets;
    int64_t room = amount_[t];
    for (size_t s = choice.sources; s < choice.sources_end; ++s) {
      for (int64_t rows = Rows(pool_[s], choice.expert); rows > 0;) {
        while (room == 0) room = amount_[++t];
        const int64_t share = std::min(rows, room);
        (*shares)[static_cast<size_t>(pool_[s])].push_back({choice.expert, pool_[t], share});
        rows -= share;
        room -= share;
      }
    }
  }

  template <class EmitChoice>
  Shares Emit(const EmitChoice& emit_choice) const {
    Shares shares(held_.size());
    auto choice = choices_.begin();
    for (size_t e = 0; e < placement_.size(); ++e) {
      const int expert = static_cast<int>(e);
      const auto stay = [&](int rank) {
        if (Rows(rank, expert) > 0) shares[static_cast<size_t>(rank)].push_back({expert, rank, Rows(rank, expert)});
      };
      stay(placement_[e].owner);
      for (int holder : placement_[e].holders) stay(holder);
      for (; choice != choices_.end() && choice->expert == expert; ++choice) emit_choice(*choice, &shares);
    }
    return shares;
  }

  const Topology& topology_;
  const ExpertPlacement& placement_;
  const absl::Span<const int64_t> rows_;
  std::vector<char> held_;          // Scratch of AddChoices: which ranks hold the expert.
  std::vector<int> by_host_;        // Ranks, host by host.
  std::vector<int> pool_;
  std::vector<Choice> choices_;     // By expert.
  std::vector<int64_t> amount_;     // Beside pool_: rows of a target from its choice.
  std::vector<int64_t> load_;       // By rank: all rows it computes.
  std::vector<std::pair<int64_t, size_t>> floor_;  // Scratch of Refill.
};

}  // namespace

std::vector<std::vector<DispatchShare>> SplitTokens(DispatchRule rule, const Topology& topology,
                                                    const ExpertPlacement& placement, absl::Span<const int64_t> rows) {
  Splitter splitter(topology, placement, rows);
  switch (rule) {
    case DispatchRule::kNearest:
      return splitter.Nearest();
    case DispatchRule::kWaterFill:
      return splitter.WaterFilled();
    case DispatchRule::kNearestWhole:
      return splitter.NearestWhole();
    case DispatchRule::kWaterFillWhole:
      return splitter.FilledWhole();
  }
  SHOAL_CHECK(false) << "no rule of dispatch has the number " << static_cast<int>(rule);
}

}  // namespace shoal
