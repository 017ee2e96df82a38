#include "collectives/program/builder.h"

#include <numeric>

#include "runtime/base/check.h"

namespace shoal {

size_t AccessHistory::SplitAt(int64_t at) {
  auto next = std::upper_bound(segments_.begin(), segments_.end(), at,
                               [](int64_t value, const Segment& segment) { return value < segment.begin; });
  const auto found = next - 1;
  if (found->begin == at) return found - segments_.begin();
  Segment rest = *found;
  rest.begin = at;
  const size_t index = next - segments_.begin();
  segments_.insert(next, rest);
  return index;
}

void AccessHistory::Read(int64_t begin, int64_t end, int32_t instruction, std::vector<int32_t>* after) {
  const size_t first = SplitAt(begin);
  const size_t last = SplitAt(end);
  for (size_t i = first; i < last; ++i) {
    if (segments_[i].writer >= 0) after->push_back(segments_[i].writer);
    readers_.push_back({instruction, segments_[i].readers});
    segments_[i].readers = static_cast<int32_t>(readers_.size()) - 1;
  }
}

void AccessHistory::Write(int64_t begin, int64_t end, int32_t instruction, std::vector<int32_t>* after) {
  const size_t first = SplitAt(begin);
  const size_t last = SplitAt(end);
  for (size_t i = first; i < last; ++i) {
    const Segment& segment = segments_[i];
    // Readers came after the writer already.
    if (segment.readers < 0 && segment.writer >= 0) after->push_back(segment.writer);
    for (int32_t r = segment.readers; r >= 0; r = readers_[r].next) after->push_back(readers_[r].instruction);
  }
  segments_[first] = {begin, instruction, -1};
  segments_.erase(segments_.begin() + first + 1, segments_.begin() + last);
}

Parts Parts::Of(absl::Span<const int64_t> counts) {
  Parts parts;
  parts.begins.resize(counts.size() + 1);
  std::partial_sum(counts.begin(), counts.end(), parts.begins.begin() + 1);
  return parts;
}

Parts Parts::Equal(int64_t elements, int parts, int64_t unit) {
  const int64_t each = (elements + parts - 1) / parts;
  const int64_t rounded = (each + unit - 1) / unit * unit;
  Parts result;
  result.begins.reserve(parts + 1);
  for (int i = 0; i <= parts; ++i) result.begins.push_back(std::min(elements, i * rounded));
  return result;
}

int64_t Parts::Longest() const {
  int64_t longest = 0;
  for (size_t i = 1; i < begins.size(); ++i) longest = std::max(longest, begins[i] - begins[i - 1]);
  return longest;
}

Builder::Builder(const Problem& problem)
    : problem_(problem), piece_(problem.piece), sent_(problem.size), received_(problem.size) {
  const auto own_begin = [&] {
    return std::accumulate(problem.counts.begin(), problem.counts.begin() + problem.rank, int64_t{0});
  };
  switch (problem.kind) {
    case OpKind::kBroadcast:
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      shared_ = true;
      break;
    case OpKind::kReduceScatter:
    case OpKind::kScatter:
      shared_ = problem.in_place;
      if (shared_) in_shift_ = -own_begin();
      break;
    case OpKind::kAllGather:
    case OpKind::kGather:
      shared_ = problem.in_place;
      if (shared_) in_shift_ = own_begin();
      break;
    default:
      shared_ = problem.in_place;
  }
}

void Builder::Reserve(int64_t instructions) {
  program_.instructions.reserve(instructions);
  program_.sources.reserve(instructions);
  program_.dependencies.reserve(instructions);
}

Region Builder::Scratch(int64_t count) {
  const int64_t begin = program_.scratch;
  program_.scratch += count;
  return {Buffer::kScratch, -1, begin, count};
}

Builder::Place Builder::PlaceOf(const Region& region) const {
  switch (region.buffer) {
    case Buffer::kIn:
      return shared_ ? Place{0, region.begin + in_shift_} : Place{-1, region.begin};
    case Buffer::kOut:
      return {0, region.begin};
    case Buffer::kScratch:
      return {1, region.begin};
    case Buffer::kMessage:
      return {-1, 0};
  }
  return {-1, 0};
}

bool Builder::SamePlace(const Region& a, const Region& b) const {
  if (a.buffer == Buffer::kMessage || b.buffer == Buffer::kMessage) return false;
  const Place x = PlaceOf(a), y = PlaceOf(b);
  return x.memory == y.memory && x.begin == y.begin;
}

void Builder::Begin(absl::Span<const int> after) {
  after_.clear();
  for (int i : after) {
    if (i >= 0) after_.push_back(i);
  }
}

void Builder::OrderRead(const Region& region) {
  if (region.buffer == Buffer::kMessage) {
    after_.push_back(region.receive);
    return;
  }
  const Place place = PlaceOf(region);
  if (place.memory >= 0) history_[place.memory].Read(place.begin, place.begin + region.count, Next(), &after_);
}

void Builder::OrderWrite(const Region& region) {
  const Place place = PlaceOf(region);
  SHOAL_CHECK(region.buffer == Buffer::kOut || region.buffer == Buffer::kScratch);
  history_[place.memory].Write(place.begin, place.begin + region.count, Next(), &after_);
}

absl::Span<const int32_t> Builder::Ordered() {
  if (after_.size() > 1) {
    std::sort(after_.begin(), after_.end());
    after_.erase(std::unique(after_.begin(), after_.end()), after_.end());
  }
  if (!after_.empty() && after_.back() == Next()) after_.pop_back();  // It reads what it writes.
  return after_;
}

int Builder::Send(int peer, Region region, absl::Span<const int> after) {
  if (region.count == 0 || peer == rank()) return -1;
  Begin(after);
  OrderRead(region);
  return program_.Send(peer, sent_[peer]++, region, Ordered());
}

int Builder::Receive(int peer, Region into, absl::Span<const int> after) {
  if (into.count == 0 || peer == rank()) return -1;
  Begin(after);
  OrderWrite(into);
  return program_.Receive(peer, received_[peer]++, into, Ordered());
}

Region Builder::ReceiveView(int peer, int64_t count) {
  if (count == 0) return {Buffer::kMessage, -1, 0, 0};
  const int index = program_.Receive(peer, received_[peer]++, {Buffer::kMessage, -1, 0, count});
  return {Buffer::kMessage, index, 0, count};
}

int Builder::Lend(int peer, Region region) {
  if (region.count == 0 || peer == rank()) return -1;
  Begin({});
  OrderWrite(region);
  const int index = program_.Send(peer, sent_[peer]++, region, Ordered());
  program_.instructions[index].lends = true;
  return index;
}

Region Builder::Borrow(int peer, int64_t count) {
  const Region view = ReceiveView(peer, count);
  if (view.receive >= 0) program_.instructions[view.receive].lends = true;
  return view;
}

int Builder::ReduceAndReturn(absl::Span<const Region> from, Region target) {
  const int index = Reduce(from, target, /*final=*/true);
  if (index >= 0) program_.instructions[index].returns = from.size() > 1;
  return index;
}

int Builder::CopyAndReturn(Region from, Region borrowed) {
  if (borrowed.count == 0) return -1;
  Begin({});
  OrderRead(from);
  OrderRead(borrowed);
  const int index = program_.Copy(from, borrowed, Ordered());
  program_.instructions[index].returns = true;
  return index;
}

int Builder::Reduce(absl::Span<const Region> from, Region target, bool final) {
  if (target.count == 0) return -1;
  Begin({});
  for (const Region& region : from) OrderRead(region);
  OrderWrite(target);
  return program_.Reduce(from, target, final, Ordered());
}

int Builder::Copy(Region from, Region to) {
  return SamePlace(from, to) ? -1 : Reduce({&from, 1}, to, /*final=*/false);
}

int64_t Builder::PiecesOf(int64_t count) const {
  if (count == 0) return 0;
  return piece_ > 0 ? (count + piece_ - 1) / piece_ : 1;
}

Region Builder::PieceOf(const Region& region, int64_t k) const {
  if (piece_ <= 0) return k == 0 ? region : Sub(region, 0, 0);
  const int64_t begin = std::min(region.count, k * piece_);
  return Sub(region, begin, std::min(piece_, region.count - begin));
}

void Builder::SendPieces(int peer, const Region& region) {
  ForPieces(region, [&](const Region& piece) { Send(peer, piece); });
}

void Builder::ReceivePieces(int peer, const Region& into) {
  ForPieces(into, [&](const Region& piece) { Receive(peer, piece); });
}

void Builder::CopyPieces(const Region& from, const Region& to) {
  const int64_t pieces = PiecesOf(from.count);
  for (int64_t k = 0; k < pieces; ++k) Copy(PieceOf(from, k), PieceOf(to, k));
}

void Builder::FinishPieces(const Region& from, const Region& to) {
  const int64_t pieces = PiecesOf(from.count);
  for (int64_t k = 0; k < pieces; ++k) Reduce({PieceOf(from, k)}, PieceOf(to, k), /*final=*/true);
}

void Builder::ExchangePieces(int to, const Region& mine, int from, const Region& into) {
  const int64_t pieces = std::max(PiecesOf(mine.count), PiecesOf(into.count));
  for (int64_t k = 0; k < pieces; ++k) {
    Send(to, PieceOf(mine, k));
    Receive(from, PieceOf(into, k));
  }
}

PieceRing::PieceRing(Builder* builder, int64_t count) {
  constexpr int64_t kPlaces = 4;
  const int64_t places = std::min(kPlaces, builder->PiecesOf(count));
  const int64_t longest = places > 0 ? builder->PieceOf(In(0, count), 0).count : 0;
  for (int64_t i = 0; i < places; ++i) places_.push_back(builder->Scratch(longest));
}

Region PieceRing::Next(int64_t count) { return Sub(places_[next_++ % places_.size()], 0, count); }

}  // namespace shoal
