// Trees, in the order of the topology: few steps from any rank to any other, and pieces follow each other without a gap.
#include "collectives/program/builder.h"
#include "collectives/program/families.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

// One rank's part in one tree, which carries `span` of the whole.
struct Branch {
  TreeNode node;
  Region span;
};

// Adds the children's pieces to the own one, and passes the sum on or, at the root, finishes it.
void Up(const Branch& branch, const Region& piece, const Region& target, Builder* b) {
  std::vector<Region> sources = {In(piece.begin, piece.count)};
  for (int child : branch.node.children) sources.push_back(b->ReceiveView(child, piece.count));
  const bool root = branch.node.parent < 0;
  if (!root && sources.size() == 1) {
    b->Send(branch.node.parent, sources[0]);
    return;
  }
  b->Reduce(sources, target, /*final=*/root);
  if (!root) b->Send(branch.node.parent, target);
}

void Down(const Branch& branch, const Region& piece, Builder* b) {
  if (branch.node.parent >= 0) b->Receive(branch.node.parent, piece);
  for (int child : branch.node.children) b->Send(child, piece);
}

// One branch, or two with half of the elements each.
std::vector<Branch> Branches(std::vector<TreeNode> nodes, int64_t elements) {
  std::vector<Branch> branches;
  const int64_t first = nodes.size() == 1 ? elements : ((elements + 1) / 2 + kSmallPartUnit - 1) / kSmallPartUnit * kSmallPartUnit;
  const int64_t middle = std::min(first, elements);
  branches.push_back({std::move(nodes[0]), Out(0, middle)});
  if (nodes.size() == 2) branches.push_back({std::move(nodes[1]), Out(middle, elements - middle)});
  return branches;
}

// each(branch, k) for all pieces of all branches, in turn.
template <class Each>
void ForAllPieces(const std::vector<Branch>& branches, Builder* b, Each each) {
  const int64_t pieces = b->PiecesOf(branches[0].span.count);  // The longest.
  for (int64_t k = 0; k < pieces; ++k) {
    for (const Branch& branch : branches) {
      const Region piece = b->PieceOf(branch.span, k);
      if (piece.count > 0) each(branch, piece);
    }
  }
}

void AllReduce(const std::vector<Branch>& branches, Builder* b) {
  ForAllPieces(branches, b, [&](const Branch& branch, Region piece) { Up(branch, piece, piece, b); });
  ForAllPieces(branches, b, [&](const Branch& branch, Region piece) { Down(branch, piece, b); });
}

void Broadcast(const Problem& p, const std::vector<Branch>& branches, Builder* b) {
  ForAllPieces(branches, b, [&](const Branch& branch, Region piece) {
    if (p.rank == p.root) piece.buffer = Buffer::kIn;
    Down(branch, piece, b);
  });
}

void Reduce(const std::vector<Branch>& branches, Builder* b) {
  bool adds = false;
  for (const Branch& branch : branches) adds |= branch.node.parent >= 0 && !branch.node.children.empty();
  PieceRing partial(b, adds ? branches[0].span.count : 0);
  ForAllPieces(branches, b, [&](const Branch& branch, Region piece) {
    const bool passes = branch.node.parent >= 0 && !branch.node.children.empty();
    Up(branch, piece, passes ? partial.Next(piece.count) : piece, b);
  });
}

Program Make(const Problem& p, std::vector<TreeNode> nodes) {
  Builder b(p);
  const std::vector<Branch> branches = Branches(std::move(nodes), p.elements);
  if (p.kind == OpKind::kAllReduce) AllReduce(branches, &b);
  if (p.kind == OpKind::kBroadcast) Broadcast(p, branches, &b);
  if (p.kind == OpKind::kReduce) Reduce(branches, &b);
  return std::move(b).Finish();
}

std::vector<int> OrderFromRoot(const Problem& p) {
  return p.kind == OpKind::kAllReduce ? RankOrder(p) : StartingAt(RankOrder(p), p.root);
}

Program MakeTree(const Problem& p) {
  const std::vector<int> order = OrderFromRoot(p);
  return Make(p, {InOrderTree(order, PositionOf(order, p.rank))});
}

// Two trees, each with half of the elements: who only receives in one tree also sends in the other. With a root that is
// given, they span the other ranks, and the root feeds both.
Program MakeDoubleTree(const Problem& p) {
  std::vector<int> order = OrderFromRoot(p);
  if (p.kind == OpKind::kAllReduce || p.size == 1) {
    const int at = PositionOf(order, p.rank);
    return Make(p, {InOrderTree(order, at), CounterTree(order, at)});
  }
  order.erase(order.begin());
  const int at = PositionOf(order, p.rank);
  TreeNode nodes[2];
  if (at >= 0) {
    nodes[0] = InOrderTree(order, at);
    nodes[1] = CounterTree(order, at);
    for (TreeNode& node : nodes) {
      if (node.parent < 0) node.parent = p.root;
    }
  } else {
    for (int i = 0; i < p.size - 1; ++i) {
      if (InOrderTree(order, i).parent < 0) nodes[0].children = {order[i]};
      if (CounterTree(order, i).parent < 0) nodes[1].children = {order[i]};
    }
  }
  return Make(p, {nodes[0], nodes[1]});
}

// Of gather and scatter: the ranks in the order of their distance from the root, so that a subtree is one stretch
// [at, end), that wraps around the last rank once at most.
struct Stretch {
  const Problem& p;
  Parts parts;
  int at;

  explicit Stretch(const Problem& problem)
      : p(problem), parts(Parts::Of(problem.counts)), at((p.rank - p.root + p.size) % p.size) {}

  int RankAt(int place) const { return (p.root + place) % p.size; }
  // The end of the subtree of the rank at `place`.
  int End(int place) const { return place == 0 ? p.size : std::min(p.size, place + (place & -place)); }
  int64_t Elements(int from, int to) const {
    int64_t sum = 0;
    for (int i = from; i < to; ++i) sum += parts.Count(RankAt(i));
    return sum;
  }
  // Calls each(region of `whole`, which has all ranks' parts in index order) for [from, to).
  template <class Each>
  void ForRuns(int from, int to, Buffer whole, Each each) const {
    const int wrap = std::clamp(p.size - p.root, from, to);
    for (auto [first, last] : {std::pair(from, wrap), std::pair(wrap, to)}) {
      if (first == last) continue;
      each(Region{whole, -1, parts.Begin(RankAt(first)), Elements(first, last)});
    }
  }
  // The same runs where the parts [base, ...) were packed into `packed` in order of distance.
  template <class Each>
  void ForPackedRuns(int from, int to, int base, Region packed, Each each) const {
    int64_t begin = Elements(base, from);
    ForRuns(from, to, Buffer::kOut, [&](Region run) {
      each(Sub(packed, begin, run.count));
      begin += run.count;
    });
  }
};

void Gather(const Problem& p, Builder* b) {
  const Stretch tree(p);
  const int end = tree.End(tree.at);
  const Region own = In(0, p.counts[p.rank]);
  const bool root = tree.at == 0;
  const bool leaf = !root && end == tree.at + 1;
  const Region packed = root || leaf ? own : b->Scratch(tree.Elements(tree.at, end));
  if (root) b->CopyPieces(own, Out(tree.parts.Begin(p.rank), own.count));
  if (!root && !leaf) b->CopyPieces(own, Sub(packed, 0, own.count));
  const int reach = root ? p.size : end - tree.at;
  for (int bit = 1; bit < reach; bit *= 2) {
    const int child = tree.at + bit;
    const auto receive = [&](Region run) { b->ReceivePieces(tree.RankAt(child), run); };
    if (root) tree.ForRuns(child, tree.End(child), Buffer::kOut, receive);
    else tree.ForPackedRuns(child, tree.End(child), tree.at, packed, receive);
  }
  if (root) return;
  const int parent = tree.RankAt(tree.at & (tree.at - 1));
  tree.ForPackedRuns(tree.at, end, tree.at, packed, [&](Region run) { b->SendPieces(parent, run); });
}

void Scatter(const Problem& p, Builder* b) {
  const Stretch tree(p);
  const int end = tree.End(tree.at);
  const Region own = Out(0, p.counts[p.rank]);
  const bool root = tree.at == 0;
  const bool leaf = !root && end == tree.at + 1;
  const Region packed = root || leaf ? own : b->Scratch(tree.Elements(tree.at, end));
  if (!root) {
    const int parent = tree.RankAt(tree.at & (tree.at - 1));
    tree.ForPackedRuns(tree.at, end, tree.at, packed, [&](Region run) { b->ReceivePieces(parent, run); });
  }
  int bit = 1;
  while (bit * 2 < (root ? p.size : end - tree.at)) bit *= 2;
  for (; bit >= 1 && !leaf; bit /= 2) {  // The largest subtree first.
    const int child = tree.at + bit;
    if (child >= end) continue;
    const auto send = [&](Region run) { b->SendPieces(tree.RankAt(child), run); };
    if (root) tree.ForRuns(child, tree.End(child), Buffer::kIn, send);
    else tree.ForPackedRuns(child, tree.End(child), tree.at, packed, send);
  }
  if (root) b->CopyPieces(In(tree.parts.Begin(p.rank), own.count), own);
  if (!root && !leaf) b->CopyPieces(Sub(packed, 0, own.count), own);
}

Program MakeBinomial(const Problem& p) {
  if (p.kind == OpKind::kBroadcast || p.kind == OpKind::kReduce) {
    const std::vector<int> order = OrderFromRoot(p);
    return Make(p, {BinomialTree(order, PositionOf(order, p.rank))});
  }
  Builder b(p);
  if (p.kind == OpKind::kGather) Gather(p, &b);
  if (p.kind == OpKind::kScatter) Scatter(p, &b);
  return std::move(b).Finish();
}

bool Rooted(const Problem& p) { return p.kind == OpKind::kBroadcast || p.kind == OpKind::kReduce; }
bool RootedOrAllReduce(const Problem& p) { return Rooted(p) || p.kind == OpKind::kAllReduce; }

constexpr Algorithm kTree[] = {
    {"tree", RootedOrAllReduce, MakeTree, /*index_order=*/false},
    {"double_tree", RootedOrAllReduce, MakeDoubleTree, /*index_order=*/false},
    {"binomial",
     [](const Problem& p) { return Rooted(p) || p.kind == OpKind::kGather || p.kind == OpKind::kScatter; },
     MakeBinomial, /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> TreeAlgorithms() { return kTree; }

}  // namespace shoal
