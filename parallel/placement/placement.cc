#include "parallel/placement/placement.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

std::string FittingExpertSizes(int ranks, int experts) {
  std::vector<int> fitting;
  for (int size = 1; size <= std::min(ranks, experts); ++size) {
    if (ranks % size == 0) fitting.push_back(size);
  }
  return absl::StrJoin(fitting, ", ");
}

}  // namespace

Range EvenPart(int64_t total, int parts, int index) {
  const int64_t base = total / parts, extra = total % parts;
  return {index * base + std::min<int64_t>(index, extra), base + (index < extra ? 1 : 0)};
}

std::vector<int> ContiguousPartition(absl::Span<const int64_t> sizes, int parts) {
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  std::vector<int> piece(sizes.size(), 0);
  int64_t before = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    // The piece in whose equal share of the total the middle of this element falls.
    const double middle = static_cast<double>(before) + static_cast<double>(sizes[i]) / 2;
    const int wanted = total == 0 ? 0 : static_cast<int>(middle * parts / static_cast<double>(total));
    piece[i] = std::min(wanted, parts - 1);
    before += sizes[i];
  }
  return piece;
}

absl::StatusOr<Placement> Placement::Make(absl::Span<const BlockShape> blocks, const Layout& layout) {
  if (layout.ranks < 1 || layout.expert < 1 || layout.ranks % layout.expert != 0 || layout.expert > layout.experts) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "expert groups of %d ranks do not fit %d ranks and %d experts; sizes that fit: %s", layout.expert, layout.ranks,
        layout.experts, FittingExpertSizes(layout.ranks, layout.experts)));
  }
  Placement placement;
  placement.layout_ = layout;
  placement.owner_.resize(blocks.size());
  for (const BlockShape& block : blocks) {
    SHOAL_CHECK_LT(block.expert, layout.experts);
    placement.expert_of_block_.push_back(block.expert);
  }
  // One list per flat buffer: the dense blocks, and the expert blocks of each place in an expert group.
  for (int place = -1; place < layout.expert; ++place) {
    const Range experts = place < 0 ? Range{-1, 1} : EvenPart(layout.experts, layout.expert, place);
    std::vector<int> members;
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i].expert < experts.begin || blocks[i].expert >= experts.begin + experts.count) continue;
      members.push_back(static_cast<int>(i));
      sizes.push_back(blocks[i].elements);
    }
    const std::vector<int> piece = ContiguousPartition(sizes, place < 0 ? layout.ranks : layout.ranks / layout.expert);
    for (size_t i = 0; i < members.size(); ++i) placement.owner_[static_cast<size_t>(members[i])] = piece[i];
  }
  return placement;
}

Rank Placement::OwnerFor(int block, Rank rank) const {
  const size_t at = static_cast<size_t>(block);
  if (expert_of_block_[at] < 0) return Rank{owner_[at]};
  return Rank{owner_[at] * layout_.expert + Index(rank) % layout_.expert};
}

bool Placement::Materialised(int block, Rank rank) const {
  const int expert = expert_of_block_[static_cast<size_t>(block)];
  if (expert < 0) return true;
  const Range mine = ExpertsOf(rank);
  return expert >= mine.begin && expert < mine.begin + mine.count;
}

Range Placement::ExpertsOf(Rank rank) const {
  return EvenPart(layout_.experts, layout_.expert, Index(rank) % layout_.expert);
}

std::vector<int> Placement::ExpertGroup(Rank rank) const {
  std::vector<int> group(static_cast<size_t>(layout_.expert));
  std::iota(group.begin(), group.end(), Index(rank) / layout_.expert * layout_.expert);
  return group;
}

std::vector<int> Placement::ReplicaGroup(Rank rank) const {
  std::vector<int> group;
  for (int member = Index(rank) % layout_.expert; member < layout_.ranks; member += layout_.expert) group.push_back(member);
  return group;
}

std::string Placement::DebugString(absl::Span<const BlockShape> blocks) const {
  std::string text;
  for (int r = 0; r < layout_.ranks; ++r) {
    const Rank rank{r};
    int64_t held = 0, owned = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int block = static_cast<int>(i);
      if (!Materialised(block, rank)) continue;
      held += blocks[i].elements;
      if (OwnerFor(block, rank) == rank) owned += blocks[i].elements;
    }
    const Range experts = ExpertsOf(rank);
    absl::StrAppendFormat(&text, "rank %d: experts %d to %d, holds %d parameters, owns the state of %d\n", r, experts.begin,
                          experts.begin + experts.count - 1, held, owned);
  }
  return text;
}

}  // namespace shoal
