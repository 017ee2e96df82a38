#include "collectives/engine/shm/tiny_call.h"

#include <algorithm>
#include <cstddef>

#include "collectives/engine/op.h"

namespace shoal {
namespace {

const std::byte* Bytes(const Tensor& tensor) { return static_cast<const std::byte*>(tensor.raw()); }

bool Apart(const Tensor& a, const Tensor& b) {
  return Bytes(a) + a.bytes() <= Bytes(b) || Bytes(b) + b.bytes() <= Bytes(a);
}

// The counts of all ranks, as sums; `right`: they fit `whole`, and `part` is this rank's.
struct Counts {
  Counts(absl::Span<const int64_t> counts, int index, int size, const Tensor& whole, const Tensor& part)
      : Counts(counts, index, size) {
    right = right && sum == whole.elements() && IsPart(part) && whole.dtype() == part.dtype() &&
            (Apart(whole, part) || Bytes(part) == Bytes(whole) + begin * SizeOf(whole.dtype()));
  }
  Counts(absl::Span<const int64_t> counts, int index, int size) {
    right = static_cast<int>(counts.size()) == size;
    for (int rank = 0; right && rank < size; ++rank) {
      right = counts[rank] >= 0;
      if (rank == index) begin = sum, own = counts[rank];
      sum += counts[rank];
      largest = std::max(largest, counts[rank]);
    }
  }
  bool IsPart(const Tensor& part) const { return part.elements() == own; }

  bool right = false;
  int64_t sum = 0, largest = 0, begin = 0, own = 0;
};

}  // namespace

void TinyCall::SetIn(const Tensor& in) {
  op_->in = in.raw();
  op_->in_bytes = in.bytes();
}

void TinyCall::SetOut(const Tensor& out) {
  op_->out = out.raw();
  op_->out_bytes = out.bytes();
}

bool TinyCall::Sign(OpKind kind, DType dtype, ReduceOp reduce, int root, int64_t elements) {
  op_->kind = kind;
  op_->dtype = dtype;
  op_->reduce = reduce;
  op_->root = root;
  SignatureHash hash(kind, dtype, reduce, order_, root);
  hash.Mix(elements);
  op_->signature = hash.Signature();
  return reduce <= ReduceOp::kAverage && root >= 0 && root < size_;
}

bool TinyCall::Sign(OpKind kind, DType dtype, ReduceOp reduce, int root, absl::Span<const int64_t> counts) {
  op_->kind = kind;
  op_->dtype = dtype;
  op_->reduce = reduce;
  op_->root = root;
  SignatureHash hash(kind, dtype, reduce, order_, root);
  hash.MixAll(counts);
  op_->signature = hash.Signature();
  return reduce <= ReduceOp::kAverage && root >= 0 && root < size_;
}

bool TinyCall::AllReduce(const Tensor& in, const Tensor& out, ReduceOp reduce) {
  const bool right = in.elements() == out.elements() && in.dtype() == out.dtype() &&
                     (in.raw() == out.raw() || Apart(in, out));
  if (!right || !TinyGroup::Fits(OpKind::kAllReduce, in.bytes())) return false;
  SetIn(in);
  SetOut(out);
  return Sign(OpKind::kAllReduce, in.dtype(), reduce, /*root=*/0, in.elements());
}

bool TinyCall::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                             ReduceOp reduce) {
  const Counts all(counts, index_, size_, in, out);
  if (!all.right || !TinyGroup::Fits(OpKind::kReduceScatter, in.bytes())) return false;
  SetIn(in);
  SetOut(out);
  op_->part_begin_bytes = all.begin * SizeOf(in.dtype());
  return Sign(OpKind::kReduceScatter, in.dtype(), reduce, /*root=*/0, counts);
}

bool TinyCall::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out) {
  const Counts all(counts, index_, size_, out, in);
  if (!all.right || !TinyGroup::Fits(OpKind::kAllGather, all.largest * SizeOf(out.dtype()))) return false;
  SetIn(in);
  SetOut(out);
  return Sign(OpKind::kAllGather, out.dtype(), ReduceOp::kSum, /*root=*/0, counts);
}

bool TinyCall::AllToAllEven(const Tensor& in, const Tensor& out) {
  const bool right = in.elements() == out.elements() && in.dtype() == out.dtype() && in.elements() % size_ == 0 &&
                     Apart(in, out);
  if (!right || !TinyGroup::Fits(OpKind::kAllToAll, in.bytes())) return false;
  SetIn(in);
  SetOut(out);
  return Sign(OpKind::kAllToAll, in.dtype(), ReduceOp::kSum, /*root=*/0, in.elements());
}

bool TinyCall::Broadcast(const Tensor& in_out, int root) {
  if (!TinyGroup::Fits(OpKind::kBroadcast, in_out.bytes())) return false;
  root == index_ ? SetIn(in_out) : SetOut(in_out);
  return Sign(OpKind::kBroadcast, in_out.dtype(), ReduceOp::kSum, root, in_out.elements());
}

bool TinyCall::Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp reduce) {
  if (!TinyGroup::Fits(OpKind::kReduce, in.bytes())) return false;
  SetIn(in);
  if (root == index_) {
    if (in.elements() != out.elements() || in.dtype() != out.dtype()) return false;
    if (in.raw() != out.raw() && !Apart(in, out)) return false;
    SetOut(out);
  }
  return Sign(OpKind::kReduce, in.dtype(), reduce, root, in.elements());
}

bool TinyCall::Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root) {
  const Counts all = root == index_ ? Counts(counts, index_, size_, out, in) : Counts(counts, index_, size_);
  if (!all.right || !all.IsPart(in)) return false;
  if (!TinyGroup::Fits(OpKind::kGather, all.largest * SizeOf(in.dtype()))) return false;
  SetIn(in);
  if (root == index_) SetOut(out);
  return Sign(OpKind::kGather, in.dtype(), ReduceOp::kSum, root, counts);
}

bool TinyCall::Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root) {
  const Counts all = root == index_ ? Counts(counts, index_, size_, in, out) : Counts(counts, index_, size_);
  if (!all.right || !all.IsPart(out)) return false;
  if (!TinyGroup::Fits(OpKind::kScatter, all.sum * SizeOf(out.dtype()))) return false;
  if (root == index_) SetIn(in);
  SetOut(out);
  op_->part_begin_bytes = all.begin * SizeOf(out.dtype());
  return Sign(OpKind::kScatter, out.dtype(), ReduceOp::kSum, root, counts);
}

bool TinyCall::Barrier() { return Sign(OpKind::kBarrier, DType::kU8, ReduceOp::kSum, /*root=*/0, 0); }

}  // namespace shoal
