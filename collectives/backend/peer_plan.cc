#include "collectives/backend/peer_plan.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Parts of an all_reduce begin where packs of elements may be read.
constexpr int64_t kPartUnit = 64;

bool Holds(const SparseMove& move, int rank) { return std::binary_search(move.holders.begin(), move.holders.end(), rank); }

// Whether others read rank `rank`'s chunk of this move.
bool IsRead(const Operation& op, const SparseMove& move, int rank) {
  if (op.kind == OpKind::kSparseReduceScatter) return Holds(move, rank);
  return move.owner == rank && !move.holders.empty();
}

size_t SharedCount(const Operation& op, int rank) {
  switch (op.kind) {
    case OpKind::kAllReduce: return 2;
    case OpKind::kBroadcast:
    case OpKind::kScatter: return rank == op.root ? 1 : 0;
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      return static_cast<size_t>(
          std::count_if(op.moves.begin(), op.moves.end(), [&](const SparseMove& move) { return IsRead(op, move, rank); }));
    default: return 1;
  }
}

size_t CountsOf(const Operation& op, int size) { return op.kind == OpKind::kAllToAll ? static_cast<size_t>(size) : 0; }

// Plans one operation; the first error stays.
class ReadPlanner {
 public:
  ReadPlanner(const Operation& op, int index, absl::Span<const PeerNote> notes, const OpenShared& open)
      : op_(op), index_(index), size_(static_cast<int>(notes.size())), notes_(notes), open_(open),
        own_(TensorsToShare(op, index)), begins_(Displacements(op.counts)) {}

  absl::StatusOr<PeerPlan> Make() {
    plan_.phases.resize(op_.kind == OpKind::kAllReduce ? 2 : 1);
    switch (op_.kind) {
      case OpKind::kAllReduce: AllReduce(); break;
      case OpKind::kReduceScatter: SumTo(begins_[static_cast<size_t>(index_)], op_.out, begins_.back()); break;
      case OpKind::kAllGather:
      case OpKind::kGather: Collect(); break;
      case OpKind::kAllToAll: AllToAll(); break;
      case OpKind::kBroadcast:
        if (index_ != op_.root) Copy(Of(op_.root, 0, op_.in.elements()), op_.in);
        break;
      case OpKind::kReduce:
        if (index_ == op_.root) SumTo(0, op_.out, op_.in.elements());
        break;
      case OpKind::kScatter: Copy(Part(Of(op_.root, 0, begins_.back()), begins_, index_), op_.out); break;
      case OpKind::kSparseAllGather: SparseAllGather(); break;
      case OpKind::kSparseReduceScatter: SparseReduceScatter(); break;
      case OpKind::kBarrier:
      case OpKind::kSend:
      case OpKind::kReceive: SHOAL_CHECK(false) << "planned elsewhere";
    }
    if (!status_.ok()) return status_;
    return std::move(plan_);
  }

 private:
  // Others first that are next to this rank, so that not all read the same one at a time.
  int Peer(int step) const { return (index_ + step) % size_; }

  // Tensor `i` of those that a rank shares, which should have so many elements.
  Tensor Of(int rank, size_t i, int64_t elements) {
    if (rank == index_) return own_[i];
    const SharedTensor& shared = notes_[static_cast<size_t>(rank)].tensors[i];
    if (shared.bytes != elements * SizeOf(op_.dtype)) {
      Fail(absl::InternalError(absl::StrCat("rank ", rank, " has ", shared.bytes, " bytes, rank ", index_, " expects ",
                                            elements * SizeOf(op_.dtype))));
    }
    if (!status_.ok() || elements == 0) return Tensor(nullptr, {elements}, op_.dtype);
    const absl::StatusOr<std::byte*> address = open_(shared);
    if (!address.ok()) Fail(Annotate(address.status(), absl::StrCat("rank ", rank)));
    return Tensor(address.ok() ? *address : nullptr, {elements}, op_.dtype);
  }
  void Fail(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }
  static Tensor Part(const Tensor& whole, const std::vector<int64_t>& begins, int rank) {
    const size_t i = static_cast<size_t>(rank);
    return whole.Elements(begins[i], {begins[i + 1] - begins[i]});
  }
  void Copy(const Tensor& from, const Tensor& to) {
    if (!to.empty() && from.raw() != to.raw()) plan_.phases.back().copies.push_back({from, to});
  }
  // The sum of all ranks' elements from `begin` on, of tensors that have `elements`.
  void SumTo(int64_t begin, const Tensor& to, int64_t elements) {
    PeerPlan::Summed sum = {.to = to};
    for (int rank = 0; rank < size_; ++rank) {
      sum.from.push_back(Of(rank, 0, elements).Elements(begin, {to.elements()}));
    }
    if (!to.empty()) plan_.phases.front().sums.push_back(std::move(sum));
  }

  void AllReduce() {
    const int64_t elements = op_.in.elements();
    const int64_t part = ((elements + size_ - 1) / size_ + kPartUnit - 1) / kPartUnit * kPartUnit;
    std::vector<int64_t> begins;
    for (int rank = 0; rank <= size_; ++rank) begins.push_back(std::min(elements, rank * part));
    SumTo(begins[static_cast<size_t>(index_)], Part(op_.out, begins, index_), elements);
    for (int step = 1; step < size_; ++step) {
      const int rank = Peer(step);
      if (Part(op_.out, begins, rank).empty()) continue;
      Copy(Part(Of(rank, 1, elements), begins, rank), Part(op_.out, begins, rank));
    }
  }

  // all_gather, and gather on the root.
  void Collect() {
    if (op_.kind == OpKind::kGather && index_ != op_.root) return;
    for (int step = 0; step < size_; ++step) {
      const int rank = Peer(step);
      Copy(Of(rank, 0, op_.counts[static_cast<size_t>(rank)]), Part(op_.out, begins_, rank));
    }
  }

  void AllToAll() {
    const std::vector<int64_t> out_begins = Displacements(op_.recv_counts);
    for (int step = 0; step < size_; ++step) {
      const int rank = Peer(step);
      const std::vector<int64_t>& sent = notes_[static_cast<size_t>(rank)].counts;
      const int64_t expected = op_.recv_counts[static_cast<size_t>(rank)];
      if (sent[static_cast<size_t>(index_)] != expected) {
        return Fail(absl::InternalError(absl::StrCat("rank ", rank, " sends ", sent[static_cast<size_t>(index_)], " elements to rank ",
                                                     index_, ", which expects ", expected)));
      }
      const std::vector<int64_t> begins = Displacements(sent);
      const Tensor to = Part(op_.out, out_begins, rank);
      if (!to.empty()) Copy(Part(Of(rank, 0, begins.back()), begins, index_), to);
    }
  }

  // Which of the tensors that a rank shares is its chunk of a move: they are in the order of the moves.
  size_t& NextOf(int rank) { return next_[static_cast<size_t>(rank)]; }
  const Tensor& Chunk(const SparseMove& move) const { return op_.chunks[static_cast<size_t>(move.chunk)]; }

  void SparseAllGather() {
    for (const SparseMove& move : op_.moves) {
      if (move.holders.empty()) continue;
      const size_t i = NextOf(move.owner)++;
      if (Holds(move, index_)) Copy(Of(move.owner, i, Chunk(move).elements()), Chunk(move));
    }
  }

  void SparseReduceScatter() {
    for (const SparseMove& move : op_.moves) {
      PeerPlan::Summed sum;
      if (move.owner == index_) sum = {.from = {Chunk(move)}, .to = Chunk(move)};
      for (const int holder : move.holders) {
        const size_t i = NextOf(holder)++;
        if (move.owner == index_) sum.from.push_back(Of(holder, i, sum.to.elements()));
      }
      if (sum.from.size() > 1 && !sum.to.empty()) plan_.phases.back().sums.push_back(std::move(sum));
    }
  }

  const Operation& op_;
  const int index_, size_;
  const absl::Span<const PeerNote> notes_;
  const OpenShared& open_;
  const std::vector<Tensor> own_;
  const std::vector<int64_t> begins_;
  std::vector<size_t> next_ = std::vector<size_t>(static_cast<size_t>(size_), 0);
  absl::Status status_;
  PeerPlan plan_;
};

}  // namespace

std::vector<Tensor> TensorsToShare(const Operation& op, int index) {
  std::vector<Tensor> tensors;
  if (op.kind == OpKind::kSparseAllGather || op.kind == OpKind::kSparseReduceScatter) {
    for (const SparseMove& move : op.moves) {
      if (IsRead(op, move, index)) tensors.push_back(op.chunks[static_cast<size_t>(move.chunk)]);
    }
    return tensors;
  }
  const size_t count = SharedCount(op, index);
  if (count > 0) tensors.push_back(op.in);
  if (count > 1) tensors.push_back(op.out);
  return tensors;
}

int64_t NoteBytes(const Operation& op, int rank, int size) {
  return static_cast<int64_t>(sizeof(PeerNote::Head) + SharedCount(op, rank) * sizeof(SharedTensor) +
                              CountsOf(op, size) * sizeof(int64_t));
}

Tensor EncodeNote(const PeerNote& note) {
  const size_t tensors = note.tensors.size() * sizeof(SharedTensor), counts = note.counts.size() * sizeof(int64_t);
  const Tensor bytes = Empty({static_cast<int64_t>(sizeof(note.head) + tensors + counts)}, DType::kU8);
  std::byte* to = static_cast<std::byte*>(bytes.raw());
  std::memcpy(to, &note.head, sizeof(note.head));
  to += sizeof(note.head);
  if (tensors > 0) std::memcpy(to, note.tensors.data(), tensors);
  if (counts > 0) std::memcpy(to + tensors, note.counts.data(), counts);
  return bytes;
}

PeerNote DecodeNote(const Operation& op, int rank, int size, absl::Span<const std::byte> bytes) {
  PeerNote note;
  note.tensors.resize(SharedCount(op, rank));
  note.counts.resize(CountsOf(op, size));
  const size_t tensors = note.tensors.size() * sizeof(SharedTensor), counts = note.counts.size() * sizeof(int64_t);
  SHOAL_CHECK_EQ(bytes.size(), sizeof(note.head) + tensors + counts);
  const std::byte* from = bytes.data();
  std::memcpy(&note.head, from, sizeof(note.head));
  from += sizeof(note.head);
  if (tensors > 0) std::memcpy(note.tensors.data(), from, tensors);
  if (counts > 0) std::memcpy(note.counts.data(), from + tensors, counts);
  return note;
}

bool DoneByPeers(const Operation& op) {
  if (op.wire != WireFormat::kAsIs || !op.algorithm.empty()) return false;
  const bool reduces = op.kind == OpKind::kAllReduce || op.kind == OpKind::kReduceScatter || op.kind == OpKind::kReduce ||
                       op.kind == OpKind::kSparseReduceScatter;
  if (!reduces) return true;
  return op.reduce == ReduceOp::kSum && (op.dtype == DType::kF32 || op.dtype == DType::kBF16);
}

absl::StatusOr<PeerPlan> PlanPeerReads(const Operation& op, int index, absl::Span<const PeerNote> notes, const OpenShared& open) {
  return ReadPlanner(op, index, notes, open).Make();
}

}  // namespace shoal
