#include "collectives/backend/staged_group.h"

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/engine/work_state.h"
#include "runtime/base/log.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal {
namespace {

// OpOptions that outlive the call.
struct KeptOptions {
  explicit KeptOptions(const OpOptions& options)
      : given(options), label(options.label), algorithm(options.algorithm) {}
  OpOptions get() const {
    OpOptions options = given;
    options.label = label;
    options.algorithm = algorithm;
    return options;
  }
  OpOptions given;
  std::string label, algorithm;
};

std::byte* Begin(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

// `host`, as the memory of a whole tensor, seen at `offset` bytes with the shape and type of `like`. Keeps `host` alive.
Tensor View(const Tensor& host, int64_t offset, const Tensor& like) {
  return Tensor(Begin(host) + offset, like.shape(), like.dtype(), std::make_shared<Tensor>(host));
}

// Tensors of Allocate, by where they begin on the device, with their twins. Outlives the group with its last tensor. Thread-safe.
class Twins {
 public:
  void Add(void* device, const Tensor& host) {
    const MutexLock lock(&mutex_);
    twins_[static_cast<std::byte*>(device)] = host;
  }
  // The twin, for whoever gives it back.
  Tensor Remove(void* device) {
    const MutexLock lock(&mutex_);
    return std::move(twins_.extract(static_cast<std::byte*>(device)).mapped());
  }
  // The memory beside `tensor`; an empty tensor: it was not allocated here.
  Tensor Of(const Tensor& tensor) const {
    const MutexLock lock(&mutex_);
    auto after = twins_.upper_bound(Begin(tensor));
    if (after == twins_.begin()) return Tensor();
    const auto& [begin, host] = *std::prev(after);
    const int64_t offset = Begin(tensor) - begin;
    return offset + tensor.bytes() <= host.bytes() ? View(host, offset, tensor) : Tensor();
  }

 private:
  mutable Mutex mutex_;
  std::map<std::byte*, Tensor> twins_ ABSL_GUARDED_BY(mutex_);
};

class StagedGroup final : public Communicator {
 public:
  StagedGroup(std::unique_ptr<Communicator> host, Device& device, std::unique_ptr<Stream> in, std::unique_ptr<Stream> out)
      : host_(std::move(host)), device_(device), in_(std::move(in)), out_(std::move(out)) {
    issuer_ = std::thread([this] { IssueAll(); });
    finisher_ = std::thread([this] { FinishAll(); });
  }
  ~StagedGroup() override;

  int index() const override { return host_->index(); }
  int size() const override { return host_->size(); }
  Epoch epoch() const override { return host_->epoch(); }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override;

  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) override;
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) override;
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, const OpOptions& options) override;
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                absl::Span<const int64_t> recv_counts, const OpOptions& options) override;
  Work Broadcast(const Tensor& in_out, int root, const OpOptions& options) override;
  Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) override;
  Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) override;
  Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) override;
  Work Barrier(const OpOptions& options) override;
  Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) override;
  Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) override;
  Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, const OpOptions& options) override;
  Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                           const OpOptions& options) override;
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override {
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> host, host_->Split(members));
    return StageThroughHost(std::move(host), device_);
  }
  void Abort(const absl::Status& cause) override { host_->Abort(cause); }
  absl::Status status() const override { return host_->status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override { host_->OnAbort(std::move(callback)); }

 private:
  struct Pair {
    Tensor device, host;
  };
  // One operation: what is copied before and after it, and what it is.
  struct Operation {
    std::vector<Pair> before, after;
    std::vector<Pair> borrowed;  // Host memory for tensors without twins.
    std::function<Work()> issue;
    Event copied;
    std::shared_ptr<QueuedWork> work;
  };

  // The host's memory for a tensor; a tensor that lies in an earlier one of the operation gets a part of that one's.
  Tensor HostOf(const Tensor& tensor, Operation* operation);
  Tensor In(const Tensor& tensor, Operation* operation);
  Tensor Out(const Tensor& tensor, Operation* operation);
  std::vector<Tensor> ChunksOf(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, bool from_owner,
                               Operation* operation);
  Work Run(Operation operation, std::function<Work()> issue);

  void IssueAll();
  void FinishAll();
  absl::Status CopyBack(const Operation& operation);
  // Ends the group, because of the device.
  absl::Status Failed(const absl::Status& cause);

  const std::unique_ptr<Communicator> host_;
  Device& device_;
  const std::shared_ptr<Twins> twins_ = std::make_shared<Twins>();

  Mutex mutex_;
  CondVar changed_;
  const std::unique_ptr<Stream> in_;  // Used under the mutex.
  const std::unique_ptr<Stream> out_;  // The finisher's.
  std::deque<Operation> to_issue_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::pair<Operation, absl::Status>> to_finish_ ABSL_GUARDED_BY(mutex_);
  int64_t open_ ABSL_GUARDED_BY(mutex_) = 0;  // Operations that have not ended.
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread issuer_, finisher_;
};

StagedGroup::~StagedGroup() {
  bool pending = false;
  {
    const MutexLock lock(&mutex_);
    pending = open_ > 0;
  }
  if (pending) host_->Abort(absl::CancelledError("closed with operations pending"));
  {
    const MutexLock lock(&mutex_);
    closing_ = true;
  }
  changed_.NotifyAll();
  issuer_.join();
  finisher_.join();
}

absl::StatusOr<Tensor> StagedGroup::Allocate(Shape shape, DType dtype) {
  SHOAL_ASSIGN_OR_RETURN(const Tensor host, host_->Allocate(shape, dtype));
  const MutexLock lock(&mutex_);
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<void> memory, device_.memory().Allocate(host.bytes(), *in_));
  void* const begin = memory.get();
  device_.Use();
  // Without it copies are slower, nothing else.
  const bool pinned = host.bytes() > 0 && device_.StatusOf(device_.api().pin(host.raw(), host.bytes()), "pin").ok();
  twins_->Add(begin, host);
  const std::shared_ptr<void> owner(begin, [twins = twins_, memory, pinned, device = &device_](void* begin) {
    const Tensor host = twins->Remove(begin);
    if (!pinned) return;
    device->Use();
    const absl::Status status = device->StatusOf(device->api().unpin(host.raw()), "unpin");
    if (!status.ok()) SHOAL_LOG(kWarning) << status;
  });
  const Tensor tensor(begin, std::move(shape), dtype, owner);
  Copy(host, tensor, *in_);  // Zeros.
  SHOAL_RETURN_IF_ERROR(in_->Wait(), "allocating");
  return tensor;
}

Tensor StagedGroup::HostOf(const Tensor& tensor, Operation* operation) {
  if (tensor.empty()) return tensor;
  const Tensor twin = twins_->Of(tensor);
  if (!twin.empty()) return twin;
  for (const Pair& pair : operation->borrowed) {
    const int64_t offset = Begin(tensor) - Begin(pair.device);
    if (offset >= 0 && offset + tensor.bytes() <= pair.device.bytes()) return View(pair.host, offset, tensor);
  }
  const MutexLock lock(&mutex_);
  operation->borrowed.push_back({tensor, EmptyHost(tensor.shape(), tensor.dtype(), *in_)});
  return operation->borrowed.back().host;
}

Tensor StagedGroup::In(const Tensor& tensor, Operation* operation) {
  const Tensor host = HostOf(tensor, operation);
  if (!tensor.empty()) operation->before.push_back({tensor, host});
  return host;
}

Tensor StagedGroup::Out(const Tensor& tensor, Operation* operation) {
  const Tensor host = HostOf(tensor, operation);
  if (!tensor.empty()) operation->after.push_back({tensor, host});
  return host;
}

Work StagedGroup::Run(Operation operation, std::function<Work()> issue) {
  operation.issue = std::move(issue);
  operation.work = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  const Work work(operation.work);
  {
    const MutexLock lock(&mutex_);
    for (const Pair& pair : operation.before) Copy(pair.device, pair.host, *in_);
    operation.copied = in_->Record();
    to_issue_.push_back(std::move(operation));
    ++open_;
  }
  changed_.NotifyAll();
  return work;
}

// Issues the host's operations, in the order of the calls, when their inputs are there.
void StagedGroup::IssueAll() {
  while (true) {
    Operation operation;
    {
      MutexLock lock(&mutex_);
      while (to_issue_.empty() && !closing_) changed_.Wait(&mutex_);
      if (to_issue_.empty()) return;
      operation = std::move(to_issue_.front());
      to_issue_.pop_front();
    }
    absl::Status copied = operation.copied.Wait();
    if (!copied.ok()) copied = Failed(copied);
    const Work work = copied.ok() ? operation.issue() : EndedWork(copied);
    const auto kept = std::make_shared<Operation>(std::move(operation));
    work.OnDone([this, kept](const absl::Status& result) {
      {
        const MutexLock lock(&mutex_);
        to_finish_.emplace_back(std::move(*kept), result);
      }
      changed_.NotifyAll();
    });
  }
}

// Copies results back and ends operations, until the group closes and none is open.
void StagedGroup::FinishAll() {
  while (true) {
    std::pair<Operation, absl::Status> ended;
    {
      MutexLock lock(&mutex_);
      while (to_finish_.empty() && !(closing_ && open_ == 0)) changed_.Wait(&mutex_);
      if (to_finish_.empty()) return;
      ended = std::move(to_finish_.front());
      to_finish_.pop_front();
    }
    auto& [operation, result] = ended;
    if (result.ok()) result = CopyBack(operation);
    const std::shared_ptr<QueuedWork> work = std::move(operation.work);
    operation = Operation();  // Buffers are the caller's again.
    {
      const MutexLock lock(&mutex_);
      --open_;
    }
    changed_.NotifyAll();
    work->Finish(result);
  }
}

absl::Status StagedGroup::CopyBack(const Operation& operation) {
  for (const Pair& pair : operation.after) Copy(pair.host, pair.device, *out_);
  const absl::Status copied = operation.after.empty() ? absl::OkStatus() : out_->Record().Wait();
  return copied.ok() ? copied : Failed(copied);
}

absl::Status StagedGroup::Failed(const absl::Status& cause) {
  const absl::Status aborted = absl::AbortedError(absl::StrCat("rank ", index(), ": ", cause.message()));
  host_->Abort(aborted);
  return aborted;
}

// ---- Operations. A tensor that another one may lie in comes first.

Work StagedGroup::AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) {
  Operation operation;
  const Tensor from = In(in, &operation), to = Out(out, &operation);
  return Run(std::move(operation), [=, this, kept = KeptOptions(options)] { return host_->AllReduce(from, to, op, kept.get()); });
}

Work StagedGroup::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                                const OpOptions& options) {
  Operation operation;
  const Tensor from = In(in, &operation), to = Out(out, &operation);
  return Run(std::move(operation),
             [=, this, counts = std::vector<int64_t>(counts.begin(), counts.end()), kept = KeptOptions(options)] {
               return host_->ReduceScatter(from, counts, to, op, kept.get());
             });
}

Work StagedGroup::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, const OpOptions& options) {
  Operation operation;
  const Tensor to = Out(out, &operation), from = In(in, &operation);
  return Run(std::move(operation),
             [=, this, counts = std::vector<int64_t>(counts.begin(), counts.end()), kept = KeptOptions(options)] {
               return host_->AllGather(from, counts, to, kept.get());
             });
}

Work StagedGroup::AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                           absl::Span<const int64_t> recv_counts, const OpOptions& options) {
  Operation operation;
  const Tensor from = In(in, &operation), to = Out(out, &operation);
  return Run(std::move(operation), [=, this, sent = std::vector<int64_t>(send_counts.begin(), send_counts.end()),
                                    received = std::vector<int64_t>(recv_counts.begin(), recv_counts.end()),
                                    kept = KeptOptions(options)] { return host_->AllToAll(from, sent, to, received, kept.get()); });
}

Work StagedGroup::Broadcast(const Tensor& in_out, int root, const OpOptions& options) {
  Operation operation;
  const Tensor both = index() == root ? In(in_out, &operation) : Out(in_out, &operation);
  return Run(std::move(operation), [=, this, kept = KeptOptions(options)] { return host_->Broadcast(both, root, kept.get()); });
}

Work StagedGroup::Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) {
  Operation operation;
  const Tensor from = In(in, &operation), to = index() == root ? Out(out, &operation) : Tensor();
  return Run(std::move(operation), [=, this, kept = KeptOptions(options)] { return host_->Reduce(from, to, root, op, kept.get()); });
}

Work StagedGroup::Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) {
  Operation operation;
  const Tensor to = index() == root ? Out(out, &operation) : Tensor(), from = In(in, &operation);
  return Run(std::move(operation),
             [=, this, counts = std::vector<int64_t>(counts.begin(), counts.end()), kept = KeptOptions(options)] {
               return host_->Gather(from, counts, to, root, kept.get());
             });
}

Work StagedGroup::Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root, const OpOptions& options) {
  Operation operation;
  const Tensor from = index() == root ? In(in, &operation) : Tensor(), to = Out(out, &operation);
  return Run(std::move(operation),
             [=, this, counts = std::vector<int64_t>(counts.begin(), counts.end()), kept = KeptOptions(options)] {
               return host_->Scatter(from, counts, to, root, kept.get());
             });
}

Work StagedGroup::Barrier(const OpOptions& options) {
  return Run({}, [this, kept = KeptOptions(options)] { return host_->Barrier(kept.get()); });
}

Work StagedGroup::Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) {
  Operation operation;
  const Tensor from = In(in, &operation);
  return Run(std::move(operation), [=, this, kept = KeptOptions(options)] { return host_->Send(from, to, tag, kept.get()); });
}

Work StagedGroup::Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) {
  Operation operation;
  const Tensor to = Out(out, &operation);
  return Run(std::move(operation), [=, this, kept = KeptOptions(options)] { return host_->Receive(to, from, tag, kept.get()); });
}

std::vector<Tensor> StagedGroup::ChunksOf(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, bool from_owner,
                                          Operation* operation) {
  std::vector<Tensor> host(chunks.size());
  for (const SparseMove& move : moves) {
    const size_t chunk = static_cast<size_t>(move.chunk);
    if (chunk >= chunks.size()) continue;  // The host's group says so.
    const bool owner = move.owner == index();
    if (!owner && !std::binary_search(move.holders.begin(), move.holders.end(), index())) continue;
    // A gather goes from the owner to holders; a reduction from all to the owner.
    const bool reads = !from_owner || owner, writes = from_owner != owner;
    host[chunk] = HostOf(chunks[chunk], operation);
    if (chunks[chunk].empty()) continue;
    if (reads) operation->before.push_back({chunks[chunk], host[chunk]});
    if (writes) operation->after.push_back({chunks[chunk], host[chunk]});
  }
  return host;
}

Work StagedGroup::SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, const OpOptions& options) {
  Operation operation;
  std::vector<Tensor> host = ChunksOf(chunks, moves, /*from_owner=*/true, &operation);
  return Run(std::move(operation), [=, this, host = std::move(host), moves = std::vector<SparseMove>(moves.begin(), moves.end()),
                                    kept = KeptOptions(options)] { return host_->SparseAllGather(host, moves, kept.get()); });
}

Work StagedGroup::SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                                      const OpOptions& options) {
  Operation operation;
  std::vector<Tensor> host = ChunksOf(chunks, moves, /*from_owner=*/false, &operation);
  return Run(std::move(operation), [=, this, host = std::move(host), moves = std::vector<SparseMove>(moves.begin(), moves.end()),
                                    kept = KeptOptions(options)] { return host_->SparseReduceScatter(host, moves, op, kept.get()); });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> StageThroughHost(std::unique_ptr<Communicator> host, Device& device) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> in, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> out, device.NewStream());
  return std::make_unique<StagedGroup>(std::move(host), device, std::move(in), std::move(out));
}

}  // namespace shoal
