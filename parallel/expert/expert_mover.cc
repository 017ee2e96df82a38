#include "parallel/expert/expert_mover.h"

#include <algorithm>
#include <utility>

namespace shoal {
namespace {

int ExpertsOf(const OwnerMap& owners) { return owners.empty() ? 0 : static_cast<int>(owners.front().size()); }

std::vector<ExpertPlacement> WithoutCopies(const OwnerMap& owners) {
  std::vector<ExpertPlacement> placement;
  for (const std::vector<int>& layer : owners) placement.push_back(OwnersOnly(layer));
  return placement;
}

}  // namespace

ExpertMover::ExpertMover(Topology topology, OwnerMap owners, const Options& options)
    : topology_(std::move(topology)),
      options_(options),
      owners_(std::move(owners)),
      window_(static_cast<int>(owners_.size()), topology_.ranks() * ExpertsOf(owners_), options.window),
      room_(options.copies),
      placement_(WithoutCopies(owners_)) {}

void ExpertMover::Observe(absl::Span<const std::vector<int64_t>> rows) {
  std::vector<int64_t> counts;
  for (const std::vector<int64_t>& layer : rows) counts.insert(counts.end(), layer.begin(), layer.end());
  window_.Add(counts);
  ++steps_;
}

void ExpertMover::SetCosts(const CopyCosts& costs, int move_percent) {
  costs_ = costs;
  move_percent_ = move_percent;
}

void ExpertMover::SetRoom(int copies) {
  room_ = copies;
  for (ExpertPlacement& layer : placement_) {
    if (CopiesOfRank(layer, topology_.ranks()) > copies) layer = OwnersOnly(OwnersOf({layer}).front());
  }
}

std::vector<int64_t> ExpertMover::Expected(int layer) const {
  const absl::Span<const int64_t> sums = window_.Predicted(layer);
  std::vector<int64_t> rows(sums.begin(), sums.end());
  const int64_t steps = std::clamp<int64_t>(steps_, 1, options_.window);
  for (int64_t& count : rows) count = (count + steps / 2) / steps;
  return rows;
}

// Experts of a layer with copies, on average.
int ExpertMover::Copied() const {
  if (options_.overlap >= 0) return std::min(options_.overlap, room_);
  size_t copied = 0;
  for (const ExpertPlacement& layer : placement_) {
    for (const ExpertCopies& copies : layer) copied += copies.holders.empty() ? 0 : 1;
  }
  return static_cast<int>(copied / std::max<size_t>(1, placement_.size()));
}

std::optional<OwnerMap> ExpertMover::Reshard() {
  if (options_.reshard_interval == 0 || steps_ == 0 || steps_ % options_.reshard_interval != 0)
    return std::nullopt;
  const bool by_cost = options_.overlap < 0;
  if (!costs_.has_value() && (by_cost || options_.owners == OwnerPolicy::kTuned)) return std::nullopt;
  std::vector<std::vector<int64_t>> rows;
  for (size_t layer = 0; layer < owners_.size(); ++layer) rows.push_back(Expected(static_cast<int>(layer)));
  OwnerMap owners = ChooseOwners(rows, topology_, owners_,
                                 {.policy = options_.owners,
                                  .overlap = Copied(),
                                  .copies = copy_options(),
                                  .steps = by_cost ? options_.reshard_interval : 0,
                                  .move_percent = move_percent_});
  if (owners == owners_) return std::nullopt;
  const OwnerMap before = std::exchange(owners_, owners);
  for (size_t layer = 0; layer < owners.size(); ++layer) {
    if (owners[layer] == before[layer]) continue;
    placement_[layer] = OwnersOnly(owners[layer]);
    placement_[layer] = Place(static_cast<int>(layer));
  }
  return owners;
}

ExpertPlacement ExpertMover::Place(int layer) const {
  const std::vector<int>& owners = owners_[static_cast<size_t>(layer)];
  const std::vector<int64_t> rows = Expected(layer);
  if (options_.overlap < 0) {
    if (!costs_.has_value()) return OwnersOnly(owners);
    return ChooseCopies(owners, rows, topology_, copy_options(), placement_[static_cast<size_t>(layer)]);
  }
  const MaterialiseBudget budget{options_.overlap, room_};
  const int experts = static_cast<int>(owners.size());
  ExpertPlacement alike = Materialise(owners, ColumnSums(rows, experts), topology_, budget);
  if (topology_.hosts() == 1) return alike;
  ExpertPlacement per_host =
      MaterialisePerHost(owners, SumByHost(topology_, rows, experts), topology_, budget);
  if (!costs_.has_value()) return per_host;
  const auto step_ps = [&](const ExpertPlacement& placement) {
    return StepWithCopiesPs(topology_, placement, rows, options_.rule, *costs_);
  };
  return step_ps(per_host) <= step_ps(alike) ? per_host : alike;
}

ExpertPlacement ExpertMover::Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows) const {
  if (!costs_.has_value()) return planned;
  const MaterialiseBudget budget{.overlap = ExpertsOf(owners_), .memory = room_};
  return shoal::Calibrate(planned, rows, topology_, {budget, options_.rule, *costs_}).placement;
}

const std::vector<ExpertPlacement>& ExpertMover::Placement() {
  const size_t layers = owners_.size();
  const int64_t entries = std::max<int64_t>(1, int64_t{topology_.ranks()} * ExpertsOf(owners_));
  const size_t count =
      std::min(layers, static_cast<size_t>(std::max<int64_t>(1, options_.entries_per_step / entries)));
  for (size_t i = 0; i < count; ++i, ++turn_) {
    turn_ %= layers;
    placement_[turn_] = Place(static_cast<int>(turn_));
  }
  return placement_;
}

}  // namespace shoal
