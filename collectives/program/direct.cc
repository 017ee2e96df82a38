// Each rank sends straight to the one that needs it. On shared memory a view is the sender's memory itself, so that a
// reduction reads all contributions in place, once.
#include "collectives/program/builder.h"
#include "collectives/program/families.h"

namespace shoal {
namespace {

// Parts of an all_reduce begin at multiples of it: whole cache lines, whatever the type.
constexpr int64_t kPartUnit = 64;

// Rank i reduces part i of everybody's kIn into `target`, in index order, and when kOut is whole sends it to all.
// The exchange of a piece is posted before the piece ahead of it is reduced.
void ReduceParts(const Parts& parts, Region target, bool share, Builder* b) {
  const int n = b->size(), me = b->rank();
  const int64_t rounds = b->PiecesOf(parts.Longest());
  const Region own = In(parts.Begin(me), parts.Count(me));
  b->Reserve(rounds * (4 * (n - 1) + 1));
  std::vector<Region> sources[2] = {std::vector<Region>(n), std::vector<Region>(n)};
  for (int64_t k = 0; k <= rounds; ++k) {
    if (k < rounds) {
      std::vector<Region>& next = sources[k % 2];
      next[me] = b->PieceOf(own, k);
      for (int d = 1; d < n; ++d) {
        const int to = (me + d) % n, from = (me - d + n) % n;
        b->Send(to, b->PieceOf(In(parts.Begin(to), parts.Count(to)), k));
        next[from] = b->ReceiveView(from, next[me].count);
      }
    }
    if (k == 0) continue;
    const Region result = b->PieceOf(target, k - 1);
    b->Reduce(sources[(k - 1) % 2], result, /*final=*/true);
    for (int d = 1; share && d < n; ++d) {
      const int to = (me + d) % n, from = (me - d + n) % n;
      b->Send(to, result);
      b->Receive(from, b->PieceOf(Out(parts.Begin(from), parts.Count(from)), k - 1));
    }
  }
}

void AllReduce(const Problem& p, Builder* b) {
  const Parts parts = Parts::Equal(p.elements, p.size, kPartUnit);
  ReduceParts(parts, Out(parts.Begin(p.rank), parts.Count(p.rank)), /*share=*/true, b);
}

void ReduceScatter(const Problem& p, Builder* b) {
  ReduceParts(Parts::Of(p.counts), Out(0, p.counts[p.rank]), /*share=*/false, b);
}

// kIn's parts to those they are for, kOut's from where they come; the own one is copied.
void Exchange(const Parts& to_send, const Parts& to_receive, Region own_in, Region own_out, Builder* b) {
  const int n = b->size(), me = b->rank();
  const int64_t rounds = b->PiecesOf(std::max(to_send.Longest(), to_receive.Longest()));
  b->Reserve(rounds * (2 * n - 1));
  for (int64_t k = 0; k < rounds; ++k) {
    for (int d = 1; d < n; ++d) {
      const int to = (me + d) % n, from = (me - d + n) % n;
      b->Send(to, b->PieceOf(In(to_send.Begin(to), to_send.Count(to)), k));
      b->Receive(from, b->PieceOf(Out(to_receive.Begin(from), to_receive.Count(from)), k));
    }
    b->Copy(b->PieceOf(own_in, k), b->PieceOf(own_out, k));
  }
}

void AllToAll(const Problem& p, Builder* b) {
  const Parts to_send = Parts::Of(p.counts), to_receive = Parts::Of(p.recv_counts);
  Exchange(to_send, to_receive, In(to_send.Begin(p.rank), to_send.Count(p.rank)),
           Out(to_receive.Begin(p.rank), to_receive.Count(p.rank)), b);
}

void AllGather(const Problem& p, Builder* b) {
  const int n = p.size, me = p.rank;
  const Parts parts = Parts::Of(p.counts);
  const Region own = In(0, p.counts[me]);
  const int64_t rounds = b->PiecesOf(parts.Longest());
  b->Reserve(rounds * (2 * n - 1));
  for (int64_t k = 0; k < rounds; ++k) {
    for (int d = 1; d < n; ++d) {
      const int from = (me - d + n) % n;
      b->Send((me + d) % n, b->PieceOf(own, k));
      b->Receive(from, b->PieceOf(Out(parts.Begin(from), parts.Count(from)), k));
    }
    b->Copy(b->PieceOf(own, k), b->PieceOf(Out(parts.Begin(me), parts.Count(me)), k));
  }
}

void Broadcast(const Problem& p, Builder* b) {
  if (p.rank != p.root) {
    b->ReceivePieces(p.root, Out(0, p.elements));
    return;
  }
  b->ForPieces(In(0, p.elements), [&](Region piece) {
    for (int d = 1; d < p.size; ++d) b->Send((p.root + d) % p.size, piece);
  });
}

void Reduce(const Problem& p, Builder* b) {
  const Region in = In(0, p.elements);
  if (p.rank != p.root) {
    b->SendPieces(p.root, in);
    return;
  }
  const int64_t rounds = b->PiecesOf(p.elements);
  std::vector<Region> sources[2] = {std::vector<Region>(p.size), std::vector<Region>(p.size)};
  for (int64_t k = 0; k <= rounds; ++k) {
    for (int r = 0; k < rounds && r < p.size; ++r) {
      const Region piece = b->PieceOf(in, k);
      sources[k % 2][r] = r == p.root ? piece : b->ReceiveView(r, piece.count);
    }
    if (k > 0) b->Reduce(sources[(k - 1) % 2], b->PieceOf(Out(0, p.elements), k - 1), /*final=*/true);
  }
}

void Gather(const Problem& p, Builder* b) {
  const Region own = In(0, p.counts[p.rank]);
  if (p.rank != p.root) {
    b->SendPieces(p.root, own);
    return;
  }
  const Parts parts = Parts::Of(p.counts);
  const int64_t rounds = b->PiecesOf(parts.Longest());
  for (int64_t k = 0; k < rounds; ++k) {
    for (int r = 0; r < p.size; ++r) b->Receive(r, b->PieceOf(Out(parts.Begin(r), parts.Count(r)), k));
    b->Copy(b->PieceOf(own, k), b->PieceOf(Out(parts.Begin(p.root), parts.Count(p.root)), k));
  }
}

void Scatter(const Problem& p, Builder* b) {
  const Region own = Out(0, p.counts[p.rank]);
  if (p.rank != p.root) {
    b->ReceivePieces(p.root, own);
    return;
  }
  const Parts parts = Parts::Of(p.counts);
  const int64_t rounds = b->PiecesOf(parts.Longest());
  for (int64_t k = 0; k < rounds; ++k) {
    for (int r = 0; r < p.size; ++r) b->Send(r, b->PieceOf(In(parts.Begin(r), parts.Count(r)), k));
    b->Copy(b->PieceOf(In(parts.Begin(p.root), parts.Count(p.root)), k), b->PieceOf(own, k));
  }
}

// A message of no elements is none; so a barrier's messages have one, whose value does not matter.
void Barrier(const Problem& p, Builder* b) {
  const Region token = b->Scratch(1);
  for (int d = 1; d < p.size; ++d) {
    b->Send((p.rank + d) % p.size, token);
    b->Receive((p.rank - d + p.size) % p.size, b->Scratch(1));
  }
}

void SparseAllGather(const Problem& p, Builder* b) {
  const Parts chunks = Parts::Of(p.counts);
  for (const SparseMove& move : p.moves) {
    const int64_t begin = chunks.Begin(move.chunk), count = chunks.Count(move.chunk);
    if (move.owner == p.rank) {
      b->ForPieces(In(begin, count), [&](Region piece) {
        for (int holder : move.holders) b->Send(holder, piece);
      });
    } else if (std::binary_search(move.holders.begin(), move.holders.end(), p.rank)) {
      b->ReceivePieces(move.owner, Out(begin, count));
    }
  }
}

void SparseReduceScatter(const Problem& p, Builder* b) {
  const Parts chunks = Parts::Of(p.counts);
  for (const SparseMove& move : p.moves) {
    const int64_t begin = chunks.Begin(move.chunk), count = chunks.Count(move.chunk);
    if (std::binary_search(move.holders.begin(), move.holders.end(), p.rank)) {
      b->SendPieces(move.owner, In(begin, count));
    }
    if (move.owner != p.rank) continue;
    std::vector<int> members = move.holders;
    members.insert(std::lower_bound(members.begin(), members.end(), move.owner), move.owner);
    std::vector<Region> sources;
    b->ForPieces(In(begin, count), [&](Region piece) {
      sources.clear();
      for (int r : members) sources.push_back(r == p.rank ? piece : b->ReceiveView(r, piece.count));
      b->Reduce(sources, Out(piece.begin, piece.count), /*final=*/true);
    });
  }
}

// Of Communicator::Send and Receive: `root` is the other side.
void Send(const Problem& p, Builder* b) { b->SendPieces(p.root, In(0, p.elements)); }
void Receive(const Problem& p, Builder* b) { b->ReceivePieces(p.root, Out(0, p.elements)); }

Program MakeDirect(const Problem& p) {
  Builder b(p);
  switch (p.kind) {
    case OpKind::kAllReduce: AllReduce(p, &b); break;
    case OpKind::kReduceScatter: ReduceScatter(p, &b); break;
    case OpKind::kAllGather: AllGather(p, &b); break;
    case OpKind::kAllToAll: AllToAll(p, &b); break;
    case OpKind::kBroadcast: Broadcast(p, &b); break;
    case OpKind::kReduce: Reduce(p, &b); break;
    case OpKind::kGather: Gather(p, &b); break;
    case OpKind::kScatter: Scatter(p, &b); break;
    case OpKind::kBarrier: Barrier(p, &b); break;
    case OpKind::kSend: Send(p, &b); break;
    case OpKind::kReceive: Receive(p, &b); break;
    case OpKind::kSparseAllGather: SparseAllGather(p, &b); break;
    case OpKind::kSparseReduceScatter: SparseReduceScatter(p, &b); break;
  }
  return std::move(b).Finish();
}

// One phase: everybody reads everybody's whole input. In place the input is copied first: peers may still read it
// when the result is written.
Program MakeDirect1(const Problem& p) {
  Builder b(p);
  const int n = p.size, me = p.rank;
  Region own = In(0, p.elements);
  if (p.in_place && n > 1) {
    own = b.Scratch(p.elements);
    b.ForPieces(own, [&](Region piece) { b.Copy(In(piece.begin, piece.count), piece); });
  }
  std::vector<Region> sources(n);
  const int64_t rounds = b.PiecesOf(p.elements);
  for (int64_t k = 0; k < rounds; ++k) {
    sources[me] = b.PieceOf(own, k);
    for (int d = 1; d < n; ++d) {
      const int from = (me - d + n) % n;
      b.Send((me + d) % n, sources[me]);
      sources[from] = b.ReceiveView(from, sources[me].count);
    }
    b.Reduce(sources, b.PieceOf(Out(0, p.elements), k), /*final=*/true);
  }
  return std::move(b).Finish();
}

// One phase and one pass: rank i reduces part i of everybody's kOut, where kIn has been copied, and writes the result into all
// of them. Every byte crosses between cores once each way.
Program MakeFused(const Problem& p) {
  Builder b(p);
  const int n = p.size, me = p.rank;
  const Parts parts = Parts::Equal(p.elements, n, kPartUnit);
  std::vector<Region> sources(n);
  b.Reserve(4 * n);
  for (int d = 1; d <= n; ++d) {
    const int to = (me + d) % n;
    const Region part = Out(parts.Begin(to), parts.Count(to));
    b.Copy(In(part.begin, part.count), part);
    b.Lend(to, part);
  }
  for (int d = 1; d < n; ++d) {
    const int from = (me + d) % n;
    sources[from] = b.Borrow(from, parts.Count(me));
  }
  sources[me] = Out(parts.Begin(me), parts.Count(me));
  b.ReduceAndReturn(sources, sources[me]);
  return std::move(b).Finish();
}

// The root writes one part of everybody's kOut, who read the others from it meanwhile: all cores copy.
Program MakeFusedBroadcast(const Problem& p) {
  Builder b(p);
  const Parts parts = Parts::Equal(p.elements, p.size, kPartUnit);
  const int64_t begin = parts.Begin(p.root), count = parts.Count(p.root), end = begin + count;
  if (p.rank != p.root) {
    b.Lend(p.root, Out(begin, count));
    b.Receive(p.root, Out(0, begin));
    b.Receive(p.root, Out(end, p.elements - end));
    return std::move(b).Finish();
  }
  for (int d = 1; d < p.size; ++d) {
    const int to = (p.root + d) % p.size;
    b.Send(to, In(0, begin));
    b.Send(to, In(end, p.elements - end));
  }
  for (int d = 1; d < p.size; ++d) {
    b.CopyAndReturn(In(begin, count), b.Borrow((p.root + d) % p.size, count));
  }
  return std::move(b).Finish();
}

bool MayFuse(const Problem& p) {
  return p.lending && (p.kind == OpKind::kAllReduce || p.kind == OpKind::kBroadcast);
}

constexpr Algorithm kDirect[] = {
    {"direct", [](const Problem&) { return true; }, MakeDirect, /*index_order=*/true},
    {"fused", MayFuse,
     [](const Problem& p) { return p.kind == OpKind::kBroadcast ? MakeFusedBroadcast(p) : MakeFused(p); },
     /*index_order=*/true},
    // In index order as well, but not in one place.
    {"direct1", [](const Problem& p) { return p.kind == OpKind::kAllReduce; }, MakeDirect1, /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> DirectAlgorithms() { return kDirect; }

}  // namespace shoal
