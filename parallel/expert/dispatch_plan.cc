#include "parallel/expert/dispatch_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "parallel/placement/placement.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

// Ranks of other hosts, the other ranks of this host, this rank.
std::vector<int> PeerOrder(const Topology& topology, int self) {
  std::vector<int> remote, here;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    if (rank == self) continue;
    (topology.HostOf(rank) == topology.HostOf(self) ? here : remote).push_back(rank);
  }
  remote.insert(remote.end(), here.begin(), here.end());
  remote.push_back(self);
  return remote;
}

}  // namespace

int PiecesFor(int forward_chunks, int backward_chunks) { return std::lcm(forward_chunks, backward_chunks); }

DispatchPlan DispatchPlan::Make(const Topology& topology, const ExpertPlacement& placement, absl::Span<const int> local,
                                absl::Span<const int64_t> rows, const DispatchOptions& options) {
  DispatchPlan plan;
  plan.topology_ = topology;
  plan.options_ = options;
  plan.pieces_ = PiecesFor(options.forward_chunks, options.backward_chunks);
  plan.experts_ = static_cast<int64_t>(placement.size());
  const size_t ranks = static_cast<size_t>(topology.ranks()), experts = placement.size();
  const size_t pieces = static_cast<size_t>(plan.pieces_);
  SHOAL_CHECK_EQ(rows.size(), ranks * pieces * experts);
  std::vector<int> index_of(experts, -1);
  for (size_t i = 0; i < local.size(); ++i) index_of[static_cast<size_t>(local[i])] = static_cast<int>(i);

  // By piece and peer, before they are put in order.
  std::vector<std::vector<Piece>> sends(pieces, std::vector<Piece>(ranks)), receives = sends;
  std::vector<int64_t> of_piece(ranks * experts);
  for (size_t piece = 0; piece < pieces; ++piece) {
    for (size_t rank = 0; rank < ranks; ++rank) {
      std::copy_n(rows.begin() + static_cast<ptrdiff_t>((rank * pieces + piece) * experts), experts,
                  of_piece.begin() + static_cast<ptrdiff_t>(rank * experts));
    }
    std::vector<std::vector<DispatchShare>> shares = SplitTokens(options.rule, topology, placement, of_piece);
    for (size_t source = 0; source < ranks; ++source) {
      for (DispatchShare share : shares[source]) {
        plan.all_stay_ = plan.all_stay_ && share.rank == static_cast<int>(source);
        if (static_cast<int>(source) == options.rank) {
          Piece& to = sends[piece][static_cast<size_t>(share.rank)];
          to.rows += share.rows;
          to.shares.push_back(share);
        }
        if (share.rank != options.rank) continue;
        Piece& from = receives[piece][source];
        from.rows += share.rows;
        share.expert = index_of[static_cast<size_t>(share.expert)];
        SHOAL_CHECK_GE(share.expert, 0) << "rows for an expert that is not here";
        from.shares.push_back(share);
      }
    }
    if (pieces == 1 && IsWhole(options.rule)) plan.shares_ = std::move(shares);
  }
  const std::vector<int> peers = PeerOrder(topology, options.rank);
  const int pieces_of_chunk = plan.pieces_ / options.forward_chunks;
  for (int chunk = 0; chunk < options.forward_chunks; ++chunk) {
    for (int peer : peers) {
      for (int piece = chunk * pieces_of_chunk; piece < (chunk + 1) * pieces_of_chunk; ++piece) {
        const auto place = [&](std::vector<std::vector<Piece>>& from, int64_t* total, std::vector<Piece>* to) {
          Piece& rows_of_peer = from[static_cast<size_t>(piece)][static_cast<size_t>(peer)];
          rows_of_peer.peer = peer;
          rows_of_peer.piece = piece;
          rows_of_peer.begin = *total;
          *total += rows_of_peer.rows;
          to->push_back(std::move(rows_of_peer));
        };
        place(sends, &plan.sent_, &plan.sends_);
        place(receives, &plan.arrived_, &plan.receives_);
      }
    }
  }
  SHOAL_CHECK_LE(plan.sent_, std::numeric_limits<int32_t>::max()) << "rows of one layer and wave: orders of rows are i32";
  return plan;
}

Tensor DispatchPlan::Shares() const {
  struct Share {
    int64_t end, shift;
  };
  std::vector<std::vector<Share>> shares(static_cast<size_t>(pieces_ * experts_));  // By piece and expert.
  int64_t count = 0;
  for (int piece = 0; piece < pieces_; ++piece) {
    for (int place = 0; place < topology_.ranks(); ++place) {
      const Piece& to = sends_[IndexOf(place, piece)];
      int64_t at = to.begin;
      for (const DispatchShare& share : to.shares) {
        std::vector<Share>& of_expert = shares[static_cast<size_t>(piece * experts_ + share.expert)];
        const int64_t before = of_expert.empty() ? 0 : of_expert.back().end;
        of_expert.push_back({before + share.rows, at - before});
        at += share.rows;
        ++count;
      }
    }
  }
  const Tensor list = Empty({pieces_ * experts_ + 1 + 2 * count}, DType::kI32);
  int32_t *first = list.data<int32_t>(), *next = first + pieces_ * experts_ + 1;
  *first = 0;
  for (const std::vector<Share>& of_expert : shares) {
    for (const Share& share : of_expert) {
      *next++ = static_cast<int32_t>(share.end);
      *next++ = static_cast<int32_t>(share.shift);
    }
    first[1] = *first + static_cast<int32_t>(of_expert.size());
    ++first;
  }
  return list;
}

void DispatchPlan::OrderRows(const Tensor& offset, const Tensor& expert, const Tensor& slot, const Tensor& token) const {
  SHOAL_CHECK(expert.elements() == sent_ && slot.elements() == sent_ && token.elements() == sent_);
  const Tensor shares = Shares();
  const int32_t *first = shares.data<int32_t>(), *share = first + pieces_ * experts_ + 1;
  const int64_t tokens = offset.elements() - 1;
  std::vector<int32_t> next(static_cast<size_t>(experts_));
  for (int piece = 0; piece < pieces_; ++piece, first += experts_) {
    std::fill(next.begin(), next.end(), 0);
    const Range range = EvenPart(tokens, pieces_, piece);
    for (int64_t t = range.begin; t < range.begin + range.count; ++t) {
      for (int32_t pair = offset.data<int32_t>()[t]; pair < offset.data<int32_t>()[t + 1]; ++pair) {
        const int32_t e = expert.data<int32_t>()[pair], number = next[static_cast<size_t>(e)]++;
        int64_t of = first[e];
        while (number >= share[2 * of]) ++of;
        const int32_t row = number + share[2 * of + 1];
        slot.data<int32_t>()[pair] = row;
        token.data<int32_t>()[row] = static_cast<int32_t>(t);
      }
    }
  }
}

DispatchPlan::Route DispatchPlan::RouteTo(int peer) const {
  if (peer == options_.rank) return Route::kStay;
  return topology_.HostOf(peer) == topology_.HostOf(options_.rank) ? Route::kIntra : Route::kInter;
}

size_t DispatchPlan::IndexOf(int place, int piece) const {
  const int of_chunk = pieces_ / options_.forward_chunks, chunk = piece / of_chunk;
  return (static_cast<size_t>(chunk) * static_cast<size_t>(topology_.ranks()) + static_cast<size_t>(place)) *
             static_cast<size_t>(of_chunk) +
         static_cast<size_t>(piece % of_chunk);
}

// Those with rows, in the order of peers, then of pieces.
template <typename Visit> void DispatchPlan::ForEachPiece(Direction direction, int chunk, bool sends, const Visit& visit) const {
  const int size = pieces_ / (direction == Direction::kForward ? options_.forward_chunks : options_.backward_chunks);
  for (int place = 0; place < topology_.ranks(); ++place) {
    for (int piece = chunk * size; piece < (chunk + 1) * size; ++piece) {
      const Piece& found = (sends ? sends_ : receives_)[IndexOf(place, piece)];
      if (found.rows > 0) visit(found);
    }
  }
}

std::vector<DispatchPlan::Run> DispatchPlan::Runs(Direction direction, int chunk, Route route, bool sends) const {
  std::vector<Run> runs;
  ForEachPiece(direction, chunk, sends, [&](const Piece& piece) {
    if (RouteTo(piece.peer) != route) return;
    if (!runs.empty() && runs.back().peer == piece.peer && runs.back().begin + runs.back().rows == piece.begin) {
      runs.back().rows += piece.rows;
    } else {
      runs.push_back({piece.peer, piece.begin, piece.rows});
    }
  });
  return runs;
}

std::vector<DispatchPlan::Run> DispatchPlan::Rows(Direction direction, int chunk, bool sends) const {
  std::vector<Run> pieces, runs;
  ForEachPiece(direction, chunk, sends, [&](const Piece& piece) { pieces.push_back({-1, piece.begin, piece.rows}); });
  std::sort(pieces.begin(), pieces.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  for (const Run& piece : pieces) {
    if (!runs.empty() && runs.back().begin + runs.back().rows == piece.begin) {
      runs.back().rows += piece.rows;
    } else {
      runs.push_back(piece);
    }
  }
  return runs;
}

std::vector<kernels::Segment> DispatchPlan::Segments(Direction direction, int chunk) const {
  std::vector<kernels::Segment> segments;
  ForEachPiece(direction, chunk, /*sends=*/false, [&](const Piece& piece) {
    int64_t at = piece.begin;
    for (const DispatchShare& share : piece.shares) {
      segments.push_back({share.expert, at, share.rows});
      at += share.rows;
    }
  });
  return segments;
}

std::vector<kernels::Segment> DispatchPlan::SegmentsFrom(int source) const {
  std::vector<kernels::Segment> segments;
  for (const Piece& piece : receives_) {
    if (piece.peer != source) continue;
    int64_t at = piece.begin;
    for (const DispatchShare& share : piece.shares) {
      segments.push_back({share.expert, at, share.rows});
      at += share.rows;
    }
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const kernels::Segment& a, const kernels::Segment& b) { return a.expert < b.expert; });
  return segments;
}

}  // namespace shoal
