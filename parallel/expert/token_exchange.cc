#include "parallel/expert/token_exchange.h"

#include <algorithm>
#include <numeric>

namespace shoal {

TokenExchange::TokenExchange(Communicator& group, int experts) : group_(&group), experts_(experts) {}

absl::StatusOr<TokenExchange::Plan> TokenExchange::MakePlan(const Tensor& counts) {
  const int ranks = group_->size();
  Plan plan;
  plan.sent = std::accumulate(counts.span<int64_t>().begin(), counts.span<int64_t>().end(), int64_t{0});
  const Range mine = local_experts();
  Tensor incoming = counts;
  if (ranks > 1) {
    std::vector<int64_t> send_counts, receive_counts(static_cast<size_t>(ranks), mine.count);
    for (int i = 0; i < ranks; ++i) send_counts.push_back(EvenPart(experts_, ranks, i).count);
    incoming = Empty({ranks * mine.count}, DType::kI64);
    SHOAL_RETURN_IF_ERROR(
        group_->AllToAll(counts, send_counts, incoming, receive_counts, {.label = "expert counts"}).Await(),
        "exchanging expert counts");
  }
  for (int i = 0; i < ranks; ++i) {
    const Range theirs = EvenPart(experts_, ranks, i);
    const int64_t* outgoing = counts.data<int64_t>() + theirs.begin;
    plan.send_rows.push_back(std::accumulate(outgoing, outgoing + theirs.count, int64_t{0}));
    const int64_t before = plan.arrived;
    for (int64_t e = 0; e < mine.count; ++e) {
      const int64_t rows = incoming.data<int64_t>()[i * mine.count + e];
      if (rows > 0) plan.segments.push_back({static_cast<int>(e), plan.arrived, rows});
      plan.arrived += rows;
    }
    plan.receive_rows.push_back(plan.arrived - before);
  }
  return plan;
}

absl::StatusOr<Tensor> TokenExchange::SendBuffer(Use use, int64_t rows, int64_t width, DType dtype) {
  if (group_->size() == 1) return Empty({rows, width}, dtype);
  Tensor& buffer = buffers_[static_cast<size_t>(use)];
  const int64_t bytes = rows * width * SizeOf(dtype);
  if (buffer.bytes() < bytes) {
    buffer = Tensor();
    SHOAL_ASSIGN_OR_RETURN(buffer, group_->Allocate({bytes + bytes / 4}, DType::kU8), "buffer for expert rows");
  }
  return Tensor(buffer.raw(), {rows, width}, dtype);
}

absl::StatusOr<Tensor> TokenExchange::Dispatch(const Plan& plan, const Tensor& rows) {
  return Exchange(rows, plan.send_rows, plan.receive_rows, plan.arrived, "dispatch");
}

absl::StatusOr<Tensor> TokenExchange::Return(const Plan& plan, const Tensor& rows) {
  return Exchange(rows, plan.receive_rows, plan.send_rows, plan.sent, "combine");
}

absl::StatusOr<Tensor> TokenExchange::Exchange(const Tensor& rows, const std::vector<int64_t>& send,
                                               const std::vector<int64_t>& receive, int64_t arriving, const char* label) {
  if (group_->size() == 1) return rows;
  const int64_t width = rows.dim(1);
  std::vector<int64_t> send_counts, receive_counts;
  for (int64_t count : send) send_counts.push_back(count * width);
  for (int64_t count : receive) receive_counts.push_back(count * width);
  Tensor out = Empty({arriving, width}, rows.dtype());
  SHOAL_RETURN_IF_ERROR(group_->AllToAll(rows, send_counts, out, receive_counts, {.label = label}).Await(), label);
  return out;
}

}  // namespace shoal
