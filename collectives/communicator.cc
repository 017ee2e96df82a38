#include "collectives/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "collectives/backend/mpi_group.h"
#include "collectives/engine/group.h"
#include "collectives/engine/op.h"
#include "collectives/engine/op_queue.h"
#include "collectives/engine/shm_engine.h"
#include "collectives/engine/tcp_engine.h"
#include "collectives/engine/world.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Each rank of a group computes the same key without asking the others.
uint64_t GroupKey(uint64_t parent, const std::vector<int>& ranks, uint64_t number) {
  uint64_t hash = 0xcbf29ce484222325u ^ parent;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  };
  mix(number);
  for (int rank : ranks) mix(rank + 1);
  return hash | 1;  // Never 0.
}

bool CanReduce(DType dtype, ReduceOp op) { return SizeOf(dtype) > 0 && op <= ReduceOp::kMax; }

bool Overlap(const std::byte* a, int64_t a_bytes, const std::byte* b, int64_t b_bytes) {
  return a_bytes > 0 && b_bytes > 0 && a < b + b_bytes && b < a + a_bytes;
}

// Whether `part` is either apart from `whole` or exactly its bytes from `begin` on.
bool ApartOrAt(const Tensor& part, const Tensor& whole, int64_t begin_elements) {
  const auto* p = static_cast<const std::byte*>(part.raw());
  const auto* w = static_cast<const std::byte*>(whole.raw());
  return p == w + begin_elements * SizeOf(whole.dtype()) || !Overlap(p, part.bytes(), w, whole.bytes());
}

class Group final : public Communicator {
 public:
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(std::shared_ptr<World> world, Epoch epoch,
                                                              std::vector<int> ranks, int index, uint64_t key,
                                                              int64_t deadline_ns);
  // The whole job is this process.
  Group(Epoch epoch, absl::Duration timeout)
      : epoch_(epoch), timeout_(timeout), ranks_({0}), index_(0), key_(1) {}
  ~Group() override;

  int index() const override { return index_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  Epoch epoch() const override { return epoch_; }

  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override;
  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) override;
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) override;
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                 const OpOptions& options) override;
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                absl::Span<const int64_t> recv_counts, const OpOptions& options) override;
  Work Broadcast(const Tensor& in_out, int root_index, const OpOptions& options) override;
  Work Reduce(const Tensor&, const Tensor&, int, ReduceOp, const OpOptions&) override { return Missing(); }
  Work Gather(const Tensor&, absl::Span<const int64_t>, const Tensor&, int, const OpOptions&) override {
    return Missing();
  }
  Work Scatter(const Tensor&, absl::Span<const int64_t>, const Tensor&, int, const OpOptions&) override {
    return Missing();
  }
  Work Barrier(const OpOptions& options) override;
  Work Send(const Tensor&, int, uint32_t, const OpOptions&) override { return Missing(); }
  Work Receive(const Tensor&, int, uint32_t, const OpOptions&) override { return Missing(); }
  Work SparseAllGather(absl::Span<const Tensor>, absl::Span<const SparseMove>, const OpOptions&) override {
    return Missing();
  }
  Work SparseReduceScatter(absl::Span<const Tensor>, absl::Span<const SparseMove>, ReduceOp,
                           const OpOptions&) override {
    return Missing();
  }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override;
  void Abort(const absl::Status& cause) override;
  absl::Status status() const override;
  void OnAbort(std::function<void(const absl::Status&)> callback) override;

 private:
  static Work Missing() { return EndedWork(absl::UnimplementedError("not there yet")); }
  Group(std::shared_ptr<World> world, Epoch epoch, std::vector<int> ranks, int index, uint64_t key)
      : world_(std::move(world)),
        epoch_(epoch),
        timeout_(world_->options().timeout),
        ranks_(std::move(ranks)),
        index_(index),
        key_(key) {}

  absl::Status CheckCounts(absl::Span<const int64_t> counts, const Tensor& whole, const char* name) const;
  absl::Status CheckReduceScatter(const Op& op) const;
  absl::Status CheckAllGather(const Op& op) const;
  absl::Status CheckAllToAll(const Op& op) const;
  Work Issue(Op op, const absl::Status& valid, const OpOptions& options);
  absl::Status RunAlone(const Op& op) const;

  const std::shared_ptr<World>
      world_;  // Shared with the other groups of the epoch; null when the job is one process.
  const Epoch epoch_;
  const absl::Duration timeout_;
  const std::vector<int> ranks_;  // Of the job, by index in the group.
  const int index_;
  const uint64_t key_;
  std::unique_ptr<Engine> engine_;  // Null in a group of one.
  std::shared_ptr<OpQueue> queue_;  // Shared with threads that await one of its operations.

  mutable Mutex mutex_;
  std::map<std::vector<int>, uint64_t> splits_ ABSL_GUARDED_BY(mutex_);  // How often, by members.
  absl::Status alone_status_ ABSL_GUARDED_BY(mutex_);  // Where there is no world to have one.
  std::vector<std::function<void(const absl::Status&)>> alone_callbacks_ ABSL_GUARDED_BY(mutex_);
};

absl::StatusOr<std::unique_ptr<Communicator>> Group::Create(std::shared_ptr<World> world, Epoch epoch,
                                                            std::vector<int> ranks, int index, uint64_t key,
                                                            int64_t deadline_ns) {
  std::unique_ptr<Group> group(new Group(world, epoch, ranks, index, key));
  if (ranks.size() > 1) {
    if (world->OneHost(ranks)) {
      SHOAL_ASSIGN_OR_RETURN(group->engine_,
                             ShmEngine::Create(world.get(), std::move(ranks), index, key, deadline_ns));
    } else {
      group->engine_ = std::make_unique<TcpEngine>(world.get(), std::move(ranks), index, key);
    }
    group->queue_ = std::make_shared<OpQueue>(group->engine_.get(),
                                              [raw = world.get()](const Op& op) { raw->NoteOperation(op); });
  }
  return std::unique_ptr<Communicator>(std::move(group));
}

Group::~Group() {
  if (world_ != nullptr) world_->RemoveCallbacks(this);
  if (queue_ == nullptr) return;
  if (!queue_->Idle()) Abort(absl::CancelledError("closed with operations pending"));
  queue_->Close();
}

absl::StatusOr<Tensor> Group::Allocate(Shape shape, DType dtype) {
  const int64_t bytes = ElementCount(shape) * SizeOf(dtype);
  SHOAL_RETURN_IF_ERROR(status());
  if (world_ == nullptr || world_->RanksOnThisHost() == 1) {
    // Nobody to share it with: private memory gets large pages more easily.
    SHOAL_RETURN_IF_ERROR(CheckMemoryAvailable(bytes), "allocate ", bytes, " bytes");
    return Zeros(std::move(shape), dtype);
  }
  absl::StatusOr<std::shared_ptr<void>> memory = world_->memory().Allocate(bytes);
  SHOAL_RETURN_IF_ERROR(status());
  SHOAL_RETURN_IF_ERROR(memory.status(), "allocate ", bytes, " bytes");
  void* base = memory->get();
  return Tensor(base, std::move(shape), dtype, *std::move(memory));
}

absl::Status Group::CheckCounts(absl::Span<const int64_t> counts, const Tensor& whole,
                                const char* name) const {
  if (static_cast<int>(counts.size()) != size()) {
    return absl::InvalidArgumentError(absl::StrCat(counts.size(), " ", name, " for ", size(), " ranks"));
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

absl::Status Group::CheckReduceScatter(const Op& op) const {
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.in, "counts"));
  if (op.in.dtype() != op.out.dtype() || op.out.elements() != op.counts[index_]) {
    return absl::InvalidArgumentError(absl::StrCat("out has ", op.out.elements(), " elements of ",
                                                   AbslSv(Name(op.out.dtype())), ", want ", op.counts[index_],
                                                   " of ", AbslSv(Name(op.in.dtype()))));
  }
  if (!ApartOrAt(op.out, op.in, Displacements(op.counts)[index_])) {
    return absl::InvalidArgumentError("out overlaps in elsewhere than at this rank's part");
  }
  return absl::OkStatus();
}

absl::Status Group::CheckAllGather(const Op& op) const {
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.out, "counts"));
  if (op.in.dtype() != op.out.dtype() || op.in.elements() != op.counts[index_]) {
    return absl::InvalidArgumentError(absl::StrCat("in has ", op.in.elements(), " elements of ",
                                                   AbslSv(Name(op.in.dtype())), ", want ", op.counts[index_],
                                                   " of ", AbslSv(Name(op.out.dtype()))));
  }
  if (!ApartOrAt(op.in, op.out, Displacements(op.counts)[index_])) {
    return absl::InvalidArgumentError("in overlaps out elsewhere than at this rank's part");
  }
  return absl::OkStatus();
}

absl::Status Group::CheckAllToAll(const Op& op) const {
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.counts, op.in, "send counts"));
  SHOAL_RETURN_IF_ERROR(CheckCounts(op.recv_counts, op.out, "receive counts"));
  if (op.in.dtype() != op.out.dtype()) {
    return absl::InvalidArgumentError(
        absl::StrCat("in is ", AbslSv(Name(op.in.dtype())), ", out ", AbslSv(Name(op.out.dtype()))));
  }
  if (op.counts[index_] != op.recv_counts[index_]) {
    return absl::InvalidArgumentError(
        absl::StrCat("sends ", op.counts[index_], " elements to itself, expects ", op.recv_counts[index_]));
  }
  if (Overlap(static_cast<const std::byte*>(op.in.raw()), op.in.bytes(),
              static_cast<const std::byte*>(op.out.raw()), op.out.bytes())) {
    return absl::InvalidArgumentError("in and out overlap");
  }
  return absl::OkStatus();
}

Work Group::Issue(Op op, const absl::Status& valid, const OpOptions& options) {
  op.label = std::string(options.label);
  absl::Status refused = valid;
  if (refused.ok()) refused = status();
  if (!refused.ok()) {
    std::string name = KindName(op.kind);
    if (!op.label.empty()) absl::StrAppend(&name, " \"", op.label, "\"");
    return EndedWork(Annotate(refused, name));
  }
  if (queue_ == nullptr) return EndedWork(RunAlone(op));
  const absl::Time deadline =
      options.deadline == absl::InfiniteFuture() ? absl::Now() + timeout_ : options.deadline;
  op.deadline_ns = SteadyDeadlineNs(deadline);
  return queue_->Push(std::move(op));
}

absl::Status Group::RunAlone(const Op& op) const {
  if (op.out.bytes() > 0 && op.out.raw() != op.in.raw())
    std::memcpy(op.out.raw(), op.in.raw(), op.out.bytes());
  return absl::OkStatus();
}

Work Group::AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) {
  if (out.raw() != in.raw() && in.bytes() > 0) std::memcpy(out.raw(), in.raw(), in.bytes());
  Op request;
  request.kind = OpKind::kAllReduce;
  request.reduce = op;
  request.in = request.out = out;
  const bool known = CanReduce(in.dtype(), op);
  return Issue(std::move(request), known ? absl::OkStatus() : absl::InvalidArgumentError("unknown reduction"),
               options);
}

Work Group::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                          const OpOptions& options) {
  Op request;
  request.kind = OpKind::kReduceScatter;
  request.reduce = op;
  request.in = in;
  request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  absl::Status valid = CheckReduceScatter(request);
  if (!CanReduce(in.dtype(), op)) valid = absl::InvalidArgumentError("unknown reduction");
  return Issue(std::move(request), valid, options);
}

Work Group::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                      const OpOptions& options) {
  Op request;
  request.kind = OpKind::kAllGather;
  request.in = in;
  request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  const absl::Status valid = CheckAllGather(request);
  return Issue(std::move(request), valid, options);
}

Work Group::AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                     absl::Span<const int64_t> recv_counts, const OpOptions& options) {
  Op request;
  request.kind = OpKind::kAllToAll;
  request.in = in;
  request.out = out;
  request.counts.assign(send_counts.begin(), send_counts.end());
  request.recv_counts.assign(recv_counts.begin(), recv_counts.end());
  const absl::Status valid = CheckAllToAll(request);
  return Issue(std::move(request), valid, options);
}

Work Group::Broadcast(const Tensor& in_out, int root_index, const OpOptions& options) {
  Op request;
  request.kind = OpKind::kBroadcast;
  request.root = root_index;
  request.in = request.out = in_out;
  const bool known = root_index >= 0 && root_index < size();
  return Issue(std::move(request),
               known
                   ? absl::OkStatus()
                   : absl::InvalidArgumentError(absl::StrCat("root ", root_index, " in a group of ", size())),
               options);
}

Work Group::Barrier(const OpOptions& options) { return Issue(Op(), absl::OkStatus(), options); }

absl::StatusOr<std::unique_ptr<Communicator>> Group::Split(absl::Span<const int> members) {
  std::vector<int> ranks;
  int index = -1;
  for (size_t i = 0; i < members.size(); ++i) {
    const bool ascending = i == 0 || members[i] > members[i - 1];
    if (!ascending || members[i] < 0 || members[i] >= size()) {
      return absl::InvalidArgumentError(absl::StrCat("member ", members[i], " of a group of ", size(),
                                                     ": not in the group, or not ascending"));
    }
    if (members[i] == index_) index = static_cast<int>(i);
    ranks.push_back(ranks_[members[i]]);
  }
  if (index < 0) return absl::InvalidArgumentError("this process is not among the members");
  SHOAL_RETURN_IF_ERROR(status());
  if (world_ == nullptr) return std::unique_ptr<Communicator>(std::make_unique<Group>(epoch_, timeout_));
  uint64_t number = 0;
  {
    MutexLock lock(&mutex_);
    number = ++splits_[ranks];
  }
  const uint64_t key = GroupKey(key_, ranks, number);
  return Create(world_, epoch_, std::move(ranks), index, key, SteadyDeadlineNs(absl::Now() + timeout_));
}

void Group::Abort(const absl::Status& cause) {
  const std::string text = absl::StrCat("rank ", ranks_[index_], " aborted: ", cause.message());
  if (world_ != nullptr) {
    (void)world_->End(text);
    return;
  }
  std::vector<std::function<void(const absl::Status&)>> callbacks;
  const absl::Status status = absl::AbortedError(text);
  {
    MutexLock lock(&mutex_);
    if (!alone_status_.ok()) return;
    alone_status_ = status;
    callbacks.swap(alone_callbacks_);
  }
  for (const auto& callback : callbacks) callback(status);
}

absl::Status Group::status() const {
  if (world_ != nullptr) return world_->status();
  MutexLock lock(&mutex_);
  return alone_status_;
}

void Group::OnAbort(std::function<void(const absl::Status&)> callback) {
  if (world_ != nullptr) {
    world_->AddCallback(this, std::move(callback));
    return;
  }
  absl::Status over;
  {
    MutexLock lock(&mutex_);
    over = alone_status_;
    if (over.ok()) alone_callbacks_.push_back(std::move(callback));
  }
  if (!over.ok()) callback(over);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(const WorldOptions& options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of ", options.size));
  }
  if (options.transport == "mpi") return ConnectMpi(options);
  if (options.transport != "auto" && options.transport != "tcp") {
    return absl::InvalidArgumentError(absl::StrCat("transport '", options.transport, "', want auto, tcp or mpi"));
  }
  if (options.size == 1) {
    return std::unique_ptr<Communicator>(std::make_unique<Group>(options.epoch, options.timeout));
  }
  const absl::Time deadline = absl::Now() + options.connect_timeout;
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<World> world, World::Connect(options));
  return NewWorldGroup(std::move(world), deadline);
}

absl::StatusOr<std::unique_ptr<Communicator>> NewWorldGroup(std::shared_ptr<World> world, absl::Time deadline) {
  const WorldOptions& options = world->options();
  std::vector<int> ranks(options.size);
  std::iota(ranks.begin(), ranks.end(), 0);
  const uint64_t key = GroupKey(/*parent=*/0, ranks, static_cast<uint64_t>(options.epoch));
  const Epoch epoch = options.epoch;
  const int rank = options.rank;
  return Group::Create(std::move(world), epoch, std::move(ranks), rank, key, SteadyDeadlineNs(deadline));
}

}  // namespace shoal
