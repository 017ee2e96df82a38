#include "collectives/engine/arguments.h"

#include <algorithm>
#include <set>

#include "runtime/base/status.h"

namespace shoal {
namespace {

const std::byte* Bytes(const Tensor& tensor) { return static_cast<const std::byte*>(tensor.raw()); }

bool Overlap(const Tensor& a, const Tensor& b) {
  return a.bytes() > 0 && b.bytes() > 0 && Bytes(a) < Bytes(b) + b.bytes() && Bytes(b) < Bytes(a) + a.bytes();
}

bool BeginsAt(const Tensor& part, const Tensor& whole, int64_t begin_elements) {
  return Bytes(part) == Bytes(whole) + begin_elements * SizeOf(whole.dtype());
}

int64_t Begin(const Operation& op, int index) {
  int64_t begin = 0;
  for (int i = 0; i < index; ++i) begin += op.counts[i];
  return begin;
}

absl::Status CheckCounts(absl::Span<const int64_t> counts, const Tensor& whole, int size, const char* name) {
  if (static_cast<int>(counts.size()) != size) {
    return absl::InvalidArgumentError(absl::StrCat(counts.size(), " ", name, " for ", size, " ranks"));
  }
  int64_t sum = 0;
  for (int64_t count : counts) {
    if (count < 0) return absl::InvalidArgumentError(absl::StrCat(name, ": ", count));
    sum += count;
  }
  if (sum != whole.elements()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " have a sum of ", sum, ", the tensor has ", whole.elements(), " elements"));
  }
  return absl::OkStatus();
}

absl::Status CheckTensor(const Tensor& tensor, const char* name, int64_t elements, DType dtype) {
  if (tensor.dtype() == dtype && tensor.elements() == elements) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " has ", tensor.elements(), " elements of ",
                                                 AbslSv(Name(tensor.dtype())), ", want ", elements, " of ",
                                                 AbslSv(Name(dtype))));
}

absl::Status CheckApart(const Tensor& part, const Tensor& whole, int64_t begin_elements, const char* text) {
  if (!Overlap(part, whole) || BeginsAt(part, whole, begin_elements)) return absl::OkStatus();
  return absl::InvalidArgumentError(text);
}

absl::Status CheckRoot(const Operation& op, int size) {
  if (op.root >= 0 && op.root < size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("root ", op.root, " in a group of ", size));
}

absl::Status CheckReduced(const Operation& op) {
  SHOAL_RETURN_IF_ERROR(CheckTensor(op.out, "out", op.in.elements(), op.dtype));
  return CheckApart(op.out, op.in, 0, "in and out overlap, but do not begin at the same byte");
}

// reduce_scatter, and scatter on the root.
absl::Status CheckScattered(const Operation& op, int index, int size) {
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.in, size, "counts"));
  SHOAL_RETURN_IF_ERROR(CheckTensor(op.out, "out", op.counts[index], op.in.dtype()));
  return CheckApart(op.out, op.in, Begin(op, index), "out overlaps in elsewhere than at this rank's part");
}

// all_gather, and gather on the root.
absl::Status CheckGathered(const Operation& op, int index, int size) {
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.out, size, "counts"));
  SHOAL_RETURN_IF_ERROR(CheckTensor(op.in, "in", op.counts[index], op.out.dtype()));
  return CheckApart(op.in, op.out, Begin(op, index), "in overlaps out elsewhere than at this rank's part");
}

absl::Status CheckPart(const Operation& op, const Tensor& part, const char* name, int index, int size) {
  if (static_cast<int>(op.counts.size()) != size) {
    return absl::InvalidArgumentError(absl::StrCat(op.counts.size(), " counts for ", size, " ranks"));
  }
  return CheckTensor(part, name, op.counts[index], op.dtype);
}

absl::Status CheckAllToAll(const Operation& op, int index, int size) {
  if (op.even && op.in.elements() % size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(op.in.elements(), " elements cannot be cut into ", size, " equal parts"));
  }
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.in, size, "send counts"));
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.recv_counts, op.out, size, "receive counts"));
  if (op.in.dtype() != op.out.dtype()) {
    return absl::InvalidArgumentError(
        absl::StrCat("in is ", AbslSv(Name(op.in.dtype())), ", out ", AbslSv(Name(op.out.dtype()))));
  }
  if (op.counts[index] != op.recv_counts[index]) {
    return absl::InvalidArgumentError(
        absl::StrCat("sends ", op.counts[index], " elements to itself, expects ", op.recv_counts[index]));
  }
  return Overlap(op.in, op.out) ? absl::InvalidArgumentError("in and out overlap") : absl::OkStatus();
}

absl::Status CheckMove(const Operation& op, const SparseMove& move, int index, int size) {
  if (move.chunk < 0 || move.chunk >= static_cast<int>(op.chunks.size())) {
    return absl::InvalidArgumentError(absl::StrCat("a move of chunk ", move.chunk, " of ", op.chunks.size()));
  }
  if (move.owner < 0 || move.owner >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk ", move.chunk, ": owner ", move.owner, " in a group of ", size));
  }
  int last = -1;
  for (int holder : move.holders) {
    if (holder <= last || holder >= size || holder == move.owner) {
      return absl::InvalidArgumentError(absl::StrCat("chunk ", move.chunk, ": holder ", holder,
                                                     ": not in the group, not ascending, or the owner"));
    }
    last = holder;
    const Tensor& chunk = op.chunks[move.chunk];
    if (holder == index && !chunk.empty() && chunk.dtype() != op.dtype) {
      return absl::InvalidArgumentError(absl::StrCat("chunk ", move.chunk, " is ", AbslSv(Name(chunk.dtype())),
                                                     ", others are ", AbslSv(Name(op.dtype))));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSparse(const Operation& op, int index, int size) {
  std::set<int> moved;
  for (const SparseMove& move : op.moves) {
    SHOAL_RETURN_IF_ERROR(CheckMove(op, move, index, size));
    if (!moved.insert(move.chunk).second) {
      return absl::InvalidArgumentError(absl::StrCat("two moves of chunk ", move.chunk));
    }
  }
  for (size_t i = 0; i < op.chunks.size(); ++i) {
    if (!op.chunks[i].empty() && op.chunks[i].dtype() != op.dtype) {
      return absl::InvalidArgumentError(absl::StrCat("chunk ", i, " is ", AbslSv(Name(op.chunks[i].dtype())),
                                                     ", others are ", AbslSv(Name(op.dtype))));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTransfer(const Operation& op, int index, int size) {
  if (op.root >= 0 && op.root < size && op.root != index) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("rank ", op.root, " in a group of ", size, ", from rank ", index));
}

absl::Status CheckWire(const Operation& op) {
  if (op.wire == WireFormat::kAsIs) return absl::OkStatus();
  const bool kind = op.kind == OpKind::kAllReduce || op.kind == OpKind::kReduceScatter;
  const bool reduce = op.reduce == ReduceOp::kSum || op.reduce == ReduceOp::kAverage;
  if (kind && reduce && op.dtype == DType::kF32 && op.wire <= WireFormat::kFp8) return absl::OkStatus();
  return absl::InvalidArgumentError("wire formats are for sums and averages of f32 in all_reduce and reduce_scatter");
}

}  // namespace

absl::Status CheckArguments(const Operation& op, int index, int size) {
  if (op.reduce > ReduceOp::kAverage) return absl::InvalidArgumentError("unknown reduction");
  SHOAL_RETURN_IF_ERROR(CheckWire(op));
  switch (op.kind) {
    case OpKind::kAllReduce:
      return CheckReduced(op);
    case OpKind::kReduceScatter:
      return CheckScattered(op, index, size);
    case OpKind::kAllGather:
      return CheckGathered(op, index, size);
    case OpKind::kAllToAll:
      return CheckAllToAll(op, index, size);
    case OpKind::kBroadcast:
      return CheckRoot(op, size);
    case OpKind::kReduce:
      SHOAL_RETURN_IF_ERROR(CheckRoot(op, size));
      return index == op.root ? CheckReduced(op) : absl::OkStatus();
    case OpKind::kGather:
      SHOAL_RETURN_IF_ERROR(CheckRoot(op, size));
      return index == op.root ? CheckGathered(op, index, size) : CheckPart(op, op.in, "in", index, size);
    case OpKind::kScatter:
      SHOAL_RETURN_IF_ERROR(CheckRoot(op, size));
      return index == op.root ? CheckScattered(op, index, size) : CheckPart(op, op.out, "out", index, size);
    case OpKind::kBarrier:
      return absl::OkStatus();
    case OpKind::kSend:
    case OpKind::kReceive:
      return CheckTransfer(op, index, size);
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      return CheckSparse(op, index, size);
  }
  return absl::InvalidArgumentError("unknown operation");
}

bool IsInPlace(const Operation& op, int index) {
  switch (op.kind) {
    case OpKind::kAllReduce:
    case OpKind::kReduceScatter:
    case OpKind::kAllGather:
      return Overlap(op.in, op.out);
    case OpKind::kReduce:
    case OpKind::kGather:
    case OpKind::kScatter:
      return index == op.root && Overlap(op.in, op.out);
    case OpKind::kBroadcast:
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      return true;
    default:
      return false;
  }
}

}  // namespace shoal
