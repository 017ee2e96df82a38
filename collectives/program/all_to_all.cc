// all_to_all beyond the direct one: Bruck's for small parts, and one partner at a time for large ones.
#include "collectives/program/builder.h"
#include "collectives/program/families.h"

namespace shoal {
namespace {

// Bruck: a part that has to go d ranks further goes by the binary digits of d, together with all others that have this
// digit: log2(n) messages instead of n - 1, of n / 2 parts each.
Program MakeBruck(const Problem& p) {
  Builder b(p);
  const int n = p.size, me = p.rank;
  const int64_t count = p.counts[0];
  const Region by_distance = b.Scratch(n * count);
  const auto part = [&](int d) { return Sub(by_distance, d * count, count); };
  b.Copy(In(me * count, count), Out(me * count, count));
  for (int d = 1; d < n; ++d) b.Copy(In((me + d) % n * count, count), part(d));
  const int64_t half = (n + 1) / 2 * count;
  const Region packed[2] = {b.Scratch(half), b.Scratch(half)};
  int step = 0;
  for (int bit = 1; bit < n; bit *= 2, ++step) {
    int64_t end = 0;
    for (int d = bit; d < n; ++d) {
      if ((d & bit) == 0) continue;
      b.Copy(part(d), Sub(packed[step % 2], end, count));
      end += count;
    }
    b.Send((me + bit) % n, Sub(packed[step % 2], 0, end));
    const Region view = b.ReceiveView((me - bit + n) % n, end);
    int64_t begin = 0;
    for (int d = bit; d < n; ++d) {
      if ((d & bit) == 0) continue;
      // With its highest digit it has arrived.
      const bool last = d < 2 * bit;
      b.Copy(Sub(view, begin, count), last ? Out((me - d + n) % n * count, count) : part(d));
      begin += count;
    }
  }
  return std::move(b).Finish();
}

// Step s: to the rank s further on, from the one s before, when the step before has ended.
Program MakePairwise(const Problem& p) {
  Builder b(p);
  const int n = p.size, me = p.rank;
  const Parts to_send = Parts::Of(p.counts), to_receive = Parts::Of(p.recv_counts);
  std::vector<int> before, now;
  for (int s = 1; s < n; ++s) {
    const int to = (me + s) % n, from = (me - s + n) % n;
    const Region mine = In(to_send.Begin(to), to_send.Count(to));
    const Region theirs = Out(to_receive.Begin(from), to_receive.Count(from));
    now.clear();
    for (int64_t k = 0; k < std::max(b.PiecesOf(mine.count), b.PiecesOf(theirs.count)); ++k) {
      const int sent = b.Send(to, b.PieceOf(mine, k), before);
      const int received = b.Receive(from, b.PieceOf(theirs, k), before);
      for (int i : {sent, received}) {
        if (i >= 0) now.push_back(i);
      }
    }
    if (!now.empty()) before = now;
  }
  b.CopyPieces(In(to_send.Begin(me), to_send.Count(me)), Out(to_receive.Begin(me), to_receive.Count(me)));
  return std::move(b).Finish();
}

constexpr Algorithm kAllToAll[] = {
    {"bruck", [](const Problem& p) { return p.kind == OpKind::kAllToAll && p.even; }, MakeBruck, /*index_order=*/false},
    {"pairwise", [](const Problem& p) { return p.kind == OpKind::kAllToAll; }, MakePairwise, /*index_order=*/false},
};

}  // namespace

absl::Span<const Algorithm> AllToAllAlgorithms() { return kAllToAll; }

}  // namespace shoal
