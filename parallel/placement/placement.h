// Where the work lives: which rank owns each block of parameters, which ranks hold a copy of it to compute with, and which
// sequences of a batch each rank computes. Pure: a placement is a value that every rank computes alone from the same
// arguments. It never changes what is computed.
//
// Dense blocks are materialised on every rank. Expert blocks are spread over the `expert` consecutive ranks of an expert
// group, contiguous experts together; every expert group holds all experts once, so ranks with the same place in
// their groups ("replicas") hold the same experts. Optimizer state is sharded: of the ranks that hold a block, one
// owns it. Owners are contiguous in the list of blocks, so that a flat buffer of blocks in list order is also in owner
// order, and its uneven reduce-scatter brings every gradient to its owner.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "runtime/base/status.h"

namespace shoal {

enum class Rank : int {};
constexpr int Index(Rank rank) { return static_cast<int>(rank); }

// A piece of the parameters with its optimizer state, as the placement sees it.
struct BlockShape {
  int64_t elements = 0;
  int expert = -1;  // Index of the expert in its layer; -1: dense.
};

struct Layout {
  int ranks = 1;
  int expert = 1;   // Ranks of an expert group; divides `ranks`.
  int experts = 1;  // Experts of a layer.
};

struct Range {
  int64_t begin = 0;
  int64_t count = 0;
  friend bool operator==(const Range&, const Range&) = default;
};

// Part `index` of `total` things dealt evenly over `parts`: contiguous, the first total % parts get one more.
Range EvenPart(int64_t total, int parts, int index);

class Placement {
 public:
  // INVALID_ARGUMENT: the layout does not fit; the message says which values would.
  static absl::StatusOr<Placement> Make(absl::Span<const BlockShape> blocks, const Layout& layout);

  const Layout& layout() const { return layout_; }
  // Owner of `block` among the ranks of `rank`'s replica group (all ranks for a dense block).
  Rank OwnerFor(int block, Rank rank) const;
  bool Materialised(int block, Rank rank) const;
  // Experts of every layer that `rank` holds.
  Range ExpertsOf(Rank rank) const;
  // The ranks that share one copy of the experts with `rank`, and those that hold the same experts as `rank`; both
  // ascending, with `rank`.
  std::vector<int> ExpertGroup(Rank rank) const;
  std::vector<int> ReplicaGroup(Rank rank) const;
  // The sequences of a part of a batch that `rank` computes; may be none.
  Range RowsOf(Rank rank, int64_t rows) const { return EvenPart(rows, layout_.ranks, Index(rank)); }

  // A table for people: a line per rank.
  std::string DebugString(absl::Span<const BlockShape> blocks) const;

 private:
  Layout layout_;
  std::vector<int> expert_of_block_;  // -1: dense.
  std::vector<int> owner_;            // Index in the block's replica group.
};

// Splits a list of sizes into `parts` contiguous pieces with the largest piece as small as a greedy cut at equal shares
// makes it. Returns the piece of each element.
std::vector<int> ContiguousPartition(absl::Span<const int64_t> sizes, int parts);

}  // namespace shoal
