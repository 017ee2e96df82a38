#include "collectives/engine/executor.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "runtime/base/thread.h"

namespace shoal {
namespace {

constexpr uint64_t kTransferBit = uint64_t{1} << 63;
// Tokens of collectives are instructions' indices; those of transfers count from here.
constexpr uint64_t kFirstTransferToken = uint64_t{1} << 40;

// While the group is in use the thread looks by itself, this often, for operations that nobody runs although they usually
// are awaited at once.
constexpr int64_t kLookNs = 2'000'000;
constexpr int64_t kInUseNs = 50'000'000;
constexpr int64_t kAtOnceNs = 20'000;
// Between two looks at operations that run elsewhere and that nobody awaits.
constexpr int64_t kAttendNs = 50'000;
// After so long the members that an operation waits for are told what this rank waits in, and then all; when the deadline
// is near, earlier.
constexpr int64_t kProbeNs = 3'000'000, kProbeAllNs = 100'000'000;
// When this rank waits only for members that wait themselves, these can better say who misses the deadline.
constexpr int64_t kLenientNs = 50'000'000;
// How long a driver sleeps at most before it looks whether the peers it waits for have left.
constexpr int64_t kWaitNs = 50'000'000;

}  // namespace

size_t AwaitHabits::SlotOf(const Operation& op) {
  const auto bytes = static_cast<uint64_t>(op.in.bytes() + op.out.bytes());
  const uint64_t mixed =
      (std::hash<std::string>()(op.label) ^ (bytes << 8 | static_cast<uint64_t>(op.kind))) * 0x9e3779b97f4a7c15u;
  return mixed >> 56;
}

GroupExecutor::GroupExecutor(std::unique_ptr<Channel> channel, std::shared_ptr<GroupLife> life, ExecutorHost* host)
    : channel_(std::move(channel)), life_(std::move(life)), host_(host), deadline_ns_(kNeverNs) {
  life_->AddSleeper(this);
}

GroupExecutor::~GroupExecutor() {
  if (channel_ != nullptr) life_->RemoveSleeper(this);
}

void GroupExecutor::Wake() { channel_->Wake(); }

Work GroupExecutor::Push(Operation op) {
  auto state = std::make_shared<QueuedWork>(weak_from_this());
  state->issued_ns = NowNs();
  state->habit = AwaitHabits::SlotOf(op);
  op.state = state;
  const bool is_transfer = op.kind == OpKind::kSend || op.kind == OpKind::kReceive;
  bool notify = false, wake = false;
  {
    MutexLock lock(&mutex_);
    op.seq = is_transfer ? ++transfers_issued_ : NextSeq();  // Transfers stand outside of the common order.
    const int64_t deadline_ns = op.deadline_ns;
    state->wakes = habits_.MustWake(state->habit);
    if (is_transfer) {
      waking_transfers_ += state->wakes ? 1 : 0;
      transfer_deadlines_.insert(deadline_ns);
      ++open_transfers_;
      issued_transfers_.push_back(std::move(op));
      new_transfers_.store(true, std::memory_order_release);
    } else {
      queue_.push_back(std::move(op));
    }
    const bool closer = deadline_ns < deadline_ns_.load(std::memory_order_relaxed);
    if (closer) deadline_ns_.store(deadline_ns, std::memory_order_relaxed);
    // A driver looks for the next collective by itself, when it has ended the one before.
    wake = driving_ && (is_transfer || closer);
    if (!thread_.joinable()) thread_ = std::thread([this] { RunThread(); });
    notify = !driving_ && (asleep_ || MustWake());
    pushed_ns_ = state->issued_ns;
  }
  if (notify) changed_.NotifyAll();
  if (wake) channel_->Wake();
  return Work(std::move(state));
}

void GroupExecutor::Attend(std::function<bool()> poll) {
  {
    MutexLock lock(&mutex_);
    attended_.push_back(std::move(poll));
    if (!thread_.joinable()) thread_ = std::thread([this] { RunThread(); });
  }
  changed_.NotifyAll();
}

// Whether operations are left that the thread must be told of, rather than find in time.
bool GroupExecutor::MustWake() const {
  return waking_transfers_ > 0 || std::any_of(queue_.begin(), queue_.end(), [](const Operation& op) { return op.state->wakes; });
}

bool GroupExecutor::HasWork() const { return !queue_.empty() || open_transfers_ > 0; }

void GroupExecutor::SetDeadline() {
  int64_t earliest = transfer_deadlines_.empty() ? kNeverNs : *transfer_deadlines_.begin();
  for (const Operation& op : queue_) earliest = std::min(earliest, op.deadline_ns);
  deadline_ns_.store(earliest, std::memory_order_relaxed);
}

bool GroupExecutor::Idle() {
  MutexLock lock(&mutex_);
  return !HasWork();
}

void GroupExecutor::Help(QueuedWork& work, int64_t deadline_ns) {
  bool notify = false;
  {
    MutexLock lock(&mutex_);
    if (NowNs() - work.issued_ns < kAtOnceNs) {
      habits_.AwaitedAtOnce(work.habit);
    } else {
      habits_.LeftAlone(work.habit);
    }
    if (driving_) {
      somebody_waits_ = true;
      return;
    }
    Drive([&work] { return work.Done(); }, deadline_ns);
    // Operations are left for whoever awaits them, or for the thread, which finds them by itself soon.
    notify = closing_ || (!driving_ && HasWork() && (asleep_ || somebody_waits_ || MustWake()));
    if (!HasWork()) somebody_waits_ = false;
  }
  if (notify) changed_.NotifyAll();
}

void GroupExecutor::SleepUntilNeeded() {
  const bool in_use = NowNs() - pushed_ns_ < kInUseNs;
  if (in_use && !closing_) {
    if (changed_.WaitUntil(&mutex_, SteadyTime(NowNs() + kLookNs))) return;
    if (driving_) return;
    // Nobody came for these.
    for (const Operation& op : queue_) habits_.LeftAlone(op.state->habit);
    for (const Operation& op : issued_transfers_) habits_.LeftAlone(op.state->habit);
    return;
  }
  asleep_ = true;
  changed_.Wait(&mutex_);
  asleep_ = false;
}

void GroupExecutor::AttendOnce() {
  std::vector<std::function<bool()>> attended;
  attended.swap(attended_);
  mutex_.Unlock();
  attended.erase(std::remove_if(attended.begin(), attended.end(), [](const auto& poll) { return !poll(); }),
                 attended.end());
  mutex_.Lock();
  attended_.insert(attended_.end(), attended.begin(), attended.end());
  if (attended_.empty()) return;
  const int64_t until_ns = NowNs() + kAttendNs;
  if (!driving_ && HasWork()) {
    Drive([] { return false; }, until_ns);
  } else {
    (void)changed_.WaitUntil(&mutex_, SteadyTime(until_ns));
  }
}

void GroupExecutor::RunThread() {
  AskForShortTurns();
  MutexLock lock(&mutex_);
  while (true) {
    if (!attended_.empty()) {
      AttendOnce();
      continue;
    }
    if (driving_ || !HasWork()) {
      if (closing_ && !driving_ && telling_.empty() && !HasWork()) return;
      SleepUntilNeeded();
      continue;
    }
    Drive([] { return false; }, kNeverNs);
  }
}

void GroupExecutor::Close() {
  std::thread thread;
  {
    MutexLock lock(&mutex_);
    const std::thread::id self = std::this_thread::get_id();
    SHOAL_CHECK(std::find(telling_.begin(), telling_.end(), self) == telling_.end() && thread_.get_id() != self)
        << "a communicator is destroyed by a callback of one of its operations";
    closing_ = true;
    thread = std::move(thread_);
  }
  changed_.NotifyAll();
  if (thread.joinable()) thread.join();  // It leaves when nothing is queued, running or being told.
  life_->RemoveSleeper(this);
  channel_.reset();
}

// ---- The driver.

template <class Until>
void GroupExecutor::Drive(const Until& until, int64_t deadline_ns) {
  driving_ = true;
  while (!until() && HasWork()) {
    mutex_.Unlock();
    const bool advanced = Advance();
    const int64_t now_ns = NowNs();
    const bool late = now_ns >= deadline_ns;
    if (ended_.empty() && (advanced ? now_ns >= check_ns_ : !late)) {
      check_ns_ = now_ns + kWaitNs;
      CheckWaiting();
      if (!advanced && ended_.empty()) {
        const int64_t until_ns =
            std::min({deadline_ns, DueNs(), front_ != nullptr ? probe_ns_ : kNeverNs, now_ns + kWaitNs});
        (void)channel_->Wait(until_ns);  // The next Poll says the same.
      }
    }
    mutex_.Lock();
    if (!ended_.empty() && !TellEnded()) return;
    if (late) break;
  }
  driving_ = false;
}

bool GroupExecutor::TellEnded() {
  std::vector<Ended> ended;
  ended.swap(ended_);
  SetDeadline();
  driving_ = false;
  telling_.push_back(std::this_thread::get_id());
  mutex_.Unlock();
  for (auto& [state, status] : ended) state->Finish(status);
  ended.clear();
  mutex_.Lock();
  telling_.erase(std::find(telling_.begin(), telling_.end(), std::this_thread::get_id()));
  if (driving_) return false;  // ended_ is another thread's now.
  driving_ = true;
  if (ended_.capacity() == 0) ended_.swap(ended);  // Spares an allocation.
  return true;
}

bool GroupExecutor::Advance() {
  AcceptNew();
  if (failed_ || life_->Ended()) {
    FailAll();
    return true;
  }
  if (front_ == nullptr) StartFront();
  if (failed_) return true;
  bool did = front_ != nullptr && run_.Step();
  events_.clear();
  const absl::Status polled = channel_->Poll(&events_);
  if (!polled.ok()) {
    if (absl::IsFailedPrecondition(polled)) {
      EndGroup(MismatchText(channel_->mismatch()));
    } else {
      EndGroup(std::string(polled.message()));
    }
    return true;
  }
  for (const Channel::Event& event : events_) {
    if (event.token >= kFirstTransferToken) {
      EndTransfer(event.token);
    } else {
      run_.OnEvent(event);
    }
    did = true;
  }
  if (front_ != nullptr && run_.Done()) {
    FinishFront();
    did = true;
  }
  return did;
}

void GroupExecutor::AcceptNew() {
  if (!new_transfers_.load(std::memory_order_acquire)) return;
  std::deque<Operation> taken;
  {
    MutexLock lock(&mutex_);
    taken.swap(issued_transfers_);
    new_transfers_.store(false, std::memory_order_relaxed);
  }
  for (Operation& op : taken) PostTransfer(std::move(op));
}

void GroupExecutor::PostTransfer(Operation op) {
  const bool sends = op.kind == OpKind::kSend;
  const int member = op.root;
  const uint64_t number = ++transfer_numbers_[{op.kind, member, op.tag}];
  const MessageId id = {kTransferBit | number, op.tag, Signature(op)};
  const uint64_t token = kFirstTransferToken + transfers_posted_++;
  const Tensor& data = sends ? op.in : op.out;
  auto* const bytes = static_cast<std::byte*>(data.raw());
  const int64_t size = data.bytes();
  transfers_.emplace(token, Transfer{std::move(op), id});
  if (failed_ || life_->Ended()) return;
  if (sends) {
    channel_->Send(member, id, bytes, size, token);
  } else {
    channel_->Receive(member, id, bytes, size, token);
  }
}

void GroupExecutor::StartFront() {
  {
    MutexLock lock(&mutex_);
    if (queue_.empty()) return;
    front_ = &queue_.front();
  }
  life_->note().Start(front_->kind, front_->label, front_->seq);
  started_ns_ = NowNs();
  PlanProbes();
  prelude_ = host_->Prelude(*front_);
  Operation& op = prelude_ != nullptr ? *prelude_ : *front_;
  // The group's own operations are numbered beside the others, by the one that they come before.
  const uint64_t number = prelude_ != nullptr ? front_->seq | kTransferBit | kTransferBit >> 1 : front_->seq;
  const absl::Status started = Start(op, number);
  if (!started.ok()) EndGroup(absl::StrCat(host_->Name(life_->index()), ": ", OpName(op), ": ", AbslSv(std::string(started.message()))));
}

absl::Status GroupExecutor::Start(Operation& op, uint64_t number) {
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const PreparedProgram> program, host_->Prepare(op));
  Operands operands;
  operands.in = static_cast<const std::byte*>(op.in.raw());
  operands.out = static_cast<std::byte*>(op.out.raw());
  operands.dtype = op.dtype;
  operands.reduce = op.reduce;
  operands.group_size = static_cast<int>(life_->ranks().size());
  if (!op.chunks.empty()) {
    operands.chunk_begins = Displacements(op.counts);
    for (const Tensor& chunk : op.chunks) operands.chunks.push_back(static_cast<std::byte*>(chunk.raw()));
  }
  const int64_t scratch_bytes = program->ScratchBytes(operands.dtype);
  if (scratch_bytes > 0) {
    SHOAL_ASSIGN_OR_RETURN(operands.scratch, host_->Scratch(scratch_bytes));
  }
  run_.Start(std::move(program), std::move(operands), channel_.get(), {number, 0, Signature(op)}, /*base_token=*/0);
  return absl::OkStatus();
}

void GroupExecutor::FinishFront() {
  if (prelude_ != nullptr) {
    prelude_ = nullptr;
    host_->PreludeEnded();
    started_ns_ = NowNs();
    PlanProbes();
    const absl::Status started = Start(*front_, front_->seq);
    if (!started.ok()) EndGroup(absl::StrCat(OpName(*front_), ": ", AbslSv(std::string(started.message()))));
    return;
  }
  channel_->Finish({front_->seq, 0, Signature(*front_)});
  host_->Observe(*front_, NowNs() - started_ns_);
  EndFront(absl::OkStatus());
}

void GroupExecutor::EndFront(const absl::Status& status) {
  Operation op;
  {
    MutexLock lock(&mutex_);
    op = std::move(queue_.front());
    queue_.pop_front();
  }
  front_ = prelude_ = nullptr;
  life_->note().End();
  ended_.emplace_back(std::move(op.state), Annotate(status, OpName(op)));
  // Here its tensors are let go, before anybody is told, so that nobody finds them in use.
}

void GroupExecutor::EndTransfer(uint64_t token) {
  const auto found = transfers_.find(token);
  SHOAL_CHECK(found != transfers_.end()) << "token " << token;
  Operation op = std::move(found->second.op);
  transfers_.erase(found);
  {
    MutexLock lock(&mutex_);
    --open_transfers_;
    waking_transfers_ -= op.state->wakes ? 1 : 0;
    transfer_deadlines_.erase(transfer_deadlines_.find(op.deadline_ns));
  }
  ended_.emplace_back(std::move(op.state), absl::OkStatus());
}

// ---- Waiting for too long.

std::vector<int> GroupExecutor::NotArrived(const std::vector<int>& members) const {
  std::vector<int> missing;
  for (int member : members) {
    if (member != life_->index() && channel_->Reached(member) < front_->seq) missing.push_back(member);
  }
  return missing;
}

const Operation* GroupExecutor::LateTransfer() const {
  for (const auto& [token, transfer] : transfers_) {
    if (transfer.op.deadline_ns <= deadline_ns_.load(std::memory_order_relaxed)) return &transfer.op;
  }
  return nullptr;
}

int64_t GroupExecutor::DueNs() const { return std::max(deadline_ns_.load(std::memory_order_relaxed), lenient_ns_); }

void GroupExecutor::MissDeadline() {
  if (const Operation* late = LateTransfer(); late != nullptr) {
    return EndGroup(absl::StrCat(OpName(*late), ": deadline passed: ", host_->Names({late->root}), " had not arrived"));
  }
  if (front_ == nullptr) return;  // It was issued a moment ago, too late.
  const std::vector<int> awaited = channel_->Awaited();
  std::vector<int> missing = NotArrived(awaited);
  if (missing.empty() && lenient_ns_ == 0) {
    lenient_ns_ = NowNs() + kLenientNs;
    return;
  }
  if (missing.empty()) {
    std::vector<int> all(life_->ranks().size());
    std::iota(all.begin(), all.end(), 0);
    missing = NotArrived(all);
  }
  const std::string name = OpName(*front_);
  if (missing.empty()) {
    return EndGroup(absl::StrCat(name, ": deadline passed: all are in it, and the data of ", host_->Names(awaited),
                                 " had not arrived"));
  }
  EndGroup(absl::StrCat(name, ": deadline passed: ", host_->Names(missing), " had not arrived"));
}

std::string GroupExecutor::NameOfRunning() const {
  if (front_ != nullptr) return OpName(*front_);
  const Operation* first = nullptr;
  for (const auto& [token, transfer] : transfers_) {
    if (first == nullptr || transfer.op.deadline_ns < first->deadline_ns) first = &transfer.op;
  }
  return first == nullptr ? "waiting" : OpName(*first);
}

void GroupExecutor::CheckWaiting() {
  const int64_t now_ns = NowNs();
  if (now_ns >= DueNs()) return MissDeadline();
  if (front_ != nullptr && now_ns >= probe_ns_) Probe();
  if (front_ != nullptr) {
    if (const std::string why = host_->Elsewhere(*front_); !why.empty()) return EndGroup(why);
  }
  std::vector<int> left;
  for (int member : channel_->Awaited()) {
    if (host_->Left(member) && !channel_->MayBeUnderWay(member)) left.push_back(member);
  }
  // What they did, they did before they said goodbye, and it has come: one more step takes it in.
  if (left.empty() || Advance() || !ended_.empty()) return;
  const std::vector<int> awaited = channel_->Awaited();
  for (int member : left) {
    if (std::find(awaited.begin(), awaited.end(), member) != awaited.end()) {
      return EndGroup(absl::StrCat(host_->Name(member), " left"));
    }
  }
}

void GroupExecutor::PlanProbes() {
  probes_ = 0;
  lenient_ns_ = 0;
  probe_ns_ = started_ns_ + std::min(kProbeNs, (DueNs() - started_ns_) / 4);
}

// The first tells those who are in another operation, and wait for this rank there. The second tells everybody who is not
// to blame when a deadline passes.
void GroupExecutor::Probe() {
  const bool first = probes_++ == 0;
  probe_ns_ = first ? started_ns_ + std::min(kProbeAllNs, (DueNs() - started_ns_) / 2) : kNeverNs;
  if (prelude_ != nullptr) return;
  const MessageId id = {front_->seq, 0, Signature(*front_)};
  std::vector<int> members = channel_->Awaited();
  if (!first) {
    members.resize(life_->ranks().size());
    std::iota(members.begin(), members.end(), 0);
  }
  for (int member : members) {
    if (member != life_->index()) channel_->Probe(member, id);
  }
}

std::string GroupExecutor::MismatchText(const Mismatch& mismatch) const {
  const std::string own = host_->Name(life_->index()), peer = host_->Name(mismatch.member);
  const bool transfer = (mismatch.theirs.op & kTransferBit) != 0;
  if (transfer || mismatch.ours.signature == mismatch.theirs.signature) {
    const std::string what = transfer ? absl::StrCat("message with tag ", mismatch.theirs.tag) : NameOfRunning();
    return absl::StrCat(what, ": ", peer, " sends ", mismatch.their_bytes, " bytes to ", own, ", which expects ",
                        mismatch.our_bytes);
  }
  std::string ours = absl::StrCat("past operation #", mismatch.ours.op);
  if (front_ != nullptr && front_->seq == mismatch.ours.op) {
    ours = OpName(*front_);
  } else if (mismatch.ours.signature != 0) {
    ours = absl::StrCat(KindNameOf(mismatch.ours.signature), " #", mismatch.ours.op);
  }
  return absl::StrCat(own, " is in ", ours, ", ", peer, " in ", KindNameOf(mismatch.theirs.signature), " #",
                      mismatch.theirs.op, ": not the same operation, or with other arguments");
}

void GroupExecutor::EndGroup(const std::string& cause) {
  (void)life_->End(cause);
  FailAll();
}

void GroupExecutor::FailAll() {
  if (!failed_) {
    // From now on the channel is left alone. It lets go of all memory before the owners get theirs back.
    failed_ = true;
    events_.clear();
    (void)channel_->Poll(&events_);
    events_.clear();
  }
  const absl::Status status = life_->status();
  SHOAL_CHECK(!status.ok());
  if (front_ != nullptr) EndFront(status);
  while (true) {
    Operation op;
    {
      MutexLock lock(&mutex_);
      if (queue_.empty()) break;
      op = std::move(queue_.front());
      queue_.pop_front();
    }
    ended_.emplace_back(std::move(op.state), Annotate(status, OpName(op)));
  }
  AcceptNew();
  for (auto& [token, transfer] : transfers_) {
    ended_.emplace_back(std::move(transfer.op.state), Annotate(status, OpName(transfer.op)));
  }
  transfers_.clear();
  MutexLock lock(&mutex_);
  open_transfers_ = issued_transfers_.size();
  waking_transfers_ = 0;
  transfer_deadlines_.clear();
  for (const Operation& op : issued_transfers_) {
    waking_transfers_ += op.state->wakes ? 1 : 0;
    transfer_deadlines_.insert(op.deadline_ns);
  }
}

}  // namespace shoal
