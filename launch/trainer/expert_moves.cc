#include "launch/trainer/expert_moves.h"

#include <algorithm>
#include <utility>

#include "collectives/transport/segment.h"
#include "launch/trainer/layout.h"
#include "launch/trainer/rank_values.h"
#include "parallel/expert/copy_costs.h"
#include "parallel/placement/reshard.h"

namespace shoal {
namespace {

// By then the memory that a step works with has been mapped, and there are times of tasks to choose copies by.
constexpr int64_t kStepsToMeasure = 2;

bool MeasuresRoom(const Config& config) { return config.parallel().expert_copies() < 0; }

OwnerMap OwnersOfMoeLayers(const ExpertStore& experts) {
  OwnerMap owners;
  for (const ExpertPlacement& layer : experts.placement()) {
    if (!layer.empty()) owners.push_back(OwnersOf({layer}).front());
  }
  return owners;
}

// Of all layers, from those with experts.
template <typename Layers> Layers Spread(const Layers& moe, const ExpertStore& experts) {
  Layers layers(experts.placement().size());
  size_t next = 0;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    if (!experts.placement()[layer].empty()) layers[layer] = moe[next++];
  }
  return layers;
}

ExpertMover::Options MoverOptions(const Config& config) {
  const Parallel& parallel = config.parallel();
  return {.copies = ExpertMoves::FirstRoom(config),
          .overlap = parallel.expert_overlap(),
          .rule = DispatchRuleFor(config),
          .owners = OwnerPolicyFor(config),
          .reshard_interval = parallel.reshard_interval()};
}

}  // namespace

ExpertMoves::ExpertMoves(const Config& config, const Topology& topology, Communicator& control, ExpertStore& experts)
    : config_(config),
      topology_(topology),
      control_(&control),
      experts_(&experts),
      mover_(topology, OwnersOfMoeLayers(experts), MoverOptions(config)) {}

int ExpertMoves::FirstRoom(const Config& config) { return std::max(0, config.parallel().expert_copies()); }

absl::StatusOr<int64_t> ExpertMoves::AfterStep(absl::Span<const std::vector<int64_t>> rows, const CostTable& costs,
                                               const StepShape& shape, const Workload& workload) {
  mover_.Observe(rows);
  if (const std::optional<CopyCosts> measured = MeasuredCopyCosts(costs, shape, workload, topology_); measured.has_value()) {
    // What moves beside the weights is in fp32: they, and two moments.
    mover_.SetCosts(*measured, static_cast<int>(100 * 3 * workload.expert_elements * 4 / workload.expert_weight_bytes));
  }
  if (MeasuresRoom(config_) && mover_.steps() == kStepsToMeasure) {
    SHOAL_RETURN_IF_ERROR(MeasureRoom(), "measuring room for copies of experts");
  }
  int64_t moves = 0;
  if (mover_.Reshard().has_value()) {
    SHOAL_ASSIGN_OR_RETURN(moves, TakeOwners());
  }
  mover_.Placement();
  SHOAL_RETURN_IF_ERROR(Settle());
  return moves;
}

// The least of all ranks, because one placement is made for all.
absl::Status ExpertMoves::MeasureRoom() {
  const int64_t neighbours = static_cast<int64_t>(topology_.RanksOf(topology_.HostOf(control_->index())).size());
  int owned_min = static_cast<int>(mover_.owners().front().size());
  const int experts = owned_min;
  for (const std::vector<int>& layer : mover_.owners()) {
    for (int rank = 0; rank < topology_.ranks(); ++rank) {
      owned_min = std::min(owned_min, static_cast<int>(std::count(layer.begin(), layer.end(), rank)));
    }
  }
  const int fits = CopiesThatFit(AvailableMemoryBytes() / neighbours, experts_->copy_bytes(), experts - owned_min);
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> all, GatherValues(*control_, fits, "room for copies"));
  mover_.SetRoom(static_cast<int>(*std::min_element(all.begin(), all.end())));
  return absl::OkStatus();
}

absl::StatusOr<int64_t> ExpertMoves::TakeOwners() {
  const OwnerMap after = Spread(mover_.owners(), *experts_);
  const int64_t moves = static_cast<int64_t>(MovesBetween(OwnersOf(experts_->placement()), after).size());
  SHOAL_RETURN_IF_ERROR(experts_->SetOwners(after), "moving experts to new owners");
  return moves;
}

// Copies where the mover wants them. Measured room is only taken when it is needed; calibration may need all of it in any step.
absl::Status ExpertMoves::Settle() {
  int needed = config_.parallel().calibrate() ? mover_.room() : 0;
  for (const ExpertPlacement& layer : mover_.placement()) needed = std::max(needed, CopiesOfRank(layer, topology_.ranks()));
  SHOAL_RETURN_IF_ERROR(experts_->MakeRoom(needed), "room for ", needed,
                        " copies of a layer's experts (parallel.expert_copies sets a limit)");
  experts_->SetHolders(Spread(mover_.placement(), *experts_));
  return absl::OkStatus();
}

ExpertPlacement ExpertMoves::Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows, int share) const {
  std::vector<int64_t> all(rows.begin(), rows.end());
  for (int64_t& count : all) count *= share;
  return mover_.Calibrate(planned, all);
}

absl::Status ExpertMoves::Restore(absl::Span<const int64_t> saved) {
  SHOAL_RETURN_IF_ERROR(mover_.Restore(saved));
  if (!MeasuresRoom(config_)) mover_.SetRoom(FirstRoom(config_));
  SHOAL_RETURN_IF_ERROR(TakeOwners().status());
  return Settle();
}

int CopiesThatFit(int64_t available, int64_t copy_bytes, int most) {
  const int64_t fit = copy_bytes > 0 ? available / 4 * 3 / copy_bytes : most;
  return static_cast<int>(std::clamp<int64_t>(fit, 0, most));
}

std::vector<ExpertWork> ExpertWorkOf(const ExpertStore& experts, absl::Span<const std::vector<int64_t>> rows, int64_t parts) {
  std::vector<ExpertWork> work;
  for (const ExpertPlacement& placement : experts.placement()) {
    if (placement.empty()) continue;
    const size_t layer = work.size();
    work.push_back({placement, layer < rows.size() ? rows[layer] : std::vector<int64_t>()});
    for (int64_t& count : work.back().rows) count /= parts;
  }
  return work;
}

}  // namespace shoal
