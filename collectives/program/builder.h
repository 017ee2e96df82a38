// Writes one rank's program. Algorithms say what a sequential program would do, in its order; the builder adds the
// dependencies without which another order would change its meaning (read after write, write after read, write after
// write; kIn and kOut may be the same memory), and numbers the messages. So algorithms need no thought of hazards, and
// can be composed: one written after another is correct.
//
// Both ends of a message must name it in the same order among the messages of that sender to that receiver.
//
// A trap that it cannot prevent: two ranks that read each other's memory as views, and reduce into the memory which the
// other reads, wait for each other for ever. Reduce elsewhere, or receive into scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "collectives/program/program.h"

namespace shoal {

// Who read and wrote which elements of one buffer last.
class AccessHistory {
 public:
  // Appends to `after` the instructions that must end before `instruction` may read, or write, the elements.
  void Read(int64_t begin, int64_t end, int32_t instruction, std::vector<int32_t>* after);
  void Write(int64_t begin, int64_t end, int32_t instruction, std::vector<int32_t>* after);

 private:
  // Elements from `begin` to the next segment's.
  struct Segment {
    int64_t begin;
    int32_t writer;   // -1: none.
    int32_t readers;  // Since the last write: the newest one's place in readers_; -1: none.
  };
  struct Reader {
    int32_t instruction;
    int32_t next;  // Lists may share their ends: a reader of many elements is split with its segment.
  };

  // The index of the segment that begins at `at`, after splitting one if need be.
  size_t SplitAt(int64_t at);

  std::vector<Segment> segments_ = {{std::numeric_limits<int64_t>::min(), -1, -1}};
  std::vector<Reader> readers_;
};

// Boundaries of consecutive parts: part i is [begins[i], begins[i + 1]).
struct Parts {
  std::vector<int64_t> begins;

  static Parts Of(absl::Span<const int64_t> counts);
  // At most `parts` equal ones, rounded up to `unit` elements; the last ones may be empty.
  static Parts Equal(int64_t elements, int parts, int64_t unit);

  int64_t Begin(int i) const { return begins[i]; }
  int64_t Count(int i) const { return begins[i + 1] - begins[i]; }
  int64_t Longest() const;
};

inline Region In(int64_t begin, int64_t count) { return {Buffer::kIn, -1, begin, count}; }
inline Region Out(int64_t begin, int64_t count) { return {Buffer::kOut, -1, begin, count}; }
inline Region Sub(Region region, int64_t offset, int64_t count) {
  region.begin += offset;
  region.count = count;
  return region;
}

class Builder {
 public:
  // Borrows the problem.
  explicit Builder(const Problem& problem);

  int rank() const { return problem_.rank; }
  int size() const { return problem_.size; }
  void Reserve(int64_t instructions);
  Region Scratch(int64_t count);  // Fresh scratch memory.

  // Empty regions, and messages to oneself, make no instruction. `after`: beyond what memory demands. They return the
  // instruction's index, or -1.
  int Send(int peer, Region region, absl::Span<const int> after = {});
  int Receive(int peer, Region into, absl::Span<const int> after = {});
  Region ReceiveView(int peer, int64_t count);
  int Reduce(absl::Span<const Region> from, Region target, bool final);
  // Lends kOut or scratch memory to a peer, which takes it by Borrow and gives it back by ReduceAndReturn: the last step of a
  // reduction, into `target` and into all that was borrowed of `from`. What follows here and uses the region waits for that.
  int Lend(int peer, Region region);
  Region Borrow(int peer, int64_t count);
  int ReduceAndReturn(absl::Span<const Region> from, Region target);
  // What was borrowed is given back with these values.
  int CopyAndReturn(Region from, Region borrowed);
  // Nothing to do when both are the same memory.
  int Copy(Region from, Region to);

  // Whether the first elements of both are the same memory.
  bool SamePlace(const Region& a, const Region& b) const;

  // How many pieces (Problem::piece) a region of `count` elements has, and the k-th of them; empty past the last.
  int64_t PiecesOf(int64_t count) const;
  Region PieceOf(const Region& region, int64_t k) const;
  // Pieces in turn: each(Region).
  template <class Each>
  void ForPieces(const Region& region, Each each) const {
    const int64_t pieces = PiecesOf(region.count);
    for (int64_t k = 0; k < pieces; ++k) each(PieceOf(region, k));
  }

  // Whole regions, piece by piece. Finish: copies, and ends a reduction which has one contribution.
  void SendPieces(int peer, const Region& region);
  void ReceivePieces(int peer, const Region& into);
  void CopyPieces(const Region& from, const Region& to);
  void FinishPieces(const Region& from, const Region& to);
  // `mine` to `to` and `into` from `from`, a piece of each in turn.
  void ExchangePieces(int to, const Region& mine, int from, const Region& into);
  // Likewise, but what comes is handed to each(view, k).
  template <class Each>
  void ExchangeViews(int to, const Region& mine, int from, int64_t count, Each each) {
    const Region sizes = In(0, count);
    const int64_t pieces = std::max(PiecesOf(mine.count), PiecesOf(count));
    for (int64_t k = 0; k < pieces; ++k) {
      Send(to, PieceOf(mine, k));
      const Region view = ReceiveView(from, PieceOf(sizes, k).count);
      if (view.count > 0) each(view, k);
    }
  }

  Program Finish() && { return std::move(program_); }

 private:
  struct Place {
    int memory;  // Index in history_; -1: read only, or of another rank.
    int64_t begin;
  };
  Place PlaceOf(const Region& region) const;
  void Begin(absl::Span<const int> after);
  void OrderRead(const Region& region);
  void OrderWrite(const Region& region);
  absl::Span<const int32_t> Ordered();
  int32_t Next() const { return static_cast<int32_t>(program_.instructions.size()); }

  const Problem& problem_;
  bool shared_ = false;    // kIn and kOut are one memory, kIn's element 0 at kOut's in_shift_.
  int64_t in_shift_ = 0;
  int64_t piece_;
  Program program_;
  AccessHistory history_[2];        // kOut, kScratch. kIn is only read, unless it is shared with kOut.
  std::vector<int32_t> after_;
  std::vector<uint32_t> sent_, received_;  // Messages so far, by peer.
};

// Scratch memory for a few pieces in turn, where what is put is sent on piece by piece.
class PieceRing {
 public:
  // For pieces of a region of `count` elements at most.
  PieceRing(Builder* builder, int64_t count);
  Region Next(int64_t count);

 private:
  std::vector<Region> places_;
  size_t next_ = 0;
};

// Parts of algorithms that many ranks share begin at multiples of it.
inline constexpr int64_t kSmallPartUnit = 16;

}  // namespace shoal
