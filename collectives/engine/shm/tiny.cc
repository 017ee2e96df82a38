#include "collectives/engine/shm/tiny.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "collectives/engine/op.h"
#include "collectives/engine/reduce.h"
#include "collectives/engine/shm/group_page.h"
#include "collectives/engine/shm/spin.h"
#include "collectives/engine/work_state.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// So many published operations may be unfinished. Who publishes operation s has finished s - kDepth, and has
// seen everybody publish that one, so everybody has finished s - 2 kDepth, whose slot is used again: nobody
// needs to say so.
constexpr uint32_t kDepth = kTinySlots / 2;
static_assert(kTinySlots == 2 * kDepth && (kDepth & (kDepth - 1)) == 0);
constexpr size_t kLabelMax = 40;
constexpr int kPausesElsewhere = 20;  // About 1 us: two turns of other ranks.

// Held for nanoseconds only, but while callbacks of the group's end run.
class ABSL_LOCKABLE SpinLock {
 public:
  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() {
    while (locked_.exchange(true, std::memory_order_acquire)) {
      for (int i = 0; locked_.load(std::memory_order_relaxed); ++i) i < 50 ? CpuPause() : (void)sched_yield();
    }
  }
  void Unlock() ABSL_UNLOCK_FUNCTION() { locked_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> locked_{false};
};

class ABSL_SCOPED_LOCKABLE SpinLockHolder {
 public:
  explicit SpinLockHolder(SpinLock* lock) ABSL_EXCLUSIVE_LOCK_FUNCTION(lock) : lock_(lock) { lock_->Lock(); }
  ~SpinLockHolder() ABSL_UNLOCK_FUNCTION() { lock_->Unlock(); }

 private:
  SpinLock* const lock_;
};

struct Pending {
  OpKind kind = OpKind::kBarrier;
  ReduceOp reduce = ReduceOp::kSum;
  DType dtype = DType::kU8;
  int root = 0;
  const void* in = nullptr;
  std::byte* out = nullptr;
  int64_t in_bytes = 0, out_bytes = 0, part_begin = 0;
  uint64_t seq = 0;
  uint32_t signature = 0;
  int64_t deadline_ns = 0;
  char label[kLabelMax];
};

// What the name of an operation is made of.
struct Label {
  OpKind kind;
  uint64_t seq;
  const char* text;
};

}  // namespace

struct TinyGroup::State {
  State(std::shared_ptr<HostGroup> host_group, int64_t timeout, Hooks its_hooks);

  // ---- Anybody's, without the lock.
  bool Arrived(int seat, uint32_t number) const {
    return slots[seat][number % kTinySlots].stamp.load(std::memory_order_acquire) == number;
  }
  bool AllArrived(uint32_t number) const {
    for (int seat = 0; seat < seats; ++seat) {
      if (seat != own && !Arrived(seat, number)) return false;
    }
    return true;
  }
  // Somebody has not arrived, and nobody of those shares this thread's core.
  bool MissingElsewhere(uint32_t number) const {
    bool missing = false;
    for (int seat = 0; seat < seats; ++seat) {
      if (seat == own || Arrived(seat, number)) continue;
      if (group->IsHere(seat)) return false;
      missing = true;
    }
    return missing;
  }
  // Numbers wrap.
  static bool Reached(uint32_t count, uint32_t number) { return static_cast<int32_t>(count - number) >= 0; }
  bool Ended(uint32_t number) const {
    return Reached(finished.load(std::memory_order_acquire), number) || failed.load(std::memory_order_acquire);
  }

  // ---- With the lock.
  Pending& At(uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock) { return window[number % kDepth]; }
  bool Ready(const Pending& op, uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  bool MayPublish(uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  void Publish(uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  // Ends and publishes what it can, in order.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  void Complete(const Pending& op, uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  void Finish(const Pending& op, uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  void CopyParts(const Pending& op, uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  bool Matches(const Pending& op, uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  void Fail(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock);
  // What a seat has put in. Not from the own slot: loads would wait until the peers have let go of its lines.
  const std::byte* Contribution(const Pending& op, int seat, uint32_t number) const {
    if (seat == own) return static_cast<const std::byte*>(op.in);
    const TinySlot& slot = slots[seat][number % kTinySlots];
    return slot.bytes <= kTinyFirstLineBytes ? slot.first : slot.payload;
  }

  // ---- Without the lock.
  void RunCallbacks();
  // Whether what somebody waits for can still come; fails the operations otherwise. Returns when to ask again
  // at the latest.
  int64_t CheckWaiting();
  std::vector<int> Missing(uint32_t number) const;
  absl::Status StatusOf(uint32_t number, const Label& label);
  // A user is gone. `handle`: its memory; null: the group's own use.
  void Release(void* handle);
  bool Asking() {
    SpinLockHolder holder(&lock);
    return asking > 0;
  }

  const std::shared_ptr<HostGroup> group;
  const int64_t timeout_ns;
  const Hooks hooks;
  const int seats, own;
  std::vector<TinySlot*> slots;  // By seat.

  SpinLock lock;
  std::atomic<uint32_t> finished{0};  // Changed with the lock.
  std::atomic<bool> failed{false};    // `failure` is final.
  std::atomic<uint32_t> issued{0};
  uint32_t published = 0;
  uint32_t settled = 0;       // Everybody has published so many.
  Pending window[kDepth];     // Those published and not finished.
  std::deque<Pending> queue;  // Those not published.
  absl::Status failure;
  struct Callback {
    uint32_t number;
    Label label;
    char text[kLabelMax];
    std::function<void(const absl::Status&)> run;
  };
  std::vector<Callback> callbacks;
  std::atomic<int> callback_count{0};
  std::vector<const std::byte*> sources;  // Of Finish.

  // Handles' memory. The state lives until the last one is gone.
  int64_t users = 1;
  std::vector<void*> free_handles;
  // Threads that use the hooks or the group's life. Changed with the lock, and from zero only while operations are
  // open: what they use must stay until none is there (~TinyGroup).
  int asking = 0;
};

namespace {

// Handles come from the group's own list.
template <class T>
struct HandleAllocator {
  using value_type = T;
  explicit HandleAllocator(TinyGroup::State* its_state) : state(its_state) {}
  template <class U>
  HandleAllocator(const HandleAllocator<U>& other) : state(other.state) {}

  // With the lock held, by Issue.
  T* allocate(size_t) {
    ++state->users;
    if (state->free_handles.empty()) return static_cast<T*>(::operator new(sizeof(T)));
    void* memory = state->free_handles.back();
    state->free_handles.pop_back();
    return static_cast<T*>(memory);
  }
  void deallocate(T* handle, size_t) { state->Release(handle); }
  template <class U>
  bool operator==(const HandleAllocator<U>& other) const {
    return state == other.state;
  }

  TinyGroup::State* state;
};

class TinyWork final : public Work::State {
 public:
  TinyWork(TinyGroup::State* state, uint32_t number, const TinyOp& op)
      : state_(state), number_(number), rooted_(IsRooted(op.kind)), label_{op.kind, op.seq, text_} {
    CopyLabel(op.label, text_);
  }
  static bool IsRooted(OpKind kind) {
    return kind == OpKind::kBroadcast || kind == OpKind::kScatter || kind == OpKind::kReduce ||
           kind == OpKind::kGather;
  }
  static void CopyLabel(std::string_view label, char* text) {
    const size_t size = std::min(label.size(), kLabelMax - 1);
    if (size > 0) std::memcpy(text, label.data(), size);
    text[size] = 0;
  }

  bool Done() override {
    if (state_->Ended(number_)) return true;
    {
      SpinLockHolder holder(&state_->lock);
      state_->Advance();
    }
    state_->RunCallbacks();
    if (!state_->Ended(number_) && state_->group->life().Ended()) state_->CheckWaiting();
    return state_->Ended(number_);
  }

  absl::Status Await(absl::Time deadline) override {
    if (!state_->Ended(number_)) Wait(deadline);
    if (state_->Ended(number_)) return state_->StatusOf(number_, label_);
    return absl::DeadlineExceededError("the operation goes on");
  }

  void OnDone(std::function<void(const absl::Status&)> callback) override {
    bool later = false;
    if (!Done()) {
      SpinLockHolder holder(&state_->lock);
      later = !state_->Ended(number_);
      if (later) {
        ++state_->asking;
        state_->callbacks.push_back({number_, label_, {}, std::move(callback)});
        std::memcpy(state_->callbacks.back().text, text_, kLabelMax);
        state_->callback_count.fetch_add(1, std::memory_order_release);
      }
    }
    if (!later) return callback(state_->StatusOf(number_, label_));
    state_->hooks.attend();
    SpinLockHolder holder(&state_->lock);
    --state_->asking;
  }

 private:
  void Wait(absl::Time deadline) {
    TinyGroup::State& s = *state_;
    // What takes the lock only when that will help.
    const auto look = [&] {
      const uint32_t next = s.finished.load(std::memory_order_acquire) + 1;
      // Who yields while the missing ones run on other cores gains nothing, and is away when they arrive.
      for (int i = 0; i < kPausesElsewhere && s.group->crowded() && s.MissingElsewhere(next); ++i) CpuPause();
      if (next != number_ || rooted_ || s.AllArrived(next)) {
        SpinLockHolder holder(&s.lock);
        s.Advance();
      }
      return s.Ended(number_);
    };
    Spinner spinner(s.group.get());
    const int64_t until_ns = deadline == absl::InfiniteFuture() ? kNeverNs : SteadyDeadlineNs(deadline);
    while (!spinner.Spin(look, until_ns)) {
      const int64_t check_ns = s.CheckWaiting();
      if (s.Ended(number_) || NowNs() >= until_ns) break;
      const uint32_t seen = s.group->PrepareSleep();
      if (look() || s.group->life().Ended()) {
        s.group->CancelSleep();
      } else {
        s.group->Sleep(seen, std::min(until_ns, check_ns));
      }
    }
    s.RunCallbacks();
  }

  TinyGroup::State* const state_;
  const uint32_t number_;
  const bool rooted_;  // Ends before everybody has arrived.
  Label label_;
  char text_[kLabelMax];
};

}  // namespace

TinyGroup::State::State(std::shared_ptr<HostGroup> host_group, int64_t timeout, Hooks its_hooks)
    : group(std::move(host_group)),
      timeout_ns(timeout),
      hooks(std::move(its_hooks)),
      seats(group->seats()),
      own(group->own_seat()),
      sources(seats) {
  const GroupLayout layout(seats);
  for (int seat = 0; seat < seats; ++seat) slots.push_back(layout.tiny(&group->page(seat)));
}

void TinyGroup::State::Release(void* handle) {
  bool last = false;
  {
    SpinLockHolder holder(&lock);
    if (handle != nullptr) free_handles.push_back(handle);
    last = --users == 0;
  }
  if (!last) return;
  for (void* free : free_handles) ::operator delete(free);
  delete this;
}

// ---- Publishing.

bool TinyGroup::State::MayPublish(uint32_t number) {
  const uint32_t before = number - kDepth;
  if (!Reached(finished.load(std::memory_order_relaxed), before)) return false;
  while (!Reached(settled, before) && AllArrived(settled + 1)) ++settled;
  return Reached(settled, before);
}

void TinyGroup::State::Publish(uint32_t number) {
  const Pending& op = At(number);
  TinySlot& slot = slots[own][number % kTinySlots];
  // The first line last: peers look at it, and each look takes it away from this core.
  if (op.in_bytes > 0)
    std::memcpy(op.in_bytes <= kTinyFirstLineBytes ? slot.first : slot.payload, op.in, op.in_bytes);
  slot.signature = op.signature;
  slot.seq = op.seq;
  slot.bytes = static_cast<uint32_t>(op.in_bytes);
  slot.stamp.store(number, std::memory_order_release);
  published = number;
  group->OrderBeforeRing();
  for (int seat = 0; seat < seats; ++seat) {
    if (seat != own) group->RingIfAsleep(seat);
  }
}

Work TinyGroup::Issue(const TinyOp& op) {
  SHOAL_CHECK_LE(op.in_bytes, kTinyPayloadMax);
  State& s = *state_;
  std::shared_ptr<TinyWork> work;
  bool queued = false;
  {
    SpinLockHolder holder(&s.lock);
    const uint32_t number = s.issued.load(std::memory_order_relaxed) + 1;
    s.issued.store(number, std::memory_order_relaxed);
    if (!s.queue.empty() || !s.MayPublish(number)) s.Advance();
    queued = !s.queue.empty() || !s.MayPublish(number);
    Pending* pending = &s.At(number);
    if (queued) pending = &s.queue.emplace_back();
    pending->kind = op.kind;
    pending->reduce = op.reduce;
    pending->dtype = op.dtype;
    pending->root = op.root;
    pending->in = op.in;
    pending->out = static_cast<std::byte*>(op.out);
    pending->in_bytes = op.in_bytes;
    pending->out_bytes = op.out_bytes;
    pending->part_begin = op.part_begin_bytes;
    pending->seq = op.seq;
    pending->signature = op.signature;
    pending->deadline_ns = op.deadline_ns;
    TinyWork::CopyLabel(op.label, pending->label);
    if (!queued) s.Publish(number);
    work = std::allocate_shared<TinyWork>(HandleAllocator<TinyWork>(&s), &s, number, op);
  }
  if (queued) s.hooks.attend();
  return Work(std::move(work));
}

bool TinyGroup::Fits(OpKind kind, int64_t contribution_bytes) {
  switch (kind) {
    case OpKind::kSend:
    case OpKind::kReceive:
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      return false;
    default:
      return contribution_bytes <= kTinyPayloadMax;
  }
}

// ---- Finishing.

bool TinyGroup::State::Ready(const Pending& op, uint32_t number) {
  const int member = group->member(own);
  switch (op.kind) {
    case OpKind::kBroadcast:
    case OpKind::kScatter:
      return op.root == member || Arrived(group->SeatOf(op.root), number);
    case OpKind::kReduce:
    case OpKind::kGather:
      return op.root != member || AllArrived(number);
    default:
      return AllArrived(number);
  }
}

void TinyGroup::State::Advance() {
  if (failed.load(std::memory_order_relaxed)) return;
  while (true) {
    bool did = false;
    const uint32_t next = finished.load(std::memory_order_relaxed) + 1;
    if (Reached(published, next) && Ready(At(next), next)) {
      Complete(At(next), next);
      if (failed.load(std::memory_order_relaxed)) return;
      did = true;
    }
    if (!queue.empty() && MayPublish(published + 1)) {
      At(published + 1) = queue.front();
      queue.pop_front();
      Publish(published + 1);
      did = true;
    }
    if (!did) return;
  }
}

bool TinyGroup::State::Matches(const Pending& op, uint32_t number) {
  for (int seat = 0; seat < seats; ++seat) {
    const TinySlot& slot = slots[seat][number % kTinySlots];
    if (seat == own || !Arrived(seat, number)) continue;
    if (slot.signature == op.signature && slot.seq == op.seq) continue;
    const std::string theirs = absl::StrCat(KindNameOf(slot.signature), " #", slot.seq);
    Fail(group->life().End(absl::StrCat(hooks.name(group->member(own)), " is in ", OpName(op.kind, op.label, op.seq), ", ",
                                        hooks.name(group->member(seat)), " in ", theirs,
                                        ": not the same operation, or with other arguments")));
    return false;
  }
  return true;
}

void TinyGroup::State::Complete(const Pending& op, uint32_t number) {
  if (!Matches(op, number)) return;
  Finish(op, number);
  finished.store(number, std::memory_order_release);
}

void TinyGroup::State::Finish(const Pending& op, uint32_t number) {
  if (op.out == nullptr || op.out_bytes == 0) return;
  switch (op.kind) {
    case OpKind::kAllReduce:
    case OpKind::kReduceScatter:
    case OpKind::kReduce: {
      for (int seat = 0; seat < seats; ++seat) sources[seat] = Contribution(op, seat, number) + op.part_begin;
      std::byte* const out = op.out;
      shoal::Reduce(op.dtype, op.reduce, sources, {&out, 1}, op.out_bytes / SizeOf(op.dtype), seats);
      return;
    }
    case OpKind::kBarrier:
      return;
    default:
      CopyParts(op, number);
  }
}

void TinyGroup::State::CopyParts(const Pending& op, uint32_t number) {
  const int member = group->member(own);
  if (op.kind == OpKind::kBroadcast || op.kind == OpKind::kScatter) {
    if (op.kind == OpKind::kBroadcast && op.root == member) return;
    const std::byte* from = Contribution(op, group->SeatOf(op.root), number) + op.part_begin;
    std::memmove(op.out, from, op.out_bytes);
    return;
  }
  int64_t done = 0;
  for (int seat = 0; seat < seats; ++seat) {
    const int64_t given = seat == own ? op.in_bytes : slots[seat][number % kTinySlots].bytes;
    const int64_t bytes = op.kind == OpKind::kAllToAll ? op.out_bytes / seats : given;
    const int64_t fits = std::min(bytes, op.out_bytes - done);  // Peers' counts are checked by their signature.
    const std::byte* from = Contribution(op, seat, number) + (op.kind == OpKind::kAllToAll ? own * bytes : 0);
    if (from != op.out + done && fits > 0) std::memcpy(op.out + done, from, fits);
    done += fits;
  }
}

// ---- Looking.

void TinyGroup::State::Fail(const absl::Status& status) {
  if (failed.load(std::memory_order_relaxed)) return;
  failure = status.ok() ? absl::AbortedError("the group is over") : status;
  queue.clear();
  failed.store(true, std::memory_order_release);
}

void TinyGroup::State::RunCallbacks() {
  if (callback_count.load(std::memory_order_acquire) == 0) return;
  std::vector<Callback> ready;
  {
    SpinLockHolder holder(&lock);
    const auto first = std::stable_partition(callbacks.begin(), callbacks.end(),
                                             [this](const Callback& c) { return !Ended(c.number); });
    ready.assign(std::make_move_iterator(first), std::make_move_iterator(callbacks.end()));
    callbacks.erase(first, callbacks.end());
    callback_count.store(static_cast<int>(callbacks.size()), std::memory_order_release);
  }
  for (Callback& callback : ready) {
    callback.run(StatusOf(callback.number, {callback.label.kind, callback.label.seq, callback.text}));
  }
}

std::vector<int> TinyGroup::State::Missing(uint32_t number) const {
  std::vector<int> missing;
  for (int seat = 0; seat < seats; ++seat) {
    if (seat != own && !Arrived(seat, number)) missing.push_back(group->member(seat));
  }
  return missing;
}

int64_t TinyGroup::State::CheckWaiting() {
  uint32_t awaited = 0;  // What somebody has not published yet.
  Pending op;
  {
    SpinLockHolder holder(&lock);
    const uint32_t next = finished.load(std::memory_order_relaxed) + 1;
    if (failed.load(std::memory_order_relaxed) || !Reached(issued.load(std::memory_order_relaxed), next)) {
      return kNeverNs;
    }
    const bool is_published = Reached(published, next);
    Pending& first = is_published ? At(next) : queue.front();
    awaited = is_published ? next : next - kDepth;
    if (first.deadline_ns == 0) first.deadline_ns = NowNs() + timeout_ns;
    op = first;
    // Those behind it wait as well, and may have less time.
    const auto consider = [&op](const Pending& other) {
      if (other.deadline_ns != 0) op.deadline_ns = std::min(op.deadline_ns, other.deadline_ns);
    };
    for (uint32_t number = next; Reached(published, number); ++number) consider(At(number));
    for (const Pending& other : queue) consider(other);
    ++asking;
  }
  absl::Status status = group->CheckAlive();
  if (status.ok()) {
    std::vector<int> left;
    for (int member : Missing(awaited)) {
      if (hooks.left(member)) left.push_back(member);
    }
    // What they did, they did before they said goodbye: look again.
    for (int member : left) {
      if (status.ok() && !Arrived(group->SeatOf(member), awaited)) {
        status = group->life().End(absl::StrCat(hooks.name(member), " left"));
      }
    }
    if (status.ok() && NowNs() >= op.deadline_ns) {
      status = group->life().End(absl::StrCat(OpName(op.kind, op.label, op.seq), ": deadline passed: ",
                                              hooks.names(Missing(awaited)), " had not arrived"));
    }
  }
  SpinLockHolder holder(&lock);
  --asking;
  if (status.ok()) return op.deadline_ns;
  // What was complete before the end stays so.
  Advance();
  if (Reached(issued.load(std::memory_order_relaxed), finished.load(std::memory_order_relaxed) + 1))
    Fail(status);
  return kNeverNs;
}

absl::Status TinyGroup::State::StatusOf(uint32_t number, const Label& label) {
  if (Reached(finished.load(std::memory_order_acquire), number)) return absl::OkStatus();
  return Annotate(failure, OpName(label.kind, label.text, label.seq));
}

TinyGroup::TinyGroup(std::shared_ptr<HostGroup> group, int64_t timeout_ns, Hooks hooks)
    : state_(new State(std::move(group), timeout_ns, std::move(hooks))) {}

TinyGroup::~TinyGroup() {
  while (Poll()) {
    SHOAL_CHECK(state_->group->life().Ended()) << "tiny operations are open";
  }
  // Threads that await a handle leave now, and nobody begins to ask any more.
  while (state_->Asking()) sched_yield();
  state_->Release(nullptr);
}

bool TinyGroup::Poll() {
  {
    SpinLockHolder holder(&state_->lock);
    state_->Advance();
  }
  if (!Idle()) state_->CheckWaiting();
  state_->RunCallbacks();
  return !Idle();
}

std::optional<TinyGroup::Ahead> TinyGroup::PeerAhead(uint64_t seq) {
  State& s = *state_;
  SpinLockHolder holder(&s.lock);
  // A peer does not use the slot again before this rank has published there.
  const uint32_t number = s.issued.load(std::memory_order_relaxed) + 1;
  for (int seat = 0; seat < s.seats; ++seat) {
    if (seat == s.own || !s.Arrived(seat, number)) continue;
    const TinySlot& slot = s.slots[seat][number % kTinySlots];
    if (slot.seq <= seq) return Ahead{s.group->member(seat), slot.seq, slot.signature};
  }
  return std::nullopt;
}

bool TinyGroup::Idle() { return state_->Ended(state_->issued.load(std::memory_order_acquire)); }

}  // namespace shoal
