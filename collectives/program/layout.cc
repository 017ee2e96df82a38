#include "collectives/program/layout.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace shoal {
namespace {

int InOrderParent(int at, int n) {
  if (at == 0) return -1;
  const int bit = at & -at;
  const int up = (at ^ bit) | (bit << 1);
  return up < n ? up : at ^ bit;
}

template <class Parent>
TreeNode TreeOf(absl::Span<const int> ranks, int at, Parent parent) {
  const int n = static_cast<int>(ranks.size());
  TreeNode node;
  const int up = parent(at);
  if (up >= 0) node.parent = ranks[up];
  for (int i = 0; i < n; ++i) {
    if (i != at && parent(i) == at) node.children.push_back(ranks[i]);
  }
  return node;
}

}  // namespace

std::vector<int> RankOrder(const Problem& problem) {
  if (problem.topology != nullptr && !problem.topology->order.empty()) return problem.topology->order;
  std::vector<int> order(problem.size);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

std::vector<std::vector<int>> RanksByHost(const Problem& problem) {
  std::map<int, std::vector<int>> by_number;
  for (int r = 0; r < problem.size; ++r) {
    by_number[problem.topology == nullptr ? 0 : problem.topology->host[r]].push_back(r);
  }
  std::vector<std::vector<int>> hosts;
  for (auto& [unused, ranks] : by_number) hosts.push_back(std::move(ranks));
  return hosts;
}

bool HasHosts(const Problem& problem) {
  if (problem.topology == nullptr) return false;
  const std::vector<int>& host = problem.topology->host;
  return std::any_of(host.begin(), host.end(), [&](int h) { return h != host[0]; });
}

int PositionOf(absl::Span<const int> ranks, int rank) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  return found == ranks.end() ? -1 : static_cast<int>(found - ranks.begin());
}

std::vector<int> StartingAt(std::vector<int> ranks, int first) {
  std::rotate(ranks.begin(), std::find(ranks.begin(), ranks.end(), first), ranks.end());
  return ranks;
}

TreeNode InOrderTree(absl::Span<const int> ranks, int at) {
  const int n = static_cast<int>(ranks.size());
  return TreeOf(ranks, at, [n](int i) { return InOrderParent(i, n); });
}

TreeNode CounterTree(absl::Span<const int> ranks, int at) {
  const int n = static_cast<int>(ranks.size());
  // The mirror image, or where that maps leaves to leaves, a turn by one.
  const auto there = [n](int i) { return n % 2 == 0 ? n - 1 - i : (i + n - 1) % n; };
  const auto back = [n](int i) { return n % 2 == 0 ? n - 1 - i : (i + 1) % n; };
  return TreeOf(ranks, at, [&](int i) {
    const int up = InOrderParent(there(i), n);
    return up < 0 ? -1 : back(up);
  });
}

TreeNode BinomialTree(absl::Span<const int> ranks, int at) {
  return TreeOf(ranks, at, [](int i) { return i == 0 ? -1 : i & (i - 1); });
}

}  // namespace shoal
