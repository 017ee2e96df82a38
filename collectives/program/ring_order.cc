#include <algorithm>
#include <numeric>

#include "collectives/program/cost.h"

namespace shoal {
namespace {

// A tour and what it costs. A ring's steps take as long as its slowest link, so a link weighs as the fifth power of its
// time: the slowest ones outweigh the rest, and among tours with equal ones the rest still counts.
class Tour {
 public:
  Tour(const std::vector<Link>& links, int size) : size_(size), time_(size * size), weight_(size * size) {
    constexpr int64_t kBytes = 1 << 20;
    int64_t longest = 1;
    for (int a = 0; a < size; ++a) {
      for (int b = 0; b < size; ++b) {
        if (a == b) continue;
        // Rings go both ways at once: the slower direction counts.
        for (const Link& link : {links[a * size + b], links[b * size + a]}) {
          const int64_t time = link.latency_ns + kBytes * 1'000'000 / std::max<int64_t>(1, link.bytes_per_ms);
          time_[a * size + b] = std::max(time_[a * size + b], time);
        }
        longest = std::max(longest, time_[a * size + b]);
      }
    }
    for (int i = 0; i < size * size; ++i) {
      const int64_t t = static_cast<int64_t>(static_cast<__int128>(time_[i]) * 1024 / longest);
      weight_[i] = t * t * t * t * t;  // At most 2^50, and 2^58 for a tour of 256.
    }
  }

  int64_t Slowest(const std::vector<int>& order) const {
    int64_t slowest = 0;
    for (int i = 0; i < size_; ++i) slowest = std::max(slowest, time_[order[i] * size_ + order[(i + 1) % size_]]);
    return slowest;
  }
  int64_t Weight(const std::vector<int>& order) const {
    int64_t sum = 0;
    for (int i = 0; i < size_; ++i) sum += Edge(order[i], order[(i + 1) % size_]);
    return sum;
  }

  // Always on to the nearest rank.
  std::vector<int> Greedy(int start) const {
    std::vector<int> order = {start};
    std::vector<bool> used(size_);
    used[start] = true;
    while (static_cast<int>(order.size()) < size_) {
      int best = -1;
      for (int r = 0; r < size_; ++r) {
        if (!used[r] && (best < 0 || Edge(order.back(), r) < Edge(order.back(), best))) best = r;
      }
      used[best] = true;
      order.push_back(best);
    }
    return order;
  }

  void Improve(std::vector<int>* order) const {
    constexpr int kSweepsMax = 50;
    for (int sweep = 0; sweep < kSweepsMax; ++sweep) {
      const bool reversed = Reverse(order);
      const bool moved = Move(order);
      if (!reversed && !moved) return;
    }
  }

 private:
  int64_t Edge(int a, int b) const { return weight_[a * size_ + b]; }
  int At(const std::vector<int>& order, int i) const { return order[(i + size_) % size_]; }

  // 2-opt: turns a stretch round.
  bool Reverse(std::vector<int>* order) const {
    std::vector<int>& o = *order;
    bool better = false;
    for (int i = 0; i < size_ - 1; ++i) {
      for (int j = i + 1; j < size_; ++j) {
        const int before = At(o, i - 1), after = At(o, j + 1);
        if (before == o[j] || after == o[i]) continue;
        if (Edge(before, o[j]) + Edge(o[i], after) >= Edge(before, o[i]) + Edge(o[j], after)) continue;
        std::reverse(o.begin() + i, o.begin() + j + 1);
        better = true;
      }
    }
    return better;
  }

  // Or-opt: puts up to three neighbours between two others, either way round.
  bool Move(std::vector<int>* order) const {
    std::vector<int>& o = *order;
    bool better = false;
    for (int length = 1; length <= std::min(3, size_ - 2); ++length) {
      for (int i = 0; i < size_; ++i) {
        std::rotate(o.begin(), o.begin() + (i == 0 ? 0 : 1), o.end());  // The stretch is always at the front.
        const int first = o[0], last = o[length - 1], before = o[size_ - 1], after = o[length];
        const int64_t gain = Edge(before, first) + Edge(last, after) - Edge(before, after);
        for (int j = length; j < size_ - 1; ++j) {
          const int64_t gap = Edge(o[j], o[j + 1]);
          const int64_t forward = Edge(o[j], first) + Edge(last, o[j + 1]) - gap;
          const int64_t backward = Edge(o[j], last) + Edge(first, o[j + 1]) - gap;
          if (std::min(forward, backward) >= gain) continue;
          if (backward < forward) std::reverse(o.begin(), o.begin() + length);
          std::rotate(o.begin(), o.begin() + length, o.begin() + j + 1);
          better = true;
          break;
        }
      }
    }
    return better;
  }

  const int size_;
  std::vector<int64_t> time_, weight_;
};

}  // namespace

std::vector<int> RingOrder(const std::vector<Link>& links, int size) {
  std::vector<int> best(size);
  std::iota(best.begin(), best.end(), 0);
  if (size <= 3) return best;  // There is one ring only.
  const Tour tour(links, size);
  constexpr int kStartsMax = 16;
  const auto key = [&](const std::vector<int>& order) { return std::pair(tour.Slowest(order), tour.Weight(order)); };
  const std::vector<int> by_index = best;
  for (int start = -1; start < std::min(size, kStartsMax); ++start) {
    std::vector<int> order = start < 0 ? by_index : tour.Greedy(start);
    tour.Improve(&order);
    if (key(order) < key(best)) best = order;
  }
  std::rotate(best.begin(), std::find(best.begin(), best.end(), 0), best.end());
  return best;
}

}  // namespace shoal
