#include "collectives/backend/operation_group.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/kernels/device_kernels.h"

namespace shoal {

Work OperationGroup::Make(Operation op, const OpOptions& options) {
  op.wire = options.wire;
  op.order = options.order;
  op.algorithm = std::string(options.algorithm);
  op.label = std::string(options.label);
  return Issue(std::move(op), options);
}

Work OperationGroup::AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) {
  return Make({.kind = OpKind::kAllReduce, .reduce = op, .dtype = in.dtype(), .in = in, .out = out}, options);
}

Work OperationGroup::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                                   const OpOptions& options) {
  return Make({.kind = OpKind::kReduceScatter, .reduce = op, .dtype = in.dtype(), .in = in, .out = out,
               .counts = {counts.begin(), counts.end()}}, options);
}

Work OperationGroup::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, const OpOptions& options) {
  return Make({.kind = OpKind::kAllGather, .dtype = out.dtype(), .in = in, .out = out, .counts = {counts.begin(), counts.end()}},
              options);
}

Work OperationGroup::AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                              absl::Span<const int64_t> recv_counts, const OpOptions& options) {
  Operation op = {.kind = OpKind::kAllToAll, .dtype = in.dtype(), .in = in, .out = out,
                  .counts = {send_counts.begin(), send_counts.end()}, .recv_counts = {recv_counts.begin(), recv_counts.end()},
                  .even = send_counts.empty() && recv_counts.empty()};
  if (op.even) {
    op.counts.assign(static_cast<size_t>(size()), in.elements() / size());
    op.recv_counts = op.counts;
  }
  return Make(std::move(op), options);
}

Work OperationGroup::Broadcast(const Tensor& in_out, int root, const OpOptions& options) {
  return Make({.kind = OpKind::kBroadcast, .root = root, .dtype = in_out.dtype(), .in = in_out, .out = in_out}, options);
}

Work OperationGroup::Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) {
  return Make({.kind = OpKind::kReduce, .reduce = op, .root = root, .dtype = in.dtype(), .in = in,
               .out = root == index() ? out : Tensor()}, options);
}

Work OperationGroup::Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) {
  return Make({.kind = OpKind::kGather, .root = root, .dtype = in.dtype(), .in = in, .out = root == index() ? out : Tensor(),
               .counts = {counts.begin(), counts.end()}}, options);
}

Work OperationGroup::Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                             const OpOptions& options) {
  return Make({.kind = OpKind::kScatter, .root = root, .dtype = out.dtype(), .in = root == index() ? in : Tensor(), .out = out,
               .counts = {counts.begin(), counts.end()}}, options);
}

Work OperationGroup::Barrier(const OpOptions& options) { return Make({.kind = OpKind::kBarrier}, options); }

Work OperationGroup::Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) {
  return Make({.kind = OpKind::kSend, .root = to, .dtype = in.dtype(), .in = in, .tag = tag}, options);
}

Work OperationGroup::Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) {
  return Make({.kind = OpKind::kReceive, .root = from, .dtype = out.dtype(), .out = out, .tag = tag}, options);
}

Work OperationGroup::MakeSparse(OpKind kind, absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp reduce,
                                const OpOptions& options) {
  Operation op = {.kind = kind, .reduce = reduce, .chunks = {chunks.begin(), chunks.end()}, .moves = {moves.begin(), moves.end()}};
  for (const Tensor& chunk : chunks) {
    if (!chunk.empty()) op.dtype = chunk.dtype();
  }
  return Make(std::move(op), options);
}

Work OperationGroup::SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, const OpOptions& options) {
  return MakeSparse(OpKind::kSparseAllGather, chunks, moves, ReduceOp::kSum, options);
}

Work OperationGroup::SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                                         const OpOptions& options) {
  return MakeSparse(OpKind::kSparseReduceScatter, chunks, moves, op, options);
}

Work IssueOn(Communicator& group, const Operation& op, absl::Time deadline) {
  const OpOptions options = {
      .deadline = deadline, .label = op.label, .wire = op.wire, .order = op.order, .algorithm = op.algorithm};
  switch (op.kind) {
    case OpKind::kAllReduce: return group.AllReduce(op.in, op.out, op.reduce, options);
    case OpKind::kReduceScatter: return group.ReduceScatter(op.in, op.counts, op.out, op.reduce, options);
    case OpKind::kAllGather: return group.AllGather(op.in, op.counts, op.out, options);
    case OpKind::kAllToAll:
      if (op.even) return group.AllToAll(op.in, {}, op.out, {}, options);
      return group.AllToAll(op.in, op.counts, op.out, op.recv_counts, options);
    case OpKind::kBroadcast: return group.Broadcast(op.in, op.root, options);
    case OpKind::kReduce: return group.Reduce(op.in, op.out, op.root, op.reduce, options);
    case OpKind::kGather: return group.Gather(op.in, op.counts, op.out, op.root, options);
    case OpKind::kScatter: return group.Scatter(op.in, op.counts, op.out, op.root, options);
    case OpKind::kBarrier: return group.Barrier(options);
    case OpKind::kSend: return group.Send(op.in, op.root, op.tag, options);
    case OpKind::kReceive: return group.Receive(op.out, op.root, op.tag, options);
    case OpKind::kSparseAllGather: return group.SparseAllGather(op.chunks, op.moves, options);
    case OpKind::kSparseReduceScatter: return group.SparseReduceScatter(op.chunks, op.moves, op.reduce, options);
  }
  return EndedWork(absl::InvalidArgumentError("unknown operation"));
}

namespace {

void ReplaceChunks(Operation* op, int index, const ReplaceTensor& replace) {
  const bool from_owner = op->kind == OpKind::kSparseAllGather;
  const std::vector<Tensor> chunks = std::exchange(op->chunks, std::vector<Tensor>(op->chunks.size()));
  for (const SparseMove& move : op->moves) {
    const size_t chunk = static_cast<size_t>(move.chunk);
    if (chunk >= chunks.size()) continue;  // Checked where it is issued.
    const bool owner = move.owner == index;
    if (!owner && !std::binary_search(move.holders.begin(), move.holders.end(), index)) continue;
    // A gather goes from the owner to holders; a reduction from all to the owner.
    op->chunks[chunk] = replace(chunks[chunk], /*reads=*/!from_owner || owner, /*writes=*/from_owner != owner);
  }
}

}  // namespace

void ReplaceTensors(Operation* op, int index, const ReplaceTensor& replace) {
  const auto read = [&](const Tensor& tensor) { return replace(tensor, /*reads=*/true, /*writes=*/false); };
  const auto write = [&](const Tensor& tensor) { return replace(tensor, /*reads=*/false, /*writes=*/true); };
  switch (op->kind) {
    case OpKind::kAllGather:
    case OpKind::kGather:
      op->out = write(op->out);
      op->in = read(op->in);
      return;
    case OpKind::kBroadcast:
      op->in = op->out = op->root == index ? read(op->in) : write(op->out);
      return;
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      return ReplaceChunks(op, index, replace);
    default:
      op->in = read(op->in);
      op->out = write(op->out);
      return;
  }
}

Work RefusedWork(const Operation& op, const absl::Status& why) {
  std::string name(OpKindName(op.kind));
  if (!op.label.empty()) absl::StrAppend(&name, " \"", op.label, "\"");
  return EndedWork(Annotate(why, name));
}

void SumOnDevice(absl::Span<const Tensor> from, const Tensor& to, Stream& stream) {
  SHOAL_CHECK(from.size() <= kSummedMax) << from.size();
  if (!stream.status().ok() || to.empty()) return;
  const auto described = [](const Tensor& tensor) {
    return DeviceTensor{.data = tensor.raw(), .elements = tensor.elements(), .shape = {tensor.elements()}, .rank = 1,
                        .dtype = tensor.dtype()};
  };
  std::vector<DeviceTensor> terms;
  for (const Tensor& tensor : from) terms.push_back(described(tensor));
  Device& device = *stream.device();
  device.Use();
  stream.Fail(device.StatusOf(
      device.kernels().sum_tensors(terms.data(), static_cast<int32_t>(terms.size()), described(to), stream.handle()), "adding"));
}

absl::StatusOr<Tensor> GroupMemory::Allocate(Shape shape, DType dtype) {
  const int64_t bytes = ElementCount(shape) * SizeOf(dtype);
  const MutexLock lock(&mutex_);
  SHOAL_ASSIGN_OR_RETURN(const std::shared_ptr<void> memory, device_.memory().Allocate(bytes, *stream_));
  const Tensor tensor(memory.get(), std::move(shape), dtype, memory);
  FillWithZeros(tensor, *stream_);
  SHOAL_RETURN_IF_ERROR(stream_->Wait(), "allocating");
  return tensor;
}

}  // namespace shoal
