// Who sends which rows to whom in one expert layer, and where they lie. Pure.
//
// Rows are (token, expert) pairs. Tokens of a rank are cut into pieces (EvenPart), in order; a chunk of the pipeline is a run of
// pieces, and the forward and the backward pass may have different numbers of chunks. On both sides rows lie by forward chunk, then
// by peer (ranks of other hosts, the other ranks of this host, this rank; each ascending), then by piece, then by expert, then by
// token. So what a forward chunk sends or receives on one lane is contiguous; a backward chunk is a list of runs.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/dispatch.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

struct DispatchOptions {
  int rank = 0;
  int forward_chunks = 1, backward_chunks = 1;
  DispatchRule rule = DispatchRule::kNearest;
};

// Pieces that both numbers of chunks divide.
int PiecesFor(int forward_chunks, int backward_chunks);

class DispatchPlan {
 public:
  // A contiguous range of rows that goes to or comes from one peer.
  struct Run {
    int peer = 0;
    int64_t begin = 0, rows = 0;
  };

  // rows: of every rank, piece and expert, [ranks, pieces, experts] row-major, pieces = PiecesFor(...). `local`: the experts of
  // `placement` that are on this rank, ascending; segments count experts by their index there.
  static DispatchPlan Make(const Topology& topology, const ExpertPlacement& placement, absl::Span<const int> local,
                           absl::Span<const int64_t> rows, const DispatchOptions& options);

  int pieces() const { return pieces_; }
  int forward_chunks() const { return options_.forward_chunks; }
  int backward_chunks() const { return options_.backward_chunks; }
  int64_t sent() const { return sent_; }          // Rows of this rank's tokens, S.
  int64_t arrived() const { return arrived_; }    // Rows of this rank's experts, R.
  // No row of any rank leaves it: what arrives is what was sent.
  bool all_stay() const { return all_stay_; }

  // The order of this rank's rows, of pairs that the host need not know: the shares of kernels::OrderByShares, in host memory.
  Tensor Shares() const;
  // The same order of a list of pairs by token, some of which may have less than others (offset_T1, expert_S: i32): slot_S (i32), the row
  // of each pair, and token_S (i32), the token of each row.
  void OrderRows(const Tensor& offset, const Tensor& expert, const Tensor& slot, const Tensor& token) const;

  enum class Direction : uint8_t { kForward, kBackward };
  // Runs of a chunk that travel on one lane, in the order of peers and pieces; neighbours are joined. `sends`: of the S rows that
  // leave, otherwise of the R rows that arrive.
  enum class Route : uint8_t { kInter, kIntra, kStay };
  std::vector<Run> Runs(Direction direction, int chunk, Route route, bool sends) const;
  // Rows of a chunk among the S and the R ones, all routes, as runs without regard to peers.
  std::vector<Run> Rows(Direction direction, int chunk, bool sends) const;
  // Of the R rows, one segment per source, piece and expert with rows.
  std::vector<kernels::Segment> Segments(Direction direction, int chunk) const;
  // Those of one source, ascending by expert and piece.
  std::vector<kernels::Segment> SegmentsFrom(int source) const;
  // What every source sends where, as SplitTokens says. Known with one piece and a rule that IsWhole; else empty.
  const std::vector<std::vector<DispatchShare>>& shares() const { return shares_; }

 private:
  struct Piece {             // One peer's rows in one piece.
    int peer = 0, piece = 0;
    int64_t begin = 0, rows = 0;
    std::vector<DispatchShare> shares;  // By expert; of arriving pieces `expert` is the index among local ones.
  };
  Route RouteTo(int peer) const;
  // The index in sends_ and receives_ of what goes to or comes from the peer at `place` of the order of peers.
  size_t IndexOf(int place, int piece) const;
  template <typename Visit> void ForEachPiece(Direction direction, int chunk, bool sends, const Visit& visit) const;

  Topology topology_;
  DispatchOptions options_;
  int pieces_ = 1;
  int64_t experts_ = 0;
  int64_t sent_ = 0, arrived_ = 0;
  bool all_stay_ = true;
  std::vector<Piece> sends_, receives_;  // In the order of rows.
  std::vector<std::vector<DispatchShare>> shares_;
};

}  // namespace shoal
