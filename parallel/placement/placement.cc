#include "parallel/placement/placement.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

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

absl::Status CheckLayout(const Layout& layout) {
  if (layout.ranks >= 1 && layout.expert >= 1 && layout.ranks % layout.expert == 0 && layout.expert <= layout.experts) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrFormat(
      "expert groups of %d ranks do not fit %d ranks and %d experts; sizes that fit: %s", layout.expert, layout.ranks,
      layout.experts, FittingExpertSizes(layout.ranks, layout.experts)));
}

}  // namespace shoal
