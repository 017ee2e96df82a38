// Decides step by step where experts are, from the rows that they got: which are copied to which ranks in the
// next step, and every so many steps who owns them (Hecate, arXiv 2502.02581; placement/copies.h and
// owners.h). Pure: ranks that have seen the same rows and the same costs decide alike.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "parallel/placement/copies.h"
#include "parallel/placement/hecate.h"
#include "parallel/placement/owners.h"

namespace shoal {

class ExpertMover {
 public:
  struct Options {
    int copies = 0;    // Room of a rank for copies of a layer.
    int overlap = -1;  // Experts of a layer that get copies; -1: those that pay, by SetCosts.
    DispatchRule rule = DispatchRule::kNearest;
    OwnerPolicy owners = OwnerPolicy::kHecate;
    int reshard_interval = 0;  // Steps; 0: never.
    int window = 5;            // Steps that predict the next.
    // Rows of all ranks for all experts of all layers that are looked at in a step; layers past it wait for
    // their turn, since loads drift slowly and looking at 32 ranks and 64 experts takes 2 ms.
    int64_t entries_per_step = 8192;
  };
  // `owners`: of layers with experts only, as everywhere here.
  ExpertMover(Topology topology, OwnerMap owners, const Options& options);

  // After each step: rows of every rank for each expert, [ranks, experts] per layer.
  void Observe(absl::Span<const std::vector<int64_t>> rows);
  // From now on; until then there are no copies unless `overlap` is given. `move_percent`: bytes of an expert
  // that gets another owner, of its weights on the wire.
  void SetCosts(const CopyCosts& costs, int move_percent);

  // New owners, when it is time and some expert should move; they count from then on. With copies by cost,
  // moving must pay until the next time.
  std::optional<OwnerMap> Reshard();
  // Of the next step; to be called once a step.
  const std::vector<ExpertPlacement>& Placement();
  // Another room than Options::copies. Layers of which a rank has more copies now lose them all, until the next Placement().
  void SetRoom(int copies);
  int room() const { return room_; }
  int64_t steps() const { return steps_; }  // Observed.
  // In a step, when the rows of a layer in that step are known: `planned` with the additional copies that pay (hecate.h);
  // `planned` itself until costs are known.
  ExpertPlacement Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows) const;

  // All that later decisions depend on, and back: what it decides then is what the mover that was saved would have decided.
  // Restore is for movers that have observed nothing. FAILED_PRECONDITION: saved by other numbers of ranks, layers, experts or
  // steps; DATA_LOSS: no saved state. Both leave the mover as it is.
  std::vector<int64_t> Save() const;
  absl::Status Restore(absl::Span<const int64_t> saved);
  // Where experts are to be now, without deciding anew.
  const OwnerMap& owners() const { return owners_; }
  const std::vector<ExpertPlacement>& placement() const { return placement_; }

 private:
  CopyOptions copy_options() const { return {room_, options_.rule, costs_.value_or(CopyCosts{})}; }
  std::vector<int64_t> Expected(int layer) const;
  int Copied() const;
  ExpertPlacement Place(int layer) const;

  const Topology topology_;
  const Options options_;
  OwnerMap owners_;
  LoadWindow window_;  // Rows of each rank for each expert, as a layer of ranks * experts "experts".
  std::optional<CopyCosts> costs_;
  int room_ = 0, move_percent_ = 0;
  int64_t steps_ = 0;
  std::vector<ExpertPlacement> placement_;  // Of the last step.
  size_t turn_ = 0;                         // The layer that is looked at next.
};

}  // namespace shoal
