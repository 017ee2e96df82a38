#include "models/optimizer/expert_partials.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {

void ExpertPartials::Begin(int layer, const ExpertPlacement& placement, absl::Span<const std::vector<DispatchShare>> shares) {
  SHOAL_CHECK_EQ(shares.size(), static_cast<size_t>(group_->size())) << "sources of layer " << layer;
  std::vector<Partial>& partials = layers_[static_cast<size_t>(layer)];
  SHOAL_CHECK(partials.empty()) << "partials of layer " << layer << " were not collected";
  for (size_t source = 0; source < shares.size(); ++source) {
    for (const DispatchShare& share : shares[source]) {
      const ExpertCopies& expert = placement[static_cast<size_t>(share.expert)];
      if (!expert.holders.empty()) partials.push_back({static_cast<int>(source), share.expert, share.rank, expert.owner, {}});
    }
  }
}

void ExpertPartials::Keep(int layer, int expert, int source, Tensor partial) {
  std::vector<Partial>& partials = layers_[static_cast<size_t>(layer)];
  const auto found = std::lower_bound(partials.begin(), partials.end(), std::make_pair(source, expert),
                                      [](const Partial& a, const std::pair<int, int>& b) {
                                        return std::make_pair(a.source, a.expert) < b;
                                      });
  SHOAL_CHECK(found != partials.end() && found->source == source && found->expert == expert && found->rank == group_->index())
      << "rows of rank " << source << " for expert " << expert << " of layer " << layer << " are not computed here";
  found->gradient = std::move(partial);
}

absl::StatusOr<int64_t> ExpertPartials::Collect(int layer, Stream& stream,
                                                const std::function<void(int expert, const Tensor& partial)>& add) {
  const int self = group_->index();
  std::vector<Partial>& partials = layers_[static_cast<size_t>(layer)];
  std::vector<SparseMove> moves;
  std::vector<Tensor> chunks;
  int64_t sent = 0, received = 0;
  for (Partial& partial : partials) {
    if (partial.rank == partial.owner) continue;
    if (partial.owner == self) partial.gradient = Empty({elements_}, DType::kF32, stream);
    sent += partial.rank == self ? 1 : 0;
    received += partial.owner == self ? 1 : 0;
    moves.push_back({static_cast<int>(chunks.size()), partial.rank, {partial.owner}});
    chunks.push_back(partial.rank == self || partial.owner == self ? partial.gradient : Tensor());
  }
  SHOAL_RETURN_IF_ERROR(stream.status());
  if (!moves.empty()) {
    SHOAL_RETURN_IF_ERROR(group_->SparseAllGather(chunks, moves, {.label = "expert gradients"}).Await(),
                          "collecting gradients of experts");
  }
  for (const Partial& partial : partials) {
    if (partial.owner == self) add(partial.expert, partial.gradient);
  }
  partials.clear();
  return std::max(sent, received) * elements_ * SizeOf(DType::kF32);
}

}  // namespace shoal
