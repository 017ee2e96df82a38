// What algorithms ask of a topology. All pure; equal on all ranks.
#pragma once

#include <vector>

#include "collectives/program/program.h"

namespace shoal {

// All ranks in the order of rings and trees.
std::vector<int> RankOrder(const Problem& problem);
// The ranks of each host, ascending; hosts by their number.
std::vector<std::vector<int>> RanksByHost(const Problem& problem);
// More than one host, and so something to gain by two levels.
bool HasHosts(const Problem& problem);

// Where `rank` stands in `ranks`; -1: nowhere.
int PositionOf(absl::Span<const int> ranks, int rank);
// `ranks` turned so that `first` is the first.
std::vector<int> StartingAt(std::vector<int> ranks, int first);

// One rank's neighbours in a tree; -1: none.
struct TreeNode {
  int parent = -1;
  std::vector<int> children;
};
// The place of ranks[at] in a binary tree over `ranks` with ranks[0] as its root, in whose order neighbours in `ranks`
// are near. Odd places are leaves.
TreeNode InOrderTree(absl::Span<const int> ranks, int at);
// In another one, whose leaves are inner nodes of the former (NCCL's double tree), of another root.
TreeNode CounterTree(absl::Span<const int> ranks, int at);
// Of least depth when one sends to one at a time: ranks[i]'s parent is i without its lowest bit.
TreeNode BinomialTree(absl::Span<const int> ranks, int at);

}  // namespace shoal
