// ExpertMover's Save and Restore.
#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/expert/expert_mover.h"

namespace shoal {
namespace {

constexpr int64_t kVersion = 1;

// The sizes that a state belongs to, by name.
using Sizes = std::array<std::pair<const char*, int64_t>, 4>;

Sizes SizesOf(int ranks, const OwnerMap& owners, int window) {
  return {{{"ranks", ranks},
           {"layers of experts", static_cast<int64_t>(owners.size())},
           {"experts", owners.empty() ? 0 : static_cast<int64_t>(owners.front().size())},
           {"steps that predict the next", window}}};
}

// Integers of a state in order; 0 and !ok() past the end.
class Reader {
 public:
  explicit Reader(absl::Span<const int64_t> values) : values_(values) {}
  int64_t Next() {
    if (at_ < values_.size()) return values_[at_++];
    short_ = true;
    return 0;
  }
  // The next one, which must be within [low, high].
  int Int(int64_t low, int64_t high) {
    const int64_t value = Next();
    Need(value >= low && value <= high);
    return static_cast<int>(value >= low && value <= high ? value : low);
  }
  void Need(bool right) { wrong_ = wrong_ || !right; }
  absl::Span<const int64_t> Take(size_t count) {
    short_ = short_ || count > values_.size() - at_;
    const absl::Span<const int64_t> taken = values_.subspan(at_, count);
    at_ += taken.size();
    return taken;
  }
  bool ok() const { return !short_ && !wrong_; }
  bool done() const { return ok() && at_ == values_.size(); }

 private:
  const absl::Span<const int64_t> values_;
  size_t at_ = 0;
  bool short_ = false, wrong_ = false;
};

void AppendCosts(const std::optional<CopyCosts>& costs, std::vector<int64_t>* to) {
  const CopyCosts c = costs.value_or(CopyCosts{});
  to->insert(to->end(), {costs.has_value() ? 1 : 0, c.layer.row_work_ps, c.layer.row_send_ps, c.layer.row_cross_ps,
                         c.layer.expert_send_ps, c.layer.expert_cross_ps, c.hidden_forward_ps, c.hidden_backward_ps,
                         c.gradient_percent, c.gather_twice ? 1 : 0});
}

std::optional<CopyCosts> ReadCosts(Reader* from) {
  const bool known = from->Int(0, 1) == 1;
  CopyCosts c;
  for (int64_t* field : {&c.layer.row_work_ps, &c.layer.row_send_ps, &c.layer.row_cross_ps, &c.layer.expert_send_ps,
                         &c.layer.expert_cross_ps, &c.hidden_forward_ps, &c.hidden_backward_ps}) {
    *field = from->Next();
  }
  c.gradient_percent = from->Int(0, 1 << 20);
  c.gather_twice = from->Int(0, 1) == 1;
  return known ? std::optional<CopyCosts>(c) : std::nullopt;
}

ExpertCopies ReadCopies(int ranks, Reader* from) {
  ExpertCopies copies;
  copies.owner = from->Int(0, ranks - 1);
  int last = -1;
  for (int left = from->Int(0, ranks - 1); left > 0; --left) {
    copies.holders.push_back(last = from->Int(last + 1, ranks - 1));
    from->Need(last != copies.owner);
  }
  return copies;
}

// No rank owns more than its share of all layers, or than it owns now.
bool OwnersFit(const OwnerMap& owners, const OwnerMap& now, int ranks) {
  std::vector<int64_t> counts(static_cast<size_t>(ranks)), most(counts);
  int64_t total = 0;
  for (size_t layer = 0; layer < now.size(); ++layer) {
    total += static_cast<int64_t>(now[layer].size());
    for (int owner : now[layer]) ++most[static_cast<size_t>(owner)];
    for (int owner : owners[layer]) ++counts[static_cast<size_t>(owner)];
  }
  for (size_t rank = 0; rank < counts.size(); ++rank) {
    if (counts[rank] > std::max(most[rank], (total + ranks - 1) / ranks)) return false;
  }
  return true;
}

}  // namespace

std::vector<int64_t> ExpertMover::Save() const {
  std::vector<int64_t> state = {kVersion};
  for (const auto& [name, size] : SizesOf(topology_.ranks(), owners_, options_.window)) state.push_back(size);
  state.insert(state.end(), {steps_, static_cast<int64_t>(turn_), room_, move_percent_});
  AppendCosts(costs_, &state);
  for (const ExpertPlacement& layer : placement_) {
    for (const ExpertCopies& copies : layer) {
      state.insert(state.end(), {copies.owner, static_cast<int64_t>(copies.holders.size())});
      state.insert(state.end(), copies.holders.begin(), copies.holders.end());
    }
  }
  for (const absl::Span<const int64_t> step : window_.Recent()) state.insert(state.end(), step.begin(), step.end());
  return state;
}

absl::Status ExpertMover::Restore(absl::Span<const int64_t> saved) {
  Reader from(saved);
  const absl::Status damaged = absl::DataLossError("this is no state of experts that move");
  if (from.Next() != kVersion) return damaged;
  for (const auto& [name, size] : SizesOf(topology_.ranks(), owners_, options_.window)) {
    const int64_t other = from.Next();
    if (!from.ok()) return damaged;
    if (other != size) {
      return absl::FailedPreconditionError(absl::StrCat("it is of ", other, " ", name, ", and here are ", size));
    }
  }
  const int64_t steps = from.Next(), turn = from.Next();
  const int experts = owners_.empty() ? 0 : static_cast<int>(owners_.front().size());
  const int room = from.Int(0, experts), move_percent = from.Int(0, 1 << 20);
  const std::optional<CopyCosts> costs = ReadCosts(&from);
  std::vector<ExpertPlacement> placement = placement_;
  for (ExpertPlacement& layer : placement) {
    for (ExpertCopies& copies : layer) copies = ReadCopies(topology_.ranks(), &from);
  }
  LoadWindow window(static_cast<int>(owners_.size()), topology_.ranks() * experts, options_.window);
  const size_t width = window.Recent().front().size();
  for (int step = 0; step < options_.window; ++step) {
    const absl::Span<const int64_t> rows = from.Take(width);
    if (!from.ok()) return damaged;
    window.Add(rows);
  }
  OwnerMap owners = OwnersOf(placement);
  if (!from.done() || steps < 0 || turn < 0 || !OwnersFit(owners, owners_, topology_.ranks())) return damaged;
  steps_ = steps;
  turn_ = static_cast<size_t>(turn);
  room_ = room;
  move_percent_ = move_percent;
  costs_ = costs;
  owners_ = std::move(owners);
  placement_ = std::move(placement);
  window_ = std::move(window);
  return absl::OkStatus();
}

}  // namespace shoal
