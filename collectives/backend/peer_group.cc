#include "collectives/backend/peer_group.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/operation_group.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/backend/peer_plan.h"
#include "collectives/backend/staged_group.h"
#include "collectives/engine/arguments.h"
#include "collectives/engine/work_state.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// So long the runner helps the host's group with what it waits for, before it sleeps and has another thread do that: waking both up takes
// as long.
constexpr absl::Duration kHelp = absl::Microseconds(100);

// Wakes a thread. Outlives the group in callbacks that still run.
class Doorbell {
 public:
  void Ring() {
    const MutexLock lock(&mutex_);
    rung_ = true;
    changed_.NotifyAll();
  }
  void Wait() {
    MutexLock lock(&mutex_);
    while (!rung_) changed_.Wait(&mutex_);
    rung_ = false;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool rung_ ABSL_GUARDED_BY(mutex_) = false;
};

// One operation under way. What is pending: its notes, later the end of a phase on all ranks, or what is done elsewhere.
struct Flight {
  Operation op;
  absl::Time deadline;
  Tensor own_note, notes;
  Work note_sent;  // Of a send.
  Work pending;
  bool watched = false;  // It rings when it has ended.
  bool staged = false;
  PeerPlan plan;
  size_t phases_done = 0;
};

class PeerGroup final : public OperationGroup {
 public:
  PeerGroup(std::unique_ptr<Communicator> meets, std::unique_ptr<Communicator> phases, std::unique_ptr<Communicator> staged,
            Device& device, std::unique_ptr<Stream> stream, std::unique_ptr<Stream> memory)
      : device_(device), memory_(device, std::move(memory)), meets_(std::move(meets)), phases_(std::move(phases)),
        staged_(std::move(staged)), stream_(std::move(stream)), peers_(device) {
    runner_ = std::thread([this] { Run(); });
  }
  ~PeerGroup() override;

  int index() const override { return meets_->index(); }
  int size() const override { return meets_->size(); }
  Epoch epoch() const override { return meets_->epoch(); }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override {
    SHOAL_RETURN_IF_ERROR(status());
    return memory_.Allocate(std::move(shape), dtype);
  }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override {
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, meets_->Split(members));
    return ConnectPeers(std::move(part), device_);
  }
  void Abort(const absl::Status& cause) override { meets_->Abort(cause); }
  absl::Status status() const override { return meets_->status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override { meets_->OnAbort(std::move(callback)); }

 private:
  Work Issue(Operation op, const OpOptions& options) override;
  void Meet(Flight* flight);

  // The runner's.
  void Run();
  bool TakeIssued();
  bool Look() { return LookAtFirst() || LookAtReceives() || LookAtLeaving(); }
  bool LookAtFirst();
  bool LookAtReceives();
  bool LookAtLeaving();
  void Help();
  absl::Status Prepare(Flight* flight);
  absl::Status Begin(Flight* flight);
  absl::Status RunPhase(const PeerPlan::Phase& phase);
  absl::Status Receive(Flight* flight);
  void Stage(Flight* flight);
  static void Await(Flight* flight, Work work) {
    flight->pending = std::move(work);
    flight->watched = false;
  }
  void Watch(Flight* flight);
  void Finish(Flight flight, absl::Status result);

  OpOptions OptionsOf(const Flight& flight) const { return {.deadline = flight.deadline, .label = flight.op.label}; }
  // Ends the group, because of what this rank found; the first cause stays.
  absl::Status Failed(const absl::Status& cause);

  Device& device_;
  GroupMemory memory_;
  const std::shared_ptr<Doorbell> bell_ = std::make_shared<Doorbell>();

  Mutex mutex_;
  std::deque<Flight> issued_ ABSL_GUARDED_BY(mutex_);  // Not seen by the runner yet.
  uint64_t last_seq_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t open_ ABSL_GUARDED_BY(mutex_) = 0;  // Operations that have not ended.
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;

  // Of all ranks, each with an order of its own: notes, in the order of calls; ends of phases, in that of the runners; staged operations.
  // The others are parts of the first and end with it.
  const std::unique_ptr<Communicator> meets_, phases_, staged_;

  // The runner's.
  const std::unique_ptr<Stream> stream_;
  PeerMemory peers_;
  std::deque<Flight> collectives_;  // The first one runs, or waits for the notes of others.
  std::deque<Flight> receives_;     // Wait for the sender's note.
  std::deque<Flight> leaving_;      // Done here, or elsewhere soon; they wait for others alone.
  std::thread runner_;
};

PeerGroup::~PeerGroup() {
  bool pending = false;
  {
    const MutexLock lock(&mutex_);
    pending = open_ > 0;
  }
  if (pending) meets_->Abort(absl::CancelledError("closed with operations pending"));
  {
    const MutexLock lock(&mutex_);
    closing_ = true;
  }
  bell_->Ring();
  runner_.join();
}

// ---- Issuing.

Work PeerGroup::Issue(Operation op, const OpOptions& options) {
  absl::Status refused = CheckArguments(op, index(), size());
  if (refused.ok()) refused = status();
  if (!refused.ok()) return RefusedWork(op, refused);
  if (op.kind == OpKind::kBarrier) return meets_->Barrier(options);
  op.state = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  const Work work(op.state);
  Flight flight = {.op = std::move(op), .deadline = options.deadline};
  if (flight.op.kind != OpKind::kReceive) {
    PeerNote note = {.head = {.signature = Signature(flight.op), .direct = DoneByPeers(flight.op) ? 1 : 0}};
    for (const Tensor& tensor : TensorsToShare(flight.op, index())) {
      const absl::StatusOr<SharedTensor> shared = Share(tensor, device_);
      note.tensors.push_back(shared.ok() ? *shared : SharedTensor{});
      if (!shared.ok()) note.head.direct = 0;
    }
    if (flight.op.kind == OpKind::kAllToAll) note.counts = flight.op.counts;
    flight.own_note = EncodeNote(note);
    flight.staged = note.head.direct == 0;
  }
  {
    const MutexLock lock(&mutex_);
    flight.op.seq = ++last_seq_;
    ++open_;
    Meet(&flight);
    issued_.push_back(std::move(flight));
  }
  bell_->Ring();
  return work;
}

// Tells the others where this rank's tensors are.
void PeerGroup::Meet(Flight* flight) {
  const OpOptions options = OptionsOf(*flight);
  const Operation& op = flight->op;
  if (op.kind == OpKind::kSend) {
    flight->note_sent = meets_->Send(flight->own_note, op.root, op.tag, options);
    flight->notes = Empty({1}, DType::kU8);  // The receiver's word that it has read all.
    Await(flight, flight->staged ? IssueOn(*staged_, op, flight->deadline) : phases_->Receive(flight->notes, op.root, op.tag, options));
  } else if (op.kind == OpKind::kReceive) {
    flight->notes = Empty({NoteBytes(op, op.root, size())}, DType::kU8);
    Await(flight, meets_->Receive(flight->notes, op.root, op.tag, options));
  } else {
    std::vector<int64_t> bytes;
    for (int rank = 0; rank < size(); ++rank) bytes.push_back(NoteBytes(op, rank, size()));
    flight->notes = Empty({std::accumulate(bytes.begin(), bytes.end(), int64_t{0})}, DType::kU8);
    Await(flight, meets_->AllGather(flight->own_note, bytes, flight->notes, options));
  }
}

// ---- The runner.

void PeerGroup::Run() {
  device_.Use();
  while (TakeIssued()) {
    if (!Look()) Help();
  }
}

// False: the group closes, and nothing is left.
bool PeerGroup::TakeIssued() {
  const MutexLock lock(&mutex_);
  for (Flight& flight : issued_) {
    const OpKind kind = flight.op.kind;
    (kind == OpKind::kSend ? leaving_ : kind == OpKind::kReceive ? receives_ : collectives_).push_back(std::move(flight));
  }
  issued_.clear();
  return open_ > 0 || !closing_;
}

void PeerGroup::Help() {
  const std::deque<Flight>& oldest = leaving_.empty() ? collectives_ : leaving_;
  if (!oldest.empty() && oldest.front().pending.Await(absl::Now() + kHelp).ok()) return;
  if (!collectives_.empty()) Watch(&collectives_.front());
  for (std::deque<Flight>* flights : {&receives_, &leaving_}) {
    for (Flight& flight : *flights) Watch(&flight);
  }
  bell_->Wait();
}

void PeerGroup::Watch(Flight* flight) {
  if (std::exchange(flight->watched, true)) return;
  const auto ring = [bell = bell_](const absl::Status&) { bell->Ring(); };
  flight->pending.OnDone(ring);
  if (!flight->note_sent.Done()) flight->note_sent.OnDone(ring);
}

// Whether the first collective has gone on. Those after it wait: ends of phases have one order on all ranks.
bool PeerGroup::LookAtFirst() {
  if (collectives_.empty() || !collectives_.front().pending.Done()) return false;
  Flight& first = collectives_.front();
  absl::Status status = first.pending.Await();
  if (status.ok()) status = this->status();
  if (status.ok() && first.plan.phases.empty()) status = Prepare(&first);
  if (status.ok() && !first.staged) status = Begin(&first);
  if (status.ok() && !first.staged && first.phases_done < first.plan.phases.size()) return true;
  Flight flight = std::move(first);
  collectives_.pop_front();
  if (status.ok()) {
    if (flight.staged) Stage(&flight);
    leaving_.push_back(std::move(flight));
  } else {
    Finish(std::move(flight), Failed(status));
  }
  return true;
}

// Reads the notes: what is to be done, or that it is staged.
absl::Status PeerGroup::Prepare(Flight* flight) {
  const auto* next = static_cast<const std::byte*>(flight->notes.raw());
  std::vector<PeerNote> notes;
  for (int rank = 0; rank < size(); ++rank) {
    const size_t bytes = static_cast<size_t>(NoteBytes(flight->op, rank, size()));
    notes.push_back(DecodeNote(flight->op, rank, size(), {next, bytes}));
    next += bytes;
    if (notes.back().head.signature != Signature(flight->op)) {
      return absl::InternalError("other ranks have issued another operation, or with other arguments");
    }
    flight->staged = flight->staged || notes.back().head.direct == 0;
  }
  if (flight->staged) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(flight->plan, PlanPeerReads(flight->op, index(), notes, [this](const SharedTensor& shared) {
    return peers_.Open(shared);
  }));
  return absl::OkStatus();
}

// Does the next phase, and waits for the other ranks to do theirs.
absl::Status PeerGroup::Begin(Flight* flight) {
  SHOAL_RETURN_IF_ERROR(RunPhase(flight->plan.phases[flight->phases_done]));
  ++flight->phases_done;
  Await(flight, phases_->Barrier(OptionsOf(*flight)));
  return absl::OkStatus();
}

absl::Status PeerGroup::RunPhase(const PeerPlan::Phase& phase) {
  for (const PeerPlan::Copied& copied : phase.copies) Copy(copied.from, copied.to, *stream_);
  for (const PeerPlan::Summed& sum : phase.sums) SumOnDevice(sum.from, sum.to, *stream_);
  if (phase.copies.empty() && phase.sums.empty()) return stream_->status();
  return stream_->Wait();
}

void PeerGroup::Stage(Flight* flight) { Await(flight, IssueOn(*staged_, flight->op, flight->deadline)); }

bool PeerGroup::LookAtReceives() {
  for (auto flight = receives_.begin(); flight != receives_.end(); ++flight) {
    // In the order of sending, which is that of what the sender is told.
    const auto same = [&](const Flight& other) { return other.op.root == flight->op.root && other.op.tag == flight->op.tag; };
    if (!flight->pending.Done() || std::any_of(receives_.begin(), flight, same)) continue;
    Flight noted = std::move(*flight);
    receives_.erase(flight);
    absl::Status status = noted.pending.Await();
    if (status.ok()) status = this->status();
    if (status.ok()) status = Receive(&noted);
    if (status.ok()) {
      leaving_.push_back(std::move(noted));
    } else {
      Finish(std::move(noted), Failed(status));
    }
    return true;
  }
  return false;
}

// Copies what the sender has told of, and says that this is done.
absl::Status PeerGroup::Receive(Flight* flight) {
  const Operation& op = flight->op;
  const auto* const bytes = static_cast<const std::byte*>(flight->notes.raw());
  const PeerNote note = DecodeNote(op, op.root, size(), {bytes, static_cast<size_t>(flight->notes.bytes())});
  flight->staged = note.head.direct == 0;
  if (flight->staged) {
    Stage(flight);
    return absl::OkStatus();
  }
  const SharedTensor& shared = note.tensors[0];
  if (shared.bytes != op.out.bytes()) {
    return absl::InternalError(absl::StrCat("rank ", op.root, " sends ", shared.bytes, " bytes, ", op.out.bytes(), " are expected"));
  }
  if (!op.out.empty()) {
    SHOAL_ASSIGN_OR_RETURN(std::byte* const address, peers_.Open(shared));
    SHOAL_RETURN_IF_ERROR(RunPhase({.copies = {{Tensor(address, op.out.shape(), op.dtype), op.out}}}));
  }
  flight->own_note = Zeros({1}, DType::kU8);
  Await(flight, phases_->Send(flight->own_note, op.root, op.tag, OptionsOf(*flight)));
  return absl::OkStatus();
}

bool PeerGroup::LookAtLeaving() {
  for (auto flight = leaving_.begin(); flight != leaving_.end(); ++flight) {
    if (!flight->pending.Done() || !flight->note_sent.Done()) continue;
    Flight left = std::move(*flight);
    leaving_.erase(flight);
    absl::Status status = left.note_sent.Await();
    if (status.ok()) status = left.pending.Await();
    const bool ends_group = !status.ok() && !(left.staged && absl::IsInvalidArgument(status));
    Finish(std::move(left), ends_group ? Failed(status) : status);
    return true;
  }
  return false;
}

absl::Status PeerGroup::Failed(const absl::Status& cause) {
  if (status().ok()) meets_->Abort(absl::AbortedError(absl::StrCat("rank ", index(), ": ", cause.message())));
  return absl::AbortedError(status().message());
}

void PeerGroup::Finish(Flight flight, absl::Status result) {
  const std::shared_ptr<QueuedWork> work = std::move(flight.op.state);
  const std::string name = OpName(flight.op);
  // What the host's groups still use is not given back before they have ended too.
  flight.note_sent.Await().IgnoreError();
  flight.pending.Await().IgnoreError();
  flight = Flight();  // Buffers are the caller's again.
  {
    const MutexLock lock(&mutex_);
    --open_;
  }
  work->Finish(Annotate(result, name));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectPeers(std::unique_ptr<Communicator> host, Device& device) {
  std::vector<int> all(static_cast<size_t>(host->size()));
  std::iota(all.begin(), all.end(), 0);
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Stream> memory, device.NewStream());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> phases, host->Split(all));
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> copies, host->Split(all));
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> staged, StageThroughHost(std::move(copies), device));
  return std::make_unique<PeerGroup>(std::move(host), std::move(phases), std::move(staged), device, std::move(stream), std::move(memory));
}

}  // namespace shoal
