// Sparse operations by two-level trees: between a chunk's owner and each other host that has holders there is one message,
// to or from the chunk's leader there. Leaders rotate with the chunk's index, so that no rank carries them all.
#include <map>

#include "collectives/program/builder.h"
#include "collectives/program/families.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

struct SparseTree {
  // Of one host, ascending; on the owner's it is among them.
  struct Branch {
    std::vector<int> members;
    int leader = -1;  // The owner on its own host.
  };
  std::vector<Branch> branches;  // By the number of the host, of those which have members.
  int mine = -1;                 // -1: this rank has no part in it.

  SparseTree(const Problem& p, const SparseMove& move) {
    std::vector<int> members = move.holders;
    members.insert(std::lower_bound(members.begin(), members.end(), move.owner), move.owner);
    std::map<int, Branch> by_host;
    for (int r : members) by_host[p.topology->host[r]].members.push_back(r);
    for (auto& [unused, branch] : by_host) {
      const bool owners = PositionOf(branch.members, move.owner) >= 0;
      branch.leader = owners ? move.owner : branch.members[move.chunk % branch.members.size()];
      if (PositionOf(branch.members, p.rank) >= 0) mine = static_cast<int>(branches.size());
      branches.push_back(std::move(branch));
    }
  }
};

void Gather(const Problem& p, Builder* b) {
  const Parts chunks = Parts::Of(p.counts);
  for (const SparseMove& move : p.moves) {
    const SparseTree tree(p, move);
    if (tree.mine < 0) continue;
    const bool owner = p.rank == move.owner;
    const SparseTree::Branch& mine = tree.branches[tree.mine];
    const int64_t begin = chunks.Begin(move.chunk), count = chunks.Count(move.chunk);
    b->ForPieces(owner ? In(begin, count) : Out(begin, count), [&](Region piece) {
      if (!owner) b->Receive(p.rank == mine.leader ? move.owner : mine.leader, piece);
      for (const SparseTree::Branch& branch : tree.branches) {
        if (owner) b->Send(branch.leader, piece);  // Across hosts first.
      }
      for (int member : mine.members) {
        if (p.rank == mine.leader) b->Send(member, piece);
      }
    });
  }
}

void ReduceScatter(const Problem& p, Builder* b) {
  const Parts chunks = Parts::Of(p.counts);
  int64_t longest = 0;
  for (const SparseMove& move : p.moves) {
    const SparseTree tree(p, move);
    if (tree.mine < 0 || p.rank == move.owner) continue;
    const SparseTree::Branch& mine = tree.branches[tree.mine];
    if (p.rank == mine.leader && mine.members.size() > 1) longest = std::max(longest, chunks.Count(move.chunk));
  }
  PieceRing partial(b, longest);
  std::vector<Region> sources;
  for (const SparseMove& move : p.moves) {
    const SparseTree tree(p, move);
    if (tree.mine < 0) continue;
    const SparseTree::Branch& mine = tree.branches[tree.mine];
    b->ForPieces(In(chunks.Begin(move.chunk), chunks.Count(move.chunk)), [&](Region piece) {
      if (p.rank != mine.leader) {
        b->Send(mine.leader, piece);
        return;
      }
      const bool owner = p.rank == move.owner;
      sources.clear();
      for (const SparseTree::Branch& branch : tree.branches) {
        if (&branch != &mine) {
          if (owner) sources.push_back(b->ReceiveView(branch.leader, piece.count));
          continue;
        }
        for (int r : mine.members) sources.push_back(r == p.rank ? piece : b->ReceiveView(r, piece.count));
      }
      if (owner) {
        b->Reduce(sources, Out(piece.begin, piece.count), /*final=*/true);
      } else if (sources.size() == 1) {
        b->Send(move.owner, piece);
      } else {
        const Region sum = partial.Next(piece.count);
        b->Reduce(sources, sum, /*final=*/false);
        b->Send(move.owner, sum);
      }
    });
  }
}

Program Make(const Problem& p) {
  Builder b(p);
  if (p.kind == OpKind::kSparseAllGather) Gather(p, &b);
  if (p.kind == OpKind::kSparseReduceScatter) ReduceScatter(p, &b);
  return std::move(b).Finish();
}

constexpr Algorithm kSparse[] = {
    {"two_level",
     [](const Problem& p) {
       return (p.kind == OpKind::kSparseAllGather || p.kind == OpKind::kSparseReduceScatter) && HasHosts(p);
     },
     Make, /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> SparseAlgorithms() { return kSparse; }

}  // namespace shoal
