// What groups for tensors of a device share: each call becomes an Operation (engine/op.h), and one function issues it.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "collectives/engine/op.h"
#include "runtime/base/mutex.h"
#include "runtime/device/device.h"
#include "runtime/device/stream.h"

namespace shoal {

class OperationGroup : public Communicator {
 public:
  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) final;
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) final;
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, const OpOptions& options) final;
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out, absl::Span<const int64_t> recv_counts,
                const OpOptions& options) final;
  Work Broadcast(const Tensor& in_out, int root, const OpOptions& options) final;
  Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) final;
  Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) final;
  Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) final;
  Work Barrier(const OpOptions& options) final;
  Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) final;
  Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) final;
  Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, const OpOptions& options) final;
  Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                           const OpOptions& options) final;

 private:
  Work Make(Operation op, const OpOptions& options);
  Work MakeSparse(OpKind kind, absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                  const OpOptions& options);
  // Thread-safe. Arguments are not checked yet. Tensors that the rank does not use are empty; `options` is in `op` too, but for the
  // deadline.
  virtual Work Issue(Operation op, const OpOptions& options) = 0;
};

// Issues an operation of an OperationGroup on another group, whose tensors it has.
Work IssueOn(Communicator& group, const Operation& op, absl::Time deadline);

// Replaces the tensors that rank `index` uses in an operation, empty ones too. One that another may lie in comes first.
using ReplaceTensor = std::function<Tensor(const Tensor& tensor, bool reads, bool writes)>;
void ReplaceTensors(Operation* op, int index, const ReplaceTensor& replace);

// The handle of an operation that cannot be issued; the message names it.
Work RefusedWork(const Operation& op, const absl::Status& why);

// to = the sum of up to kSummedMax tensors (f32 or bf16) on the stream's device, in their order and in f32; `to` may be one of them.
// Puts it on the stream, which a failure poisons.
constexpr size_t kSummedMax = 256;
void SumOnDevice(absl::Span<const Tensor> from, const Tensor& to, Stream& stream);

// Zeroed memory of a device, as Communicator::Allocate gives it. Thread-safe.
class GroupMemory {
 public:
  GroupMemory(Device& device, std::unique_ptr<Stream> stream) : device_(device), stream_(std::move(stream)) {}
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype);  // Waits for the device.

 private:
  Device& device_;
  Mutex mutex_;
  const std::unique_ptr<Stream> stream_ ABSL_PT_GUARDED_BY(mutex_);
};

}  // namespace shoal
