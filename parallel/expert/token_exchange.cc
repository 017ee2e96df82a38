#include "parallel/expert/token_exchange.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {
namespace {

using Run = DispatchPlan::Run;

int64_t RowsOf(const std::vector<Run>& runs) {
  int64_t rows = 0;
  for (const Run& run : runs) rows += run.rows;
  return rows;
}

// One range from the first run on, in order?
bool Contiguous(const std::vector<Run>& runs) {
  for (size_t i = 1; i < runs.size(); ++i) {
    if (runs[i].begin != runs[i - 1].begin + runs[i - 1].rows) return false;
  }
  return true;
}

Tensor Staging(Tensor* staging, int64_t rows, const Tensor& like, Stream& stream) {
  const int64_t bytes = rows * like.dim(1) * SizeOf(like.dtype());
  if (staging->bytes() < bytes) *staging = Empty({bytes + bytes / 4}, DType::kU8, stream);
  return Tensor(staging->raw(), {rows, like.dim(1)}, like.dtype());
}

void CopyRows(const Tensor& from, int64_t from_row, const Tensor& to, int64_t to_row, int64_t rows, Stream& stream) {
  Copy(from.Rows(from_row, rows), to.Rows(to_row, rows), stream);
}

std::vector<int64_t> CountsOf(const std::vector<Run>& runs, const std::vector<int>& members, int64_t width) {
  std::vector<int64_t> counts(members.size(), 0);
  for (const Run& run : runs) {
    const auto member = std::lower_bound(members.begin(), members.end(), run.peer);
    SHOAL_CHECK(member != members.end() && *member == run.peer) << "rank " << run.peer << " is not on this lane";
    counts[static_cast<size_t>(member - members.begin())] += run.rows * width;
  }
  return counts;
}

}  // namespace

TokenExchange::TokenExchange(Communicator* inter, Communicator* intra, const Topology& topology, int rank, Streams streams)
    : any_(inter != nullptr ? inter : intra) {
  for (size_t lane = 0; lane < lanes_.size(); ++lane) {
    lanes_[lane].stream = streams[lane] != nullptr ? std::move(streams[lane]) : std::make_unique<Stream>();
  }
  lanes_[0].group = intra;
  lanes_[0].members = topology.RanksOf(topology.HostOf(rank));
  lanes_[1].group = inter;
  for (int peer = 0; peer < topology.ranks(); ++peer) lanes_[1].members.push_back(peer);
}

absl::StatusOr<Tensor> TokenExchange::SendBuffer(Use use, int wave, int64_t rows, int64_t width, DType dtype) {
  if (any_ == nullptr) return Empty({rows, width}, dtype);
  if (buffers_.size() <= static_cast<size_t>(wave)) buffers_.resize(static_cast<size_t>(wave) + 1);
  Tensor& buffer = buffers_[static_cast<size_t>(wave)][static_cast<size_t>(use)];
  const int64_t bytes = rows * width * SizeOf(dtype);
  if (buffer.bytes() < bytes) {
    buffer = Tensor();
    SHOAL_ASSIGN_OR_RETURN(buffer, any_->Allocate({bytes + bytes / 4}, DType::kU8), "buffer for expert rows");
  }
  return Tensor(buffer.raw(), {rows, width}, dtype);
}

Tensor TokenExchange::Collect(LaneState* lane, const std::vector<Run>& runs, const Tensor& rows) {
  if (runs.empty()) return rows.Rows(0, 0);
  if (Contiguous(runs)) return rows.Rows(runs.front().begin, RowsOf(runs));
  const Tensor staged = Staging(&lane->staged_out, RowsOf(runs), rows, *lane->stream);
  int64_t at = 0;
  for (const Run& run : runs) {
    CopyRows(rows, run.begin, staged, at, run.rows, *lane->stream);
    at += run.rows;
  }
  return staged;
}

absl::StatusOr<int64_t> TokenExchange::Travel(const DispatchPlan& plan, const Chunk& chunk, Lane lane, const Tensor& from,
                                              const Tensor& to) {
  LaneState& state = lanes_[lane == Lane::kInter ? 1 : 0];
  if (state.group == nullptr || plan.all_stay()) return 0;
  const auto route = lane == Lane::kInter ? DispatchPlan::Route::kInter : DispatchPlan::Route::kIntra;
  const bool there = chunk.way == Way::kThere;
  const std::vector<Run> out = plan.Runs(chunk.direction, chunk.index, route, /*sends=*/there);
  const std::vector<Run> in = plan.Runs(chunk.direction, chunk.index, route, /*sends=*/!there);
  const int64_t width = from.dim(1);
  const bool in_place = Contiguous(in);
  const Tensor sent = Collect(&state, out, from);
  const Tensor received = in_place ? to.Rows(in.empty() ? 0 : in.front().begin, RowsOf(in))
                                   : Staging(&state.staged_in, RowsOf(in), to, *state.stream);
  SHOAL_RETURN_IF_ERROR(state.stream->Wait());
  SHOAL_RETURN_IF_ERROR(
      state.group
          ->AllToAll(sent, CountsOf(out, state.members, width), received, CountsOf(in, state.members, width),
                     {.label = there ? "dispatch" : "combine"})
          .Await(),
      there ? "dispatching rows" : "returning rows");
  int64_t at = 0;
  for (const Run& run : in) {
    if (!in_place) CopyRows(received, at, to, run.begin, run.rows, *state.stream);
    at += run.rows;
  }
  SHOAL_RETURN_IF_ERROR(state.stream->Wait());
  return std::max(sent.bytes(), received.bytes());
}

int64_t TokenExchange::Stay(const DispatchPlan& plan, const Chunk& chunk, const Tensor& from, const Tensor& to,
                            Stream& stream) const {
  if (plan.all_stay()) return 0;
  const bool there = chunk.way == Way::kThere;
  const std::vector<Run> out = plan.Runs(chunk.direction, chunk.index, DispatchPlan::Route::kStay, /*sends=*/there);
  const std::vector<Run> in = plan.Runs(chunk.direction, chunk.index, DispatchPlan::Route::kStay, /*sends=*/!there);
  // The same rows on both sides, cut differently where chunks differ.
  size_t i = 0, j = 0;
  int64_t done_out = 0, done_in = 0, rows = 0;
  while (i < out.size() && j < in.size()) {
    const int64_t count = std::min(out[i].rows - done_out, in[j].rows - done_in);
    CopyRows(from, out[i].begin + done_out, to, in[j].begin + done_in, count, stream);
    rows += count;
    if ((done_out += count) == out[i].rows) ++i, done_out = 0;
    if ((done_in += count) == in[j].rows) ++j, done_in = 0;
  }
  return rows * from.dim(1) * SizeOf(from.dtype());
}

}  // namespace shoal
