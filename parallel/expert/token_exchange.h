// Expert parallelism's all-to-all: rows of tokens travel to the ranks that hold their experts, and results come back
// (Lepikhin et al., 2020, "GShard", arXiv 2006.16668). With one rank everything stays where it is.
//
// S rows of this rank, sorted by expert; R rows that arrive here, sorted by (source rank, expert). Calls are collective over
// the expert group and block. Not thread-safe.
#pragma once

#include <memory>
#include <vector>

#include "collectives/communicator.h"
#include "parallel/placement/placement.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

class TokenExchange {
 public:
  // Borrows `group` for life: the expert group, in which this rank holds `experts_of(i)` of `experts` on index i.
  TokenExchange(Communicator& group, int experts);

  // Who sends how many rows, agreed for one batch of routed tokens.
  struct Plan {
    std::vector<int64_t> send_rows, receive_rows;  // Per rank of the group.
    std::vector<kernels::Segment> segments;        // Of the R rows; experts count from this rank's first.
    int64_t sent = 0, arrived = 0;                 // S and R.
  };
  // counts_E (i64): this rank's rows per expert. ABORTED: the epoch is over.
  absl::StatusOr<Plan> MakePlan(const Tensor& counts);

  // A buffer for rows about to be given to Dispatch or Return: peers read it in place. Valid until the next call of this
  // function with the same `use`; with one rank it is fresh memory.
  enum class Use : uint8_t { kDispatch = 0, kReturn = 1 };
  absl::StatusOr<Tensor> SendBuffer(Use use, int64_t rows, int64_t width, DType dtype);

  // [S, D] -> [R, D], and back. With one rank the tensor itself.
  absl::StatusOr<Tensor> Dispatch(const Plan& plan, const Tensor& rows);
  absl::StatusOr<Tensor> Return(const Plan& plan, const Tensor& rows);

  Range local_experts() const { return EvenPart(experts_, group_->size(), group_->index()); }

 private:
  absl::StatusOr<Tensor> Exchange(const Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                                  int64_t arriving, const char* label);

  Communicator* group_;
  int experts_;
  Tensor buffers_[2];  // Raw bytes in communicator memory, one for each Use.
};

}  // namespace shoal
