#include "collectives/backend/staged_group.h"

#include <deque>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/backend/operation_group.h"
#include "collectives/engine/work_state.h"
#include "runtime/base/log.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal {
namespace {

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

class StagedGroup final : public OperationGroup {
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
  struct Flight {
    Operation op;  // Its tensors are the host's.
    absl::Time deadline;
    std::vector<Pair> before, after;
    std::vector<Pair> borrowed;  // Host memory for tensors without twins.
    Event copied;
    std::shared_ptr<QueuedWork> work;
  };

  Work Issue(Operation op, const OpOptions& options) override;
  // The host's memory for a tensor; a tensor that lies in an earlier one of the operation gets a part of that one's.
  Tensor HostOf(const Tensor& tensor, Flight* flight);

  void IssueAll();
  void FinishAll();
  absl::Status CopyBack(const Flight& flight);
  // Ends the group, because of the device.
  absl::Status Failed(const absl::Status& cause);

  const std::unique_ptr<Communicator> host_;
  Device& device_;
  const std::shared_ptr<Twins> twins_ = std::make_shared<Twins>();

  Mutex mutex_;
  CondVar changed_;
  const std::unique_ptr<Stream> in_;  // Used under the mutex.
  const std::unique_ptr<Stream> out_;  // The finisher's.
  std::deque<Flight> to_issue_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::pair<Flight, absl::Status>> to_finish_ ABSL_GUARDED_BY(mutex_);
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

Tensor StagedGroup::HostOf(const Tensor& tensor, Flight* flight) {
  if (tensor.empty()) return tensor;
  const Tensor twin = twins_->Of(tensor);
  if (!twin.empty()) return twin;
  for (const Pair& pair : flight->borrowed) {
    const int64_t offset = Begin(tensor) - Begin(pair.device);
    if (offset >= 0 && offset + tensor.bytes() <= pair.device.bytes()) return View(pair.host, offset, tensor);
  }
  const MutexLock lock(&mutex_);
  flight->borrowed.push_back({tensor, EmptyHost(tensor.shape(), tensor.dtype(), *in_)});
  return flight->borrowed.back().host;
}

Work StagedGroup::Issue(Operation op, const OpOptions& options) {
  Flight flight = {.op = std::move(op), .deadline = options.deadline};
  ReplaceTensors(&flight.op, index(), [&](const Tensor& tensor, bool reads, bool writes) {
    const Tensor host = HostOf(tensor, &flight);
    if (reads && !tensor.empty()) flight.before.push_back({tensor, host});
    if (writes && !tensor.empty()) flight.after.push_back({tensor, host});
    return host;
  });
  flight.work = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  const Work work(flight.work);
  {
    const MutexLock lock(&mutex_);
    for (const Pair& pair : flight.before) Copy(pair.device, pair.host, *in_);
    flight.copied = in_->Record();
    to_issue_.push_back(std::move(flight));
    ++open_;
  }
  changed_.NotifyAll();
  return work;
}

// Issues the host's operations, in the order of the calls, when their inputs are there.
void StagedGroup::IssueAll() {
  while (true) {
    Flight flight;
    {
      MutexLock lock(&mutex_);
      while (to_issue_.empty() && !closing_) changed_.Wait(&mutex_);
      if (to_issue_.empty()) return;
      flight = std::move(to_issue_.front());
      to_issue_.pop_front();
    }
    absl::Status copied = flight.copied.Wait();
    if (!copied.ok()) copied = Failed(copied);
    const Work work = copied.ok() ? IssueOn(*host_, flight.op, flight.deadline) : EndedWork(copied);
    const auto kept = std::make_shared<Flight>(std::move(flight));
    work.OnDone([this, kept](const absl::Status& result) {
      const MutexLock lock(&mutex_);
      to_finish_.emplace_back(std::move(*kept), result);
      changed_.NotifyAll();  // Under the lock: after it the group may be gone.
    });
  }
}

// Copies results back and ends operations, until the group closes and none is open.
void StagedGroup::FinishAll() {
  while (true) {
    std::pair<Flight, absl::Status> ended;
    {
      MutexLock lock(&mutex_);
      while (to_finish_.empty() && !(closing_ && open_ == 0)) changed_.Wait(&mutex_);
      if (to_finish_.empty()) return;
      ended = std::move(to_finish_.front());
      to_finish_.pop_front();
    }
    auto& [flight, result] = ended;
    if (result.ok()) result = CopyBack(flight);
    const std::shared_ptr<QueuedWork> work = std::move(flight.work);
    flight = Flight();  // Buffers are the caller's again.
    {
      const MutexLock lock(&mutex_);
      --open_;
    }
    changed_.NotifyAll();
    work->Finish(result);
  }
}

absl::Status StagedGroup::CopyBack(const Flight& flight) {
  for (const Pair& pair : flight.after) Copy(pair.host, pair.device, *out_);
  const absl::Status copied = flight.after.empty() ? absl::OkStatus() : out_->Record().Wait();
  return copied.ok() ? copied : Failed(copied);
}

absl::Status StagedGroup::Failed(const absl::Status& cause) {
  const absl::Status aborted = absl::AbortedError(absl::StrCat("rank ", index(), ": ", cause.message()));
  host_->Abort(aborted);
  return aborted;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> StageThroughHost(std::unique_ptr<Communicator> host, Device& device) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> in, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> out, device.NewStream());
  return std::make_unique<StagedGroup>(std::move(host), device, std::move(in), std::move(out));
}

}  // namespace shoal
