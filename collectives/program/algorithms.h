// All algorithms, by name. Each is a pure function of its problem; every rank calls it with its own.
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/program/program.h"

namespace shoal {

struct Algorithm {
  std::string_view name;  // direct, fused, ring, ring2, recursive_doubling, halving_doubling, tree, double_tree, bruck, two_level...
  // Whether it can solve this kind, size and topology. Depends only on what all ranks know alike.
  bool (*applies)(const Problem& problem);
  // Requires applies(problem).
  Program (*make)(const Problem& problem);
  // Each output element is reduced in index order, in one place: what Order::kFixed and the wire formats need.
  bool index_order;
};

// Every kind has at least `direct`, which applies always: each rank sends straight to the one that needs it, elements are
// reduced by the rank that owns them (all_reduce: equal parts, rounded to 64 elements), in index order.
absl::Span<const Algorithm> Algorithms();
// INVALID_ARGUMENT: no such algorithm, or it does not apply.
absl::StatusOr<const Algorithm*> FindAlgorithm(std::string_view name, const Problem& problem);

}  // namespace shoal
