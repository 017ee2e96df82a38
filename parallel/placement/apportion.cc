#include "parallel/placement/apportion.h"

#include <algorithm>
#include <numeric>

namespace shoal {

std::vector<int> ByDescending(absl::Span<const int64_t> values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)]; });
  return order;
}

std::vector<int64_t> Apportion(int64_t total, absl::Span<const int64_t> weights, int64_t cap) {
  using Wide = __int128;  // total * weight.
  std::vector<int64_t> share(weights.size(), 0);
  Wide weight_left = std::accumulate(weights.begin(), weights.end(), Wide{0});
  int64_t left = total;
  const std::vector<int> order = ByDescending(weights);
  auto next = order.begin();
  // Capping one raises what the others get per weight, so the capped are the first in descending order.
  for (; next != order.end() && weights[static_cast<size_t>(*next)] > 0 && left > 0; ++next) {
    const int64_t weight = weights[static_cast<size_t>(*next)];
    if (Wide{left} * weight < Wide{cap} * weight_left) break;
    share[static_cast<size_t>(*next)] = std::min(cap, left);
    left -= std::min(cap, left);
    weight_left -= weight;
  }
  if (weight_left == 0 || left == 0) return share;
  std::vector<int> rest(next, order.end());
  std::vector<int64_t> remainder(weights.size(), 0);
  int64_t given = 0;
  for (int i : rest) {
    const size_t at = static_cast<size_t>(i);
    const Wide product = Wide{left} * weights[at];
    share[at] = static_cast<int64_t>(product / weight_left);
    remainder[at] = static_cast<int64_t>(product % weight_left);
    given += share[at];
  }
  std::sort(rest.begin(), rest.end(), [&](int a, int b) {
    const int64_t ra = remainder[static_cast<size_t>(a)], rb = remainder[static_cast<size_t>(b)];
    return ra != rb ? ra > rb : a < b;
  });
  for (size_t i = 0; given < left; ++i, ++given) ++share[static_cast<size_t>(rest[i])];
  return share;
}

}  // namespace shoal
