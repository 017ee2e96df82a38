// The rows of one pass of a layer of experts: how many there are, which of them a chunk has, and products of them with matrices of
// experts. Hides who planned them: the host, from the counts of all ranks; or the stream, from this rank's choices alone
// (RoutedTokens::segments). The host never learns the counts of the latter, so all of them are one chunk, and stay.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "models/layers/projection.h"
#include "models/routers/router.h"
#include "parallel/expert/dispatch_plan.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

class ExpertRows {
 public:
  using Direction = DispatchPlan::Direction;
  using Run = DispatchPlan::Run;

  explicit ExpertRows(DispatchPlan plan) : plan_(std::move(plan)), sent_(plan_->sent()), arrived_(plan_->arrived()) {}
  // Ordered by the stream: routed.segments.
  explicit ExpertRows(const RoutedTokens& routed)
      : segments_(routed.segments), sent_(routed.expert.elements()), arrived_(sent_) {}

  int64_t sent() const { return sent_; }        // Of this rank's tokens, S.
  int64_t arrived() const { return arrived_; }  // Of this rank's experts, R.
  bool all_stay() const { return !plan_.has_value() || plan_->all_stay(); }
  // Rows that the stream ordered have one chunk: of the others there is nothing to do.
  bool IsEmpty(int chunk) const { return !plan_.has_value() && chunk > 0; }
  int chunks(Direction direction) const {
    if (!plan_.has_value()) return 1;
    return direction == Direction::kForward ? plan_->forward_chunks() : plan_->backward_chunks();
  }
  // As DispatchPlan::Rows.
  std::vector<Run> Rows(Direction direction, int chunk, bool sends) const {
    if (plan_.has_value()) return plan_->Rows(direction, chunk, sends);
    if (chunk > 0) return {};
    return {{.peer = 0, .begin = 0, .rows = sent_}};
  }
  // Rows of experts of a backward chunk.
  int64_t Count(int chunk) const {
    int64_t rows = 0;
    for (const Run& run : Rows(Direction::kBackward, chunk, /*sends=*/false)) rows += run.rows;
    return rows;
  }
  // CHECKs that the host made one: where rows travel, and where a pass has several chunks.
  const DispatchPlan& plan() const {
    SHOAL_CHECK(plan_.has_value()) << "the stream ordered these rows";
    return *plan_;
  }

  // y = x w^T for the run of a forward chunk; x and y are its rows.
  void Forward(ExpertProjection& projection, int chunk, const Run& run, const Tensor& x, absl::Span<const Tensor> weights, const Tensor& y,
               Numerics numerics, Stream& stream) const {
    if (!plan_.has_value()) return projection.Forward(x, weights, segments_, y, stream);
    projection.Forward(x, weights, SegmentsOf(chunk, run), y, stream, numerics);
  }
  // gate_up = x w^T likewise, and h of it (kernels/swiglu.h).
  void ForwardSwiGlu(ExpertProjection& projection, int chunk, const Run& run, const Tensor& x, absl::Span<const Tensor> weights,
                     const Tensor& gate_up, const Tensor& h, Numerics numerics, Stream& stream) const {
    if (!plan_.has_value()) return projection.ForwardSwiGlu(x, weights, segments_, gate_up, h, stream);
    projection.ForwardSwiGlu(x, weights, SegmentsOf(chunk, run), gate_up, h, stream, numerics);
  }
  // dx = dy w for a backward chunk of all rows.
  void BackwardInput(ExpertProjection& projection, int chunk, const Tensor& dy, absl::Span<const Tensor> weights, const Tensor& dx,
                     Numerics numerics, Stream& stream) const {
    if (!plan_.has_value()) return projection.BackwardInput(dy, weights, segments_, dx, stream);
    projection.BackwardInput(dy, weights, plan_->Segments(Direction::kBackward, chunk), dx, stream, numerics);
  }
  // gradients (+)= dy^T x of a backward chunk of all rows. `list`: of such gradients.
  void BackwardWeight(int chunk, const Tensor& dy, const Tensor& x, kernels::Accumulate accumulate, absl::Span<const Tensor> gradients,
                      KeptMatrixList* list, Stream& stream) const {
    if (!plan_.has_value()) {
      return kernels::GroupedMatMulGradWeight(dy, x, segments_, accumulate, list->Of(gradients, stream), stream);
    }
    kernels::GroupedMatMulGradWeight(dy, x, plan_->Segments(Direction::kBackward, chunk), accumulate, gradients, stream);
  }

 private:
  // Of a run of a forward chunk, counted from its first row.
  std::vector<kernels::Segment> SegmentsOf(int chunk, const Run& run) const {
    std::vector<kernels::Segment> segments = plan_->Segments(Direction::kForward, chunk);
    for (kernels::Segment& segment : segments) segment.begin -= run.begin;
    return segments;
  }

  std::optional<DispatchPlan> plan_;
  Tensor segments_;  // Without a plan.
  int64_t sent_ = 0, arrived_ = 0;
};

}  // namespace shoal
