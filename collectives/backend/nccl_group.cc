#include "collectives/backend/nccl_group.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/backend/nccl_meeting.h"
#include "collectives/backend/nccl_plan.h"
#include "collectives/backend/operation_group.h"
#include "collectives/backend/staged_group.h"
#include "collectives/engine/arguments.h"
#include "collectives/engine/op.h"
#include "collectives/transport/clock.h"
#include "runtime/base/log.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/plugin.h"

namespace shoal {
namespace {

using Code = DeviceResult::Code;

// Between two looks at what is under way: some without a pause, for small operations, then with one.
constexpr int kLooks = 200;
constexpr std::chrono::microseconds kPause(50);

// ---- The group.

// One collective under way.
struct Flight {
  Operation op;
  // The host's group compares what the ranks issued: the largest of {signature, -signature}.
  Tensor signature;
  Work compared;
  NcclPlan plan;  // From when it has begun.
  Event passed;   // From when all of it is on the stream.
};

class NcclGroup final : public OperationGroup {
 public:
  // `transfers` does Send and Receive on `host`, which it owns.
  NcclGroup(std::unique_ptr<Communicator> transfers, Communicator& host, Device& device, const NcclApi& api, NcclComm* comm,
            std::unique_ptr<Stream> stream, std::unique_ptr<Stream> memory, const NcclOptions& options)
      : options_(options),
        host_(host),
        device_(device),
        api_(api),
        comm_(comm),
        stream_(std::move(stream)),
        memory_(device, std::move(memory)),
        transfers_(std::move(transfers)) {
    host_.OnAbort([this](const absl::Status& cause) { End(cause); });
    runner_ = std::thread([this] { Run(); });
  }
  ~NcclGroup() override;

  int index() const override { return host_.index(); }
  int size() const override { return host_.size(); }
  Epoch epoch() const override { return host_.epoch(); }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override {
    SHOAL_RETURN_IF_ERROR(status());
    return memory_.Allocate(std::move(shape), dtype);
  }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override;
  void Abort(const absl::Status& cause) override { host_.Abort(cause); }
  absl::Status status() const override { return host_.status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override { host_.OnAbort(std::move(callback)); }

 private:
  Work Issue(Operation op, const OpOptions& options) override;

  // Of the runner: the only thread that uses comm_ and stream_.
  void Run();
  bool WaitForWork(int idle_looks, absl::Status* over);
  bool Look();
  bool LookAtBeginning();
  bool LookAtFirst();
  absl::Status Begin(Flight* flight);
  absl::Status Complete(Flight* flight);
  void Add(const NcclPlan::Summed& sum);
  void FinishFirst(const absl::Status& result);
  void Tear();
  void Close();

  absl::Status StatusOf(const DeviceResult& result, const Flight& flight) const {
    return device_.StatusOf(result, OpName(flight.op));
  }
  bool Over() {
    const MutexLock lock(&mutex_);
    return !over_.ok();
  }
  // Ends the group here; the first cause stays.
  void End(const absl::Status& cause);
  // Ends the group on all ranks, because of this one.
  void Fail(const absl::Status& cause);

  const NcclOptions options_;
  Communicator& host_;
  Device& device_;
  const NcclApi& api_;

  Mutex mutex_;
  CondVar changed_;
  std::deque<Flight> issued_ ABSL_GUARDED_BY(mutex_);  // Not seen by the runner yet.
  uint64_t last_seq_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t open_ ABSL_GUARDED_BY(mutex_) = 0;  // Operations that have not ended.
  absl::Status over_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;

  // The runner's.
  NcclComm* comm_;  // Null when it was aborted.
  const std::unique_ptr<Stream> stream_;
  std::deque<Flight> flights_;
  size_t on_stream_ = 0;    // Of flights_: wholly on the stream.
  bool beginning_ = false;  // The next one is on its way there.

  GroupMemory memory_;
  const std::unique_ptr<Communicator> transfers_;  // Owns host_, which calls back: ends first.
  std::thread runner_;
};

NcclGroup::~NcclGroup() {
  bool pending = false;
  {
    const MutexLock lock(&mutex_);
    pending = open_ > 0;
  }
  if (pending) Fail(absl::CancelledError("closed with operations pending"));
  {
    const MutexLock lock(&mutex_);
    closing_ = true;
  }
  changed_.NotifyAll();
  runner_.join();
}

Work NcclGroup::Issue(Operation op, const OpOptions& options) {
  if (op.kind == OpKind::kBarrier) return host_.Barrier(options);
  if (op.kind == OpKind::kSend || op.kind == OpKind::kReceive) return IssueOn(*transfers_, op, options.deadline);
  absl::Status refused = CheckArguments(op, index(), size());
  if (refused.ok()) refused = CheckForNccl(op);
  if (refused.ok()) refused = status();
  if (!refused.ok()) return RefusedWork(op, refused);
  const bool limited = options.deadline != absl::InfiniteFuture();
  op.deadline_ns = SteadyDeadlineNs(limited ? options.deadline : absl::Now() + options_.timeout);
  op.state = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  const Work work(op.state);
  Flight flight = {.op = std::move(op), .signature = Zeros({2}, DType::kI64)};
  const int64_t signature = Signature(flight.op);
  flight.signature.data<int64_t>()[0] = signature;
  flight.signature.data<int64_t>()[1] = -signature;
  {
    const MutexLock lock(&mutex_);
    flight.op.seq = ++last_seq_;
    flight.compared = host_.AllReduce(flight.signature, flight.signature, ReduceOp::kMax,
                                      {.deadline = options.deadline, .label = options.label});
    issued_.push_back(std::move(flight));
    ++open_;
  }
  changed_.NotifyAll();
  return work;
}

void NcclGroup::End(const absl::Status& cause) {
  {
    const MutexLock lock(&mutex_);
    if (over_.ok()) over_ = absl::AbortedError(cause.message());
  }
  changed_.NotifyAll();
}

void NcclGroup::Fail(const absl::Status& cause) {
  const absl::Status told(cause.code(), absl::StrCat("rank ", index(), ": ", cause.message()));
  host_.Abort(told);
  const absl::Status first = host_.status();  // Another rank may have failed before.
  End(first.ok() ? told : first);
}

// ---- The runner.

void NcclGroup::Run() {
  device_.Use();
  absl::Status over;
  int idle_looks = 0;
  while (WaitForWork(idle_looks, &over)) {
    if (over.ok()) {
      idle_looks = Look() ? 0 : idle_looks + 1;
      continue;
    }
    Tear();
    while (!flights_.empty()) FinishFirst(over);
  }
  Close();
}

// Takes what was issued. Waits while there is nothing to do, and for a moment after many looks that found nothing. False: the
// group closes, and nothing is left.
bool NcclGroup::WaitForWork(int idle_looks, absl::Status* over) {
  const MutexLock lock(&mutex_);
  while (issued_.empty() && flights_.empty() && (over_.ok() || comm_ == nullptr) && !closing_) changed_.Wait(&mutex_);
  if (issued_.empty() && idle_looks > kLooks && over_.ok()) {
    changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() + kPause);
  }
  std::move(issued_.begin(), issued_.end(), std::back_inserter(flights_));
  issued_.clear();
  *over = over_;
  return !flights_.empty() || !closing_;
}

// Whether anything has moved.
bool NcclGroup::Look() {
  if (flights_.empty()) return false;
  const bool moved = LookAtBeginning() || LookAtFirst();
  const int64_t now_ns = moved ? 0 : NowNs();
  for (const Flight& flight : flights_) {
    // Before all have issued it, the host's group has the deadline, and knows who is late.
    if (now_ns < flight.op.deadline_ns || !flight.compared.Done()) continue;
    Fail(absl::DeadlineExceededError(absl::StrCat(OpName(flight.op), " missed its deadline")));
    return true;
  }
  return moved;
}

// Brings the next operation to the stream.
bool NcclGroup::LookAtBeginning() {
  const DeviceResult state = api_.progress(comm_);
  if (state.code == Code::kNotReady) return false;
  Flight& next = flights_[std::min(on_stream_, flights_.size() - 1)];
  absl::Status status = StatusOf(state, next);
  if (status.ok() && on_stream_ == flights_.size()) return false;
  if (status.ok() && !beginning_) {
    beginning_ = true;
    status = Begin(&next);
  } else if (status.ok()) {
    beginning_ = false;
    status = Complete(&next);
    ++on_stream_;
  }
  if (!status.ok()) Fail(status);
  return true;
}

// Copies, and NCCL's calls, which may go on afterwards.
absl::Status NcclGroup::Begin(Flight* flight) {
  flight->plan = PlanNcclCalls(flight->op, index(), size(), *stream_);
  for (const NcclPlan::Copied& copied : flight->plan.copies) Copy(copied.from, copied.to, *stream_);
  SHOAL_RETURN_IF_ERROR(stream_->status(), OpName(flight->op));
  if (flight->plan.calls.empty()) return absl::OkStatus();
  device_.Use();
  SHOAL_RETURN_IF_ERROR(StatusOf(api_.group_start(), *flight));
  absl::Status status;
  for (const NcclCall& call : flight->plan.calls) {
    const DeviceResult result = shoal::Issue(call, api_, comm_, stream_->handle());
    if (result.code != Code::kNotReady) status = StatusOf(result, *flight);
    if (!status.ok()) break;
  }
  const DeviceResult ended = api_.group_end();
  return !status.ok() || ended.code == Code::kNotReady ? status : StatusOf(ended, *flight);
}

// What comes after NCCL's calls.
absl::Status NcclGroup::Complete(Flight* flight) {
  for (const NcclPlan::Summed& sum : flight->plan.sums) Add(sum);
  flight->passed = stream_->Record();
  return Annotate(stream_->status(), OpName(flight->op));
}

void NcclGroup::Add(const NcclPlan::Summed& sum) {
  for (size_t begin = 0; begin < sum.contributions.size(); begin += kSummedMax - 1) {
    std::vector<Tensor> from = {sum.owner};
    const size_t end = std::min(begin + kSummedMax - 1, sum.contributions.size());
    for (size_t i = begin; i < end; ++i) from.push_back(sum.contributions[i]);
    SumOnDevice(from, sum.owner, *stream_);
  }
}

// Ends the first operation if it is done here and begun everywhere.
bool NcclGroup::LookAtFirst() {
  Flight& first = flights_.front();
  const bool passed = on_stream_ > 0 && first.passed.Done();
  // Who waits for the host's group helps it, and hears of ranks that have left.
  if (!first.compared.Done()) first.compared.Await(absl::Now() + absl::Microseconds(20)).IgnoreError();
  if (!first.compared.Done()) return false;
  if (const absl::Status compared = first.compared.Await(); !compared.ok()) {
    End(compared);
    return true;
  }
  const int64_t* const largest = first.signature.data<int64_t>();
  absl::Status status;
  if (largest[0] != -largest[1]) {
    status = absl::InternalError("other ranks have issued another operation, or with other arguments");
  } else if (!passed) {
    return false;
  } else {
    status = first.passed.Wait();
  }
  if (status.ok()) {
    FinishFirst(status);
  } else {
    Fail(Annotate(status, OpName(first.op)));
  }
  return true;
}

void NcclGroup::FinishFirst(const absl::Status& result) {
  Flight first = std::move(flights_.front());
  flights_.pop_front();
  if (on_stream_ > 0) --on_stream_;
  // Its memory is the caller's again, and what the host's group still reads is not given back before that has ended.
  if (!result.ok()) first.compared.Await().IgnoreError();
  const std::shared_ptr<QueuedWork> work = std::move(first.op.state);
  const std::string name = OpName(first.op);
  first = Flight();
  {
    const MutexLock lock(&mutex_);
    --open_;
  }
  work->Finish(Annotate(result, name));
}

// Ends what NCCL does on this device. Afterwards nothing uses the tensors of operations.
void NcclGroup::Tear() {
  if (comm_ == nullptr) return;
  device_.Use();
  const absl::Status aborted = device_.StatusOf(api_.abort(std::exchange(comm_, nullptr)), "aborting NCCL");
  if (!aborted.ok()) SHOAL_LOG(kWarning) << std::string(aborted.message());
  stream_->Wait().IgnoreError();
  on_stream_ = 0;
  beginning_ = false;
}

// Politely: what this rank has sent has arrived. Unless the group is over, or peers do not close theirs.
void NcclGroup::Close() {
  if (comm_ == nullptr) return;
  if (Over()) return Tear();
  device_.Use();
  DeviceResult left = api_.finalize(comm_);
  const int64_t end_ns = NowNs() + absl::ToInt64Nanoseconds(options_.close_timeout);
  while (left.code == Code::kNotReady && NowNs() < end_ns && !Over()) {
    std::this_thread::sleep_for(kPause);
    left = api_.progress(comm_);
  }
  if (left.code != Code::kOk) return Tear();
  const absl::Status destroyed = device_.StatusOf(api_.destroy(std::exchange(comm_, nullptr)), "closing NCCL");
  if (!destroyed.ok()) SHOAL_LOG(kWarning) << std::string(destroyed.message());
}

// ---- Connecting.

absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::unique_ptr<Communicator> host, Device& device, const NcclApi& api,
                                                      const NcclOptions& options, absl::Time deadline) {
  Communicator& owned = *host;
  // A rank that fails here leaves: the others, which wait for it to share the id, are told.
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> memory, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> transfers, StageThroughHost(std::move(host), device));
  SHOAL_ASSIGN_OR_RETURN(const NcclId id, ShareNcclId(owned, device, api, deadline));
  const absl::StatusOr<NcclComm*> comm = MeetInNccl(id, owned, device, api, deadline);
  if (!comm.ok()) {
    owned.Abort(Annotate(comm.status(), absl::StrCat("rank ", owned.index())));  // The others wait for this rank.
    return comm.status();
  }
  return std::make_unique<NcclGroup>(std::move(transfers), owned, device, api, *comm, std::move(stream), std::move(memory), options);
}

absl::StatusOr<std::unique_ptr<Communicator>> NcclGroup::Split(absl::Span<const int> members) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_.Split(members));
  return Connect(std::move(part), device_, api_, options_, absl::Now() + options_.connect_timeout);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectNccl(std::unique_ptr<Communicator> host, Device& device, const NcclApi& api,
                                                          const NcclOptions& options) {
  const absl::Time deadline = absl::Now() + options.connect_timeout;
  SHOAL_ASSIGN_OR_RETURN(const std::string obstacle, FindNcclObstacle(*host, device, &api, deadline));
  if (!obstacle.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(obstacle, "; such a group is staged through the host (StageThroughHost)"));
  }
  return Connect(std::move(host), device, api, options, deadline);
}

absl::StatusOr<const NcclApi*> LoadNccl(const Device& device) {
  SHOAL_ASSIGN_OR_RETURN(void* const symbol, PluginSymbol(device.api().name, kNcclApiSymbol));
  const NcclApi* api = nullptr;
  SHOAL_RETURN_IF_ERROR(device.StatusOf(reinterpret_cast<DeviceResult (*)(const NcclApi**)>(symbol)(&api), "loading NCCL"));
  if (api->version != kNcclApiVersion) {
    return absl::FailedPreconditionError(absl::StrCat("the plug-in's table of NCCL has version ", api->version, ", this program ",
                                                      kNcclApiVersion, ": they must come from one build"));
  }
  return api;
}

}  // namespace shoal
