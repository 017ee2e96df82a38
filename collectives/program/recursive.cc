// Partners at distances 1, 2, 4...: few steps. A number of ranks that is no power of two is folded first: of the first
// pairs one rank stands aside, and gets the result in the end.
#include "collectives/program/builder.h"
#include "collectives/program/families.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

struct Fold {
  std::vector<int> order;
  int members = 1;  // A power of two.
  int member = -1;  // This rank among them; -1: it stands aside.
  int partner = -1;  // Of the pair that was folded; -1: none.

  Fold(std::vector<int> ranks, int rank) : order(std::move(ranks)) {
    const int n = static_cast<int>(order.size());
    while (members * 2 <= n) members *= 2;
    const int aside = n - members;
    const int at = PositionOf(order, rank);
    if (at < 2 * aside) partner = order[at ^ 1];
    if (at >= 2 * aside) member = at - aside;
    else if (at % 2 == 0) member = at / 2;
  }

  int aside() const { return static_cast<int>(order.size()) - members; }
  // The place of member m in the order; of `members`: the end.
  int PlaceOf(int m) const { return m < aside() ? 2 * m : m + aside(); }
  int RankOf(int m) const { return order[PlaceOf(m)]; }
};

std::vector<int> ByIndex(const Problem& p) {
  std::vector<int> order(p.size);
  for (int r = 0; r < p.size; ++r) order[r] = r;
  return order;
}

// Who stands aside gives its input to its partner, which adds it to its own.
void FoldIn(const Fold& fold, Region in, Region target, Builder* b) {
  b->ForPieces(in, [&](Region piece) {
    const Region view = b->ReceiveView(fold.partner, piece.count);
    b->Reduce({piece, view}, Sub(target, piece.begin, piece.count), /*final=*/false);
  });
}

// The whole in every step. What is being read by the partner must not be written, so results go to another place each time.
void DoublingAllReduce(const Problem& p, Builder* b) {
  if (p.size == 1) return b->FinishPieces(In(0, p.elements), Out(0, p.elements));
  const Fold fold(RankOrder(p), p.rank);
  const Region in = In(0, p.elements), out = Out(0, p.elements);
  if (fold.member < 0) {
    b->SendPieces(fold.partner, in);
    b->ReceivePieces(fold.partner, out);
    return;
  }
  Region places[2];
  int used = 0;
  const auto other_place = [&] {
    if (used < 2) places[used] = b->Scratch(p.elements);
    return places[used++ % 2];
  };
  Region current = in;
  if (fold.partner >= 0) {
    current = other_place();
    FoldIn(fold, in, current, b);
  }
  for (int bit = 1; bit < fold.members; bit *= 2) {
    const int partner = fold.RankOf(fold.member ^ bit);
    const bool last = bit * 2 == fold.members, lower = (fold.member & bit) == 0;
    const Region target = last ? out : other_place();
    const auto combine = [&](Region theirs, int64_t k) {
      const Region mine = b->PieceOf(current, k);
      b->Reduce({lower ? mine : theirs, lower ? theirs : mine}, b->PieceOf(target, k), last);
    };
    if (!b->SamePlace(current, target)) {
      b->ExchangeViews(partner, current, partner, p.elements, combine);
    } else {  // In place with one partner: both would wait for the other to read first.
      const Region copy = other_place();
      b->ExchangePieces(partner, current, partner, copy);
      for (int64_t k = 0; k < b->PiecesOf(p.elements); ++k) combine(b->PieceOf(copy, k), k);
    }
    current = target;
  }
  if (fold.partner >= 0) b->SendPieces(fold.partner, out);
}

// A span of members that is halved, down to one.
struct Halving {
  int low = 0, high = 0;
  int partner = 0;       // A member.
  bool lower = false;    // Whether this rank keeps the lower half.
  int give_low = 0, give_high = 0, keep_low = 0, keep_high = 0;
};

std::vector<Halving> HalvingsOf(const Fold& fold) {
  std::vector<Halving> steps;
  for (int low = 0, high = fold.members; high - low > 1;) {
    const int middle = (low + high) / 2, half = middle - low;
    Halving step{low, high};
    step.lower = fold.member < middle;
    step.partner = step.lower ? fold.member + half : fold.member - half;
    step.keep_low = step.lower ? low : middle;
    step.keep_high = step.keep_low + half;
    step.give_low = step.lower ? middle : low;
    step.give_high = step.give_low + half;
    low = step.keep_low;
    high = step.keep_high;
    steps.push_back(step);
  }
  return steps;
}

void Combine(const Halving& step, int partner, Region give, Region keep, Region target, bool final, Builder* b) {
  b->ExchangeViews(partner, give, partner, keep.count, [&](Region view, int64_t k) {
    const Region mine = b->PieceOf(keep, k);
    b->Reduce({step.lower ? mine : view, step.lower ? view : mine}, b->PieceOf(target, k), final);
  });
}

void HalvingAllReduce(const Problem& p, Builder* b) {
  if (p.size == 1) return b->FinishPieces(In(0, p.elements), Out(0, p.elements));
  const Fold fold(RankOrder(p), p.rank);
  const Region in = In(0, p.elements), out = Out(0, p.elements);
  if (fold.member < 0) {
    b->SendPieces(fold.partner, in);
    b->ReceivePieces(fold.partner, out);
    return;
  }
  const Parts parts = Parts::Equal(p.elements, fold.members, kSmallPartUnit);
  const auto span = [&](Region whole, int low, int high) {
    return Sub(whole, parts.Begin(low), parts.Begin(high) - parts.Begin(low));
  };
  Region current = in;
  if (fold.partner >= 0) {
    FoldIn(fold, in, out, b);
    current = out;
  }
  const std::vector<Halving> steps = HalvingsOf(fold);
  for (const Halving& step : steps) {
    const Region keep = span(current, step.keep_low, step.keep_high);
    Combine(step, fold.RankOf(step.partner), span(current, step.give_low, step.give_high), keep,
            span(out, step.keep_low, step.keep_high), step.high - step.low == 2, b);
    current = out;
  }
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const int partner = fold.RankOf(step->partner);
    b->ExchangePieces(partner, span(out, step->keep_low, step->keep_high), partner,
                      span(out, step->give_low, step->give_high));
  }
  if (fold.partner >= 0) b->SendPieces(fold.partner, out);
}

void HalvingReduceScatter(const Problem& p, Builder* b) {
  if (p.size == 1) return b->FinishPieces(In(0, p.counts[0]), Out(0, p.counts[0]));
  const Fold fold(ByIndex(p), p.rank);
  const Parts parts = Parts::Of(p.counts);
  const int64_t total = parts.begins.back();
  if (fold.member < 0) {
    b->SendPieces(fold.partner, In(0, total));
    b->ReceivePieces(fold.partner, Out(0, p.counts[p.rank]));
    return;
  }
  const Region work = b->Scratch(total);
  const auto span = [&](Region whole, int low, int high) {
    const int64_t begin = parts.Begin(fold.PlaceOf(low));
    return Sub(whole, begin, parts.Begin(fold.PlaceOf(high)) - begin);
  };
  const auto part = [&](Region whole, int rank) { return Sub(whole, parts.Begin(rank), parts.Count(rank)); };
  Region current = In(0, total);
  if (fold.partner >= 0) {
    FoldIn(fold, current, work, b);
    current = work;
  }
  for (const Halving& step : HalvingsOf(fold)) {
    const int partner = fold.RankOf(step.partner);
    if (step.high - step.low > 2) {
      Combine(step, partner, span(current, step.give_low, step.give_high), span(current, step.keep_low, step.keep_high),
              span(work, step.keep_low, step.keep_high), /*final=*/false, b);
      current = work;
      continue;
    }
    // A member and who stands aside for it: each one's part for itself.
    const bool two_here = fold.partner >= 0, two_there = step.partner < fold.aside();
    Combine(step, partner, part(current, partner), part(current, p.rank), Out(0, p.counts[p.rank]), /*final=*/true, b);
    if (!two_here && !two_there) continue;
    const Region give = two_there ? part(current, partner + 1) : Sub(current, 0, 0);
    const Region keep = two_here ? part(current, p.rank + 1) : Sub(current, 0, 0);
    const Region finished = two_here ? part(work, p.rank + 1) : Sub(work, 0, 0);
    Combine(step, partner, give, keep, finished, /*final=*/true, b);
    if (two_here) b->SendPieces(fold.partner, finished);
  }
}

void DoublingAllGather(const Problem& p, Builder* b) {
  const Fold fold(ByIndex(p), p.rank);
  const Parts parts = Parts::Of(p.counts);
  const int64_t begin = parts.Begin(p.rank), count = p.counts[p.rank], total = parts.begins.back();
  const Region own = In(0, count), own_out = Out(begin, count);
  if (fold.member < 0) {
    b->SendPieces(fold.partner, own);
    b->ReceivePieces(fold.partner, Out(0, begin));
    b->ReceivePieces(fold.partner, Out(begin + count, total - begin - count));
    b->CopyPieces(own, own_out);
    return;
  }
  if (fold.partner >= 0) b->ReceivePieces(fold.partner, Out(begin + count, parts.Count(p.rank + 1)));
  b->CopyPieces(own, own_out);
  const auto span = [&](int low, int high) {
    const int64_t from = parts.Begin(fold.PlaceOf(low));
    return Out(from, parts.Begin(fold.PlaceOf(high)) - from);
  };
  for (int bit = 1; bit < fold.members; bit *= 2) {
    const int mine = fold.member & ~(bit - 1), theirs = mine ^ bit;
    const int partner = fold.RankOf(fold.member ^ bit);
    b->ExchangePieces(partner, span(mine, mine + bit), partner, span(theirs, theirs + bit));
  }
  if (fold.partner >= 0) {
    const int64_t aside_begin = begin + count, aside_end = aside_begin + parts.Count(p.rank + 1);
    b->SendPieces(fold.partner, Out(0, aside_begin));
    b->SendPieces(fold.partner, Out(aside_end, total - aside_end));
  }
}

void DoublingBarrier(const Problem& p, Builder* b) {
  const Fold fold(RankOrder(p), p.rank);
  if (p.size == 1) return;
  const Region token = b->Scratch(1);
  if (fold.member < 0) {
    b->Send(fold.partner, token);
    b->Receive(fold.partner, b->Scratch(1));
    return;
  }
  int last = fold.partner >= 0 ? b->Receive(fold.partner, b->Scratch(1)) : -1;
  for (int bit = 1; bit < fold.members; bit *= 2) {
    const int partner = fold.RankOf(fold.member ^ bit);
    b->Send(partner, token, {last});
    // Also after what came before, so that the last one stands for all.
    last = b->Receive(partner, b->Scratch(1), {last});
  }
  if (fold.partner >= 0) b->Send(fold.partner, token, {last});
}

// Step k: to the rank 2^k further on.
Program MakeDissemination(const Problem& p) {
  Builder b(p);
  if (p.size == 1) return std::move(b).Finish();
  const Region token = b.Scratch(1);
  int last = -1;
  for (int distance = 1; distance < p.size; distance *= 2) {
    b.Send((p.rank + distance) % p.size, token, {last});
    last = b.Receive((p.rank - distance + p.size) % p.size, b.Scratch(1), {last});
  }
  return std::move(b).Finish();
}

Program MakeDoubling(const Problem& p) {
  Builder b(p);
  if (p.kind == OpKind::kAllReduce) DoublingAllReduce(p, &b);
  if (p.kind == OpKind::kAllGather) DoublingAllGather(p, &b);
  if (p.kind == OpKind::kBarrier) DoublingBarrier(p, &b);
  return std::move(b).Finish();
}

Program MakeHalving(const Problem& p) {
  Builder b(p);
  if (p.kind == OpKind::kAllReduce) HalvingAllReduce(p, &b);
  if (p.kind == OpKind::kReduceScatter) HalvingReduceScatter(p, &b);
  return std::move(b).Finish();
}

constexpr Algorithm kRecursive[] = {
    {"recursive_doubling",
     [](const Problem& p) {
       return p.kind == OpKind::kAllReduce || p.kind == OpKind::kAllGather || p.kind == OpKind::kBarrier;
     },
     MakeDoubling, /*index_order=*/false},
    {"halving_doubling",
     [](const Problem& p) { return p.kind == OpKind::kAllReduce || p.kind == OpKind::kReduceScatter; }, MakeHalving,
     /*index_order=*/false},
    {"dissemination", [](const Problem& p) { return p.kind == OpKind::kBarrier; }, MakeDissemination,
     /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> RecursiveAlgorithms() { return kRecursive; }

}  // namespace shoal
