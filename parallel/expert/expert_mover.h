// Decides step by step where experts are, from the rows that they got: which are copied to which ranks in the next step, and every
// so many steps who owns them (Hecate, arXiv 2502.02581). Pure: ranks that have seen the same rows decide alike.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "parallel/placement/hecate.h"
#include "parallel/placement/reshard.h"

namespace shoal {

class ExpertMover {
 public:
  struct Options {
    int copies = 0;            // Room of a rank for copies of a layer.
    int reshard_interval = 0;  // Steps; 0: never.
    int window = 5;            // Steps that predict the next.
  };
  // `owners`: of layers with experts only, as everywhere here.
  ExpertMover(Topology topology, OwnerMap owners, const Options& options);

  // After each step: rows of every rank for each expert, [ranks, experts] per layer.
  void Observe(absl::Span<const std::vector<int64_t>> rows);
  // Experts of a layer that can be copied behind its other work, from now on.
  void SetOverlap(int overlap) { overlap_ = overlap; }
  int overlap() const { return overlap_; }

  // New owners, when it is time and some expert should move; they count from then on.
  std::optional<OwnerMap> Reshard();
  // Of the next step.
  std::vector<ExpertPlacement> Placement() const;

 private:
  const Topology topology_;
  const Options options_;
  OwnerMap owners_;
  LoadWindow window_;            // Rows of each host for each expert, as a layer of hosts * experts "experts".
  int overlap_ = 0;
  int64_t steps_ = 0;
};

}  // namespace shoal
