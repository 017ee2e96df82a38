#include "launch/trainer/rank_values.h"

#include "runtime/base/status.h"

namespace shoal {

absl::StatusOr<std::vector<int64_t>> GatherValues(Communicator& world, int64_t value, std::string_view label) {
  const Tensor own = Empty({1}, DType::kI64), all = Empty({world.size()}, DType::kI64);
  own.data<int64_t>()[0] = value;
  const std::vector<int64_t> counts(static_cast<size_t>(world.size()), 1);
  SHOAL_RETURN_IF_ERROR(world.AllGather(own, counts, all, {.label = label}).Await());
  return std::vector<int64_t>(all.span<int64_t>().begin(), all.span<int64_t>().end());
}

}  // namespace shoal
