// Rings, in the order of the topology: every rank sends as many bytes as it must at least, to one neighbour (or both).
#include "collectives/program/builder.h"
#include "collectives/program/families.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

// One direction around. blocks[i]: of the rank at place i, where it lies in the whole.
struct Ring {
  int n = 0;
  int at = 0;
  int next = 0, previous = 0;
  std::vector<Region> blocks;

  const Region& Block(int place) const { return blocks[((place % n) + n) % n]; }
};

// The directions of `ring` (one) or `ring2` (two, each with half of every rank's part).
std::vector<Ring> RingsOf(const Problem& p, const Parts& parts, int directions) {
  std::vector<int> order = RankOrder(p);
  std::vector<Ring> rings(directions);
  for (int d = 0; d < directions; ++d) {
    if (d == 1) std::reverse(order.begin(), order.end());
    Ring& ring = rings[d];
    ring.n = p.size;
    ring.at = PositionOf(order, p.rank);
    ring.next = order[(ring.at + 1) % p.size];
    ring.previous = order[(ring.at + p.size - 1) % p.size];
    for (int r : order) {
      const int64_t count = parts.Count(r);
      const int64_t begin = directions == 1 ? 0 : d * (count / 2);
      const int64_t end = d + 1 == directions ? count : count / 2;
      ring.blocks.push_back(Out(parts.Begin(r) + begin, end - begin));
    }
  }
  return rings;
}

Region InLike(const Region& region) { return In(region.begin, region.count); }

// After n - 1 steps each rank has its own block reduced. The sum of a block begins at the rank after its owner; `target(s)`
// is where step s puts what it added up.
template <class Target>
void ReduceStep(const Ring& ring, int s, Target target, Builder* b) {
  const Region mine = s == 0 ? InLike(ring.Block(ring.at - 1)) : target(s - 1);
  const Region added = InLike(ring.Block(ring.at - s - 2));
  const Region into = target(s);
  b->ExchangeViews(ring.next, mine, ring.previous, added.count, [&](Region view, int64_t k) {
    b->Reduce({view, b->PieceOf(added, k)}, b->PieceOf(into, k), /*final=*/s == ring.n - 2);
  });
}

void GatherStep(const Ring& ring, int s, const Region& own, Builder* b) {
  const Region mine = s == 0 ? own : ring.Block(ring.at - s);
  b->ExchangePieces(ring.next, mine, ring.previous, ring.Block(ring.at - s - 1));
}

void AllReduce(const Problem& p, int directions, Builder* b) {
  if (p.size == 1) return b->FinishPieces(In(0, p.elements), Out(0, p.elements));
  const std::vector<Ring> rings = RingsOf(p, Parts::Equal(p.elements, p.size, kSmallPartUnit), directions);
  for (int s = 0; s < p.size - 1; ++s) {
    for (const Ring& ring : rings) {
      ReduceStep(ring, s, [&](int step) { return ring.Block(ring.at - step - 2); }, b);
    }
  }
  for (int s = 0; s < p.size - 1; ++s) {
    for (const Ring& ring : rings) GatherStep(ring, s, ring.Block(ring.at), b);
  }
}

void ReduceScatter(const Problem& p, int directions, Builder* b) {
  const Parts parts = Parts::Of(p.counts);
  if (p.size == 1) return b->FinishPieces(In(0, p.counts[0]), Out(0, p.counts[0]));
  const std::vector<Ring> rings = RingsOf(p, parts, directions);
  // What is sent on must stay until it was taken: two places in turn.
  std::vector<std::vector<Region>> partial(directions);
  for (int d = 0; d < directions; ++d) {
    int64_t longest = 0;
    for (const Region& block : rings[d].blocks) longest = std::max(longest, block.count);
    for (int i = 0; i < std::min(2, p.size - 2); ++i) partial[d].push_back(b->Scratch(longest));
  }
  for (int s = 0; s < p.size - 1; ++s) {
    for (int d = 0; d < directions; ++d) {
      const Ring& ring = rings[d];
      ReduceStep(ring, s, [&](int step) {
        const Region& block = ring.Block(ring.at - step - 2);
        if (step == p.size - 2) return Out(block.begin - parts.Begin(p.rank), block.count);
        return Sub(partial[d][step % 2], 0, block.count);
      }, b);
    }
  }
}

void AllGather(const Problem& p, int directions, Builder* b) {
  const Parts parts = Parts::Of(p.counts);
  const std::vector<Ring> rings = RingsOf(p, parts, directions);
  const int64_t begin = parts.Begin(p.rank);
  for (int s = 0; s < p.size - 1; ++s) {
    for (const Ring& ring : rings) {
      const Region& own = ring.Block(ring.at);
      GatherStep(ring, s, In(own.begin - begin, own.count), b);
    }
  }
  b->CopyPieces(In(0, p.counts[p.rank]), Out(begin, p.counts[p.rank]));
}

// A chain: each passes on what it got, piece by piece.
void Broadcast(const Problem& p, Builder* b) {
  const std::vector<int> order = StartingAt(RankOrder(p), p.root);
  const int at = PositionOf(order, p.rank);
  b->ForPieces(at == 0 ? In(0, p.elements) : Out(0, p.elements), [&](Region piece) {
    if (at > 0) b->Receive(order[at - 1], piece);
    if (at + 1 < p.size) b->Send(order[at + 1], piece);
  });
}

// A chain that ends at the root.
void Reduce(const Problem& p, Builder* b) {
  const std::vector<int> order = StartingAt(RankOrder(p), p.root);
  const int at = PositionOf(order, p.rank);
  if (p.size == 1) return b->FinishPieces(In(0, p.elements), Out(0, p.elements));
  PieceRing partial(b, at == 0 || at + 1 == p.size ? 0 : p.elements);
  b->ForPieces(In(0, p.elements), [&](Region piece) {
    if (at + 1 == p.size) {
      b->Send(order[at - 1], piece);
      return;
    }
    const Region target = at == 0 ? Out(piece.begin, piece.count) : partial.Next(piece.count);
    b->Reduce({piece, b->ReceiveView(order[at + 1], piece.count)}, target, /*final=*/at == 0);
    if (at > 0) b->Send(order[at - 1], target);
  });
}

template <int directions>
Program Make(const Problem& p) {
  Builder b(p);
  if (p.kind == OpKind::kAllReduce) AllReduce(p, directions, &b);
  if (p.kind == OpKind::kReduceScatter) ReduceScatter(p, directions, &b);
  if (p.kind == OpKind::kAllGather) AllGather(p, directions, &b);
  if (p.kind == OpKind::kBroadcast) Broadcast(p, &b);
  if (p.kind == OpKind::kReduce) Reduce(p, &b);
  return std::move(b).Finish();
}

bool RoundTrip(const Problem& p) {
  return p.kind == OpKind::kAllReduce || p.kind == OpKind::kReduceScatter || p.kind == OpKind::kAllGather;
}

constexpr Algorithm kRing[] = {
    {"ring", [](const Problem& p) { return RoundTrip(p) || p.kind == OpKind::kBroadcast || p.kind == OpKind::kReduce; },
     Make<1>, /*index_order=*/false},
    {"ring2", RoundTrip, Make<2>, /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> RingAlgorithms() { return kRing; }

}  // namespace shoal
