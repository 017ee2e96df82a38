// Experts that move, on one rank (docs/experts.md): tells ExpertMover, which decides, what happened in a step, and takes the experts
// of this rank to where it wants them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "launch/config/config.pb.h"
#include "models/optimizer/expert_store.h"
#include "parallel/expert/expert_mover.h"
#include "parallel/expert/expert_summary.h"
#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/workload.h"

namespace shoal {

// Not thread-safe but for Calibrate, which may be called while a step runs.
class ExpertMoves {
 public:
  // Borrows `control` (all ranks) and `experts`, which has the initial owners, for life.
  ExpertMoves(const Config& config, const Topology& topology, Communicator& control, ExpertStore& experts);

  // Room for copies that a store begins with (ExpertStore::Options::copies).
  static int FirstRoom(const Config& config);

  // Collective, after each training step: rows [ranks, E] of every rank for each expert of each layer with experts, what the tasks of
  // the step took and had to do. Brings experts to new owners; copies are made in the next step. Returns how many got other owners.
  // RESOURCE_EXHAUSTED: no memory for copies.
  absl::StatusOr<int64_t> AfterStep(absl::Span<const std::vector<int64_t>> rows, const CostTable& costs, const StepShape& shape,
                                    const Workload& workload);

  // As ExpertMover::Calibrate, from the rows of 1 of `share` equal parts of the step.
  ExpertPlacement Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows, int share) const;

  // What later decisions depend on, the same on every rank; and back. Restore is collective, before weights and state are read:
  // experts go to the owners that they had. Errors as of ExpertMover::Restore leave them where they are.
  std::vector<int64_t> Save() const { return mover_.Save(); }
  absl::Status Restore(absl::Span<const int64_t> saved);

 private:
  absl::Status MeasureRoom();
  absl::Status Settle();
  absl::StatusOr<int64_t> TakeOwners();

  const Config config_;
  const Topology topology_;
  Communicator* const control_;
  ExpertStore* const experts_;
  ExpertMover mover_;
};

// Copies of each layer that a rank has room for, at most `most`: `available` bytes are left to the rank, of which a quarter stays
// free, and one copy of each layer takes `copy_bytes`.
int CopiesThatFit(int64_t available, int64_t copy_bytes, int most);

// Placement and mean rows per part of each layer with experts. `rows` of all parts, or none.
std::vector<ExpertWork> ExpertWorkOf(const ExpertStore& experts, absl::Span<const std::vector<int64_t>> rows, int64_t parts);

}  // namespace shoal
