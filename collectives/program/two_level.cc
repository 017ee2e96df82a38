// Two levels: as much as possible inside of hosts, and each byte across as seldom as possible. Any number of ranks on
// each host. The work across hosts is spread over a host's ranks where the operation allows it.
#include "collectives/program/builder.h"
#include "collectives/program/families.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

struct Hosts {
  std::vector<std::vector<int>> ranks;  // By host, ascending.
  int mine = 0;                         // This rank's host, and its place there.
  int place = 0;

  explicit Hosts(const Problem& p) : ranks(RanksByHost(p)) {
    for (size_t h = 0; h < ranks.size(); ++h) {
      const int found = PositionOf(ranks[h], p.rank);
      if (found < 0) continue;
      mine = static_cast<int>(h);
      place = found;
    }
  }
  int count() const { return static_cast<int>(ranks.size()); }
  const std::vector<int>& here() const { return ranks[mine]; }
  // Who on host h works for place `i` of another host.
  int Deputy(int h, int i) const { return ranks[h][i % ranks[h].size()]; }
};

// How the leaders of all hosts reduce a lane among themselves; `current` has this rank's sum, kOut gets the result.
using Across = void (*)(const std::vector<int>& leaders, int at, Region current, Region out, Builder* b);

// Each leader reduces one part for all.
void AcrossDirect(const std::vector<int>& leaders, int at, Region current, Region out, Builder* b) {
  const int n = static_cast<int>(leaders.size());
  const Parts parts = Parts::Equal(current.count, n, kSmallPartUnit);
  const auto part = [&](const Region& whole, int i) { return Sub(whole, parts.Begin(i), parts.Count(i)); };
  const int64_t rounds = b->PiecesOf(parts.Longest());
  std::vector<Region> sources(n);
  for (int64_t k = 0; k < rounds; ++k) {
    sources[at] = b->PieceOf(part(current, at), k);
    for (int d = 1; d < n; ++d) {
      const int to = (at + d) % n, from = (at - d + n) % n;
      b->Send(leaders[to], b->PieceOf(part(current, to), k));
      sources[from] = b->ReceiveView(leaders[from], sources[at].count);
    }
    b->Reduce(sources, b->PieceOf(part(out, at), k), /*final=*/true);
  }
  for (int64_t k = 0; k < rounds; ++k) {
    for (int d = 1; d < n; ++d) {
      b->Send(leaders[(at + d) % n], b->PieceOf(part(out, at), k));
      const int from = (at - d + n) % n;
      b->Receive(leaders[from], b->PieceOf(part(out, from), k));
    }
  }
}

void AcrossRing(const std::vector<int>& leaders, int at, Region current, Region out, Builder* b) {
  const int n = static_cast<int>(leaders.size());
  const int next = leaders[(at + 1) % n], previous = leaders[(at + n - 1) % n];
  const Parts parts = Parts::Equal(current.count, n, kSmallPartUnit);
  const auto part = [&](const Region& whole, int i) {
    const int place = (i + 2 * n) % n;
    return Sub(whole, parts.Begin(place), parts.Count(place));
  };
  for (int s = 0; s < n - 1; ++s) {
    const Region mine = part(s == 0 ? current : out, at - s - 1);
    const Region added = part(current, at - s - 2), into = part(out, at - s - 2);
    b->ExchangeViews(next, mine, previous, added.count, [&](Region view, int64_t k) {
      b->Reduce({view, b->PieceOf(added, k)}, b->PieceOf(into, k), /*final=*/s == n - 2);
    });
  }
  for (int s = 0; s < n - 1; ++s) b->ExchangePieces(next, part(out, at - s), previous, part(out, at - s - 1));
}

// As many lanes as the smallest host has ranks. Of lane l the l-th rank of each host is the leader: it adds up its host's,
// the leaders reduce among themselves, and give the result to their hosts.
void AllReduce(const Problem& p, Across across, Builder* b) {
  const Hosts hosts(p);
  const std::vector<int>& here = hosts.here();
  size_t lanes = here.size();
  for (const std::vector<int>& ranks : hosts.ranks) lanes = std::min(lanes, ranks.size());
  const Parts parts = Parts::Equal(p.elements, static_cast<int>(lanes), kSmallPartUnit);
  const auto lane = [&](Buffer buffer, int l) { return Region{buffer, -1, parts.Begin(l), parts.Count(l)}; };
  const bool leads = hosts.place < static_cast<int>(lanes);
  for (int l = 0; l < static_cast<int>(lanes); ++l) b->SendPieces(here[l], lane(Buffer::kIn, l));
  if (leads) {
    const Region in = lane(Buffer::kIn, hosts.place), out = lane(Buffer::kOut, hosts.place);
    std::vector<Region> sources(here.size());
    for (int64_t k = 0; here.size() > 1 && k < b->PiecesOf(in.count); ++k) {
      for (size_t i = 0; i < here.size(); ++i) {
        const Region piece = b->PieceOf(in, k);
        sources[i] = here[i] == p.rank ? piece : b->ReceiveView(here[i], piece.count);
      }
      b->Reduce(sources, b->PieceOf(out, k), /*final=*/false);
    }
    std::vector<int> leaders;
    for (const std::vector<int>& ranks : hosts.ranks) leaders.push_back(ranks[hosts.place]);
    across(leaders, hosts.mine, here.size() > 1 ? out : in, out, b);
    for (int mate : here) b->SendPieces(mate, out);
  }
  for (int l = 0; l < static_cast<int>(lanes); ++l) b->ReceivePieces(here[l], lane(Buffer::kOut, l));
}

// A rank's part goes to its host, and once to each other host, where its deputy gives it to the rest.
void AllGather(const Problem& p, Builder* b) {
  const Hosts hosts(p);
  const Parts parts = Parts::Of(p.counts);
  const Region own = In(0, p.counts[p.rank]);
  const auto part = [&](int r) { return Out(parts.Begin(r), parts.Count(r)); };
  for (int d = 1; d < hosts.count(); ++d) {
    const int h = (hosts.mine + d) % hosts.count();
    b->SendPieces(hosts.Deputy(h, hosts.place), own);
  }
  for (int mate : hosts.here()) {
    b->SendPieces(mate, own);
    b->ReceivePieces(mate, part(mate));
  }
  b->CopyPieces(own, part(p.rank));
  for (int d = 1; d < hosts.count(); ++d) {
    const std::vector<int>& there = hosts.ranks[(hosts.mine - d + hosts.count()) % hosts.count()];
    for (size_t i = 0; i < there.size(); ++i) {
      const int deputy = hosts.Deputy(hosts.mine, static_cast<int>(i));
      b->ForPieces(part(there[i]), [&](Region piece) {
        b->Receive(deputy == p.rank ? there[i] : deputy, piece);
        for (int mate : hosts.here()) {
          if (deputy == p.rank) b->Send(mate, piece);
        }
      });
    }
  }
}

// The reverse: each other host's deputy adds up its host's contributions to a rank's part, and sends it their sum.
void ReduceScatter(const Problem& p, Builder* b) {
  const Hosts hosts(p);
  const std::vector<int>& here = hosts.here();
  const Parts parts = Parts::Of(p.counts);
  const auto part = [&](int r) { return In(parts.Begin(r), parts.Count(r)); };
  std::vector<Region> sources;
  const auto receive_from_here = [&](Region piece) {
    for (int r : here) sources.push_back(r == p.rank ? piece : b->ReceiveView(r, piece.count));
  };
  for (int d = 1; d < hosts.count(); ++d) {
    const std::vector<int>& there = hosts.ranks[(hosts.mine + d) % hosts.count()];
    for (size_t i = 0; i < there.size(); ++i) {
      const int deputy = hosts.Deputy(hosts.mine, static_cast<int>(i));
      b->ForPieces(part(there[i]), [&](Region piece) {
        if (deputy != p.rank) {
          b->Send(deputy, piece);
        } else if (here.size() == 1) {
          b->Send(there[i], piece);
        } else {
          // Not a few places in turn: ranks come to their targets in different orders, and would wait in a circle.
          const Region sum = b->Scratch(piece.count);
          sources.clear();
          receive_from_here(piece);
          b->Reduce(sources, sum, /*final=*/false);
          b->Send(there[i], sum);
        }
      });
    }
  }
  for (int mate : here) b->SendPieces(mate, part(mate));
  const Region own = part(p.rank);
  b->ForPieces(own, [&](Region piece) {
    sources.clear();
    for (int h = 0; h < hosts.count(); ++h) {
      if (h == hosts.mine) receive_from_here(piece);
      else sources.push_back(b->ReceiveView(hosts.Deputy(h, hosts.place), piece.count));
    }
    b->Reduce(sources, Out(piece.begin - own.begin, piece.count), /*final=*/true);
  });
}

// One leader per host: the root, elsewhere the first. They form a tree.
struct Leaders {
  std::vector<int> ranks;  // The root first.
  int here = 0;            // This host's.

  Leaders(const Problem& p, const Hosts& hosts) {
    for (const std::vector<int>& host : hosts.ranks) {
      const bool has_root = PositionOf(host, p.root) >= 0;
      const int leader = has_root ? p.root : host[0];
      if (PositionOf(host, p.rank) >= 0) here = leader;
      ranks.insert(has_root ? ranks.begin() : ranks.end(), leader);
    }
  }
  TreeNode NodeOf(int leader) const { return InOrderTree(ranks, PositionOf(ranks, leader)); }
};

void Broadcast(const Problem& p, Builder* b) {
  const Hosts hosts(p);
  const Leaders leaders(p, hosts);
  if (p.rank != leaders.here) return b->ReceivePieces(leaders.here, Out(0, p.elements));
  const TreeNode node = leaders.NodeOf(p.rank);
  b->ForPieces(p.rank == p.root ? In(0, p.elements) : Out(0, p.elements), [&](Region piece) {
    if (node.parent >= 0) b->Receive(node.parent, piece);
    for (int child : node.children) b->Send(child, piece);
    for (int mate : hosts.here()) b->Send(mate, piece);
  });
}

void Reduce(const Problem& p, Builder* b) {
  const Hosts hosts(p);
  const Leaders leaders(p, hosts);
  if (p.rank != leaders.here) return b->SendPieces(leaders.here, In(0, p.elements));
  const TreeNode node = leaders.NodeOf(p.rank);
  const bool root = p.rank == p.root;
  const bool adds = hosts.here().size() + node.children.size() > 1;
  PieceRing partial(b, !root && adds ? p.elements : 0);
  std::vector<Region> sources;
  b->ForPieces(In(0, p.elements), [&](Region piece) {
    if (!root && !adds) {
      b->Send(node.parent, piece);
      return;
    }
    sources.clear();
    for (int r : hosts.here()) sources.push_back(r == p.rank ? piece : b->ReceiveView(r, piece.count));
    for (int child : node.children) sources.push_back(b->ReceiveView(child, piece.count));
    const Region target = root ? Out(piece.begin, piece.count) : partial.Next(piece.count);
    b->Reduce(sources, target, /*final=*/root);
    if (!root) b->Send(node.parent, target);
  });
}

// Tutel's 2DH, for hosts of any size: what a host's ranks have for one rank elsewhere is put together by one of them, so
// that one message per host arrives there instead of one per rank.
class AllToAll {
 public:
  AllToAll(const Problem& p, Builder* b) : p_(p), b_(*b), hosts_(p), count_(p.counts[0]) {}

  void Write() {
    if (count_ == 0) return;
    GiveToCollectors();
    Collect();
    for (int mate : hosts_.here()) {
      b_.Send(mate, Of(Buffer::kIn, mate));
      b_.Receive(mate, Of(Buffer::kOut, mate));
    }
    b_.Copy(Of(Buffer::kIn, p_.rank), Of(Buffer::kOut, p_.rank));
    for (int d = 1; d < hosts_.count(); ++d) {
      const int h = (hosts_.mine - d + hosts_.count()) % hosts_.count();
      const std::vector<int>& there = hosts_.ranks[h];
      const Region view = b_.ReceiveView(hosts_.Deputy(h, hosts_.place), static_cast<int64_t>(there.size()) * count_);
      for (size_t i = 0; i < there.size(); ++i) b_.Copy(Sub(view, i * count_, count_), Of(Buffer::kOut, there[i]));
    }
  }

 private:
  Region Of(Buffer buffer, int rank) const { return {buffer, -1, rank * count_, count_}; }

  // The ranks elsewhere for which `collector` puts things together, in the order of sending.
  std::vector<int> TargetsOf(int collector) const {
    std::vector<int> targets;
    for (int d = 1; d < hosts_.count(); ++d) {
      const std::vector<int>& there = hosts_.ranks[(hosts_.mine + d) % hosts_.count()];
      for (size_t i = 0; i < there.size(); ++i) {
        if (hosts_.Deputy(hosts_.mine, static_cast<int>(i)) == collector) targets.push_back(there[i]);
      }
    }
    return targets;
  }

  void GiveToCollectors() {
    for (int mate : hosts_.here()) {
      if (mate == p_.rank) continue;
      const std::vector<int> targets = TargetsOf(mate);
      const Region packed = b_.Scratch(static_cast<int64_t>(targets.size()) * count_);
      for (size_t t = 0; t < targets.size(); ++t) b_.Copy(Of(Buffer::kIn, targets[t]), Sub(packed, t * count_, count_));
      b_.Send(mate, packed);
    }
  }

  void Collect() {
    const std::vector<int>& here = hosts_.here();
    const std::vector<int> targets = TargetsOf(p_.rank);
    std::vector<Region> views;
    for (int mate : here) {
      const bool own = mate == p_.rank;
      views.push_back(own ? Region{} : b_.ReceiveView(mate, static_cast<int64_t>(targets.size()) * count_));
    }
    for (size_t t = 0; t < targets.size(); ++t) {
      const Region message = b_.Scratch(static_cast<int64_t>(here.size()) * count_);
      for (size_t i = 0; i < here.size(); ++i) {
        const Region from = here[i] == p_.rank ? Of(Buffer::kIn, targets[t]) : Sub(views[i], t * count_, count_);
        b_.Copy(from, Sub(message, i * count_, count_));
      }
      b_.Send(targets[t], message);
    }
  }

  const Problem& p_;
  Builder& b_;
  const Hosts hosts_;
  const int64_t count_;
};

Program Make(const Problem& p) {
  Builder b(p);
  if (p.kind == OpKind::kAllReduce) AllReduce(p, AcrossDirect, &b);
  if (p.kind == OpKind::kAllGather) AllGather(p, &b);
  if (p.kind == OpKind::kReduceScatter) ReduceScatter(p, &b);
  if (p.kind == OpKind::kBroadcast) Broadcast(p, &b);
  if (p.kind == OpKind::kReduce) Reduce(p, &b);
  if (p.kind == OpKind::kAllToAll) AllToAll(p, &b).Write();
  return std::move(b).Finish();
}

Program MakeRing(const Problem& p) {
  Builder b(p);
  AllReduce(p, AcrossRing, &b);
  return std::move(b).Finish();
}

bool Applies(const Problem& p) {
  switch (p.kind) {
    case OpKind::kAllReduce:
    case OpKind::kAllGather:
    case OpKind::kReduceScatter:
    case OpKind::kBroadcast:
    case OpKind::kReduce:
      return HasHosts(p);
    case OpKind::kAllToAll:
      return p.even && HasHosts(p);
    default:
      return false;
  }
}

constexpr Algorithm kTwoLevel[] = {
    {"two_level", Applies, Make, /*index_order=*/false},
    {"two_level_ring", [](const Problem& p) { return p.kind == OpKind::kAllReduce && HasHosts(p); }, MakeRing,
     /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> TwoLevelAlgorithms() { return kTwoLevel; }

}  // namespace shoal
