// Where the experts of one layer are in one step: every expert has one owner, which keeps its optimizer state, and is
// *materialised* (its weights are there to compute with) on the owner and on any other ranks, the holders. Plain expert
// parallelism has no holders, fully sharded data parallelism has all ranks as holders; whatever lies between is fully sharded
// sparse data parallelism (Hecate, arXiv 2502.02581). A value that every rank computes alone from the same integers.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/topology.h"

namespace shoal {

struct ExpertCopies {
  int owner = 0;
  std::vector<int> holders;  // Ascending, without the owner.

  bool On(int rank) const;
  friend bool operator==(const ExpertCopies&, const ExpertCopies&) = default;
};

// By expert.
using ExpertPlacement = std::vector<ExpertCopies>;

// Owner of each expert of each layer: owners[layer][expert].
using OwnerMap = std::vector<std::vector<int>>;

// The layer's experts with their owners and no holders.
ExpertPlacement OwnersOnly(absl::Span<const int> owners);

// Experts of every layer dealt in turn over all ranks, on from layer to layer, so that ranks own nearly as many whatever the
// number of experts is.
OwnerMap EvenOwners(int layers, int experts, int ranks);

// Experts of every layer spread over expert groups of `group` consecutive ranks, which divides `ranks`: place p of a group
// holds EvenPart(experts, group, p), and the ranks with equal places hold the same experts and share their ownership, dealt
// in turn from layer to layer so that each owns nearly as many. group == ranks: expert parallelism; 1: data parallelism.
std::vector<ExpertPlacement> GroupedPlacement(int layers, int experts, int ranks, int group);

// Experts that are on a rank, ascending.
std::vector<int> LocalExperts(const ExpertPlacement& placement, int rank);

// The most copies that one of `ranks` ranks holds.
int CopiesOfRank(const ExpertPlacement& placement, int ranks);

// Experts that each rank sends or receives, the larger, when the copies of a layer are gathered by two-level trees, as
// Communicator::SparseAllGather does: an owner sends to one holder of each other host, it and they to the holders of their hosts.
std::vector<int64_t> MovedExperts(const ExpertPlacement& placement, const Topology& topology);

OwnerMap OwnersOf(absl::Span<const ExpertPlacement> layers);

// Equal exactly when the placements are (up to collisions): compared between ranks before they act on them.
uint64_t Fingerprint(absl::Span<const ExpertPlacement> layers);

}  // namespace shoal
