// Runs the operations of one group over its channel: collectives one after the other in the order of issue, sends and
// receives all at once. They run on a thread that awaits one of them, or, when nobody does, on the executor's own thread
// (started by the first operation): waking a sleeping thread costs 25 us, more than a small operation, so it is woken only
// for those that are not usually awaited at once. Whoever runs moves everybody's bytes. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "collectives/engine/group_life.h"
#include "collectives/engine/op.h"
#include "collectives/engine/program_run.h"
#include "collectives/transport/channel.h"
#include "runtime/base/mutex.h"

namespace shoal {

// What the executor asks of its group. Called on whatever thread runs operations, one call at a time.
class ExecutorHost {
 public:
  virtual ~ExecutorHost() = default;
  // For errors: "rank 2 (pid 71, host b)"; of several members also what they did last.
  virtual std::string Name(int member) = 0;
  virtual std::string Names(const std::vector<int>& members) = 0;
  // The member said goodbye: what it has not done by now it never will.
  virtual bool Left(int member) = 0;
  // The program of an operation. The pointer stays the same for equal operations.
  virtual absl::StatusOr<std::shared_ptr<const PreparedProgram>> Prepare(const Operation& op) = 0;
  // Memory for a run, which stays as it is until the next call. RESOURCE_EXHAUSTED: the system has too little.
  virtual absl::StatusOr<std::byte*> Scratch(int64_t bytes) = 0;
  // How long the operation took here, after it completed.
  virtual void Observe(const Operation& /*op*/, int64_t /*ns*/) {}
  // An operation of the group's own that must run before `op`, on all ranks alike; null: none. Ended calls it back.
  virtual Operation* Prelude(const Operation& /*op*/) { return nullptr; }
  virtual void PreludeEnded() {}
  // What shows that a member will never be in `op`, because it issued another operation in its place, one that runs
  // elsewhere: for an error. Empty: nothing does.
  virtual std::string Elsewhere(const Operation& /*op*/) { return ""; }
};

// Learns which operations are awaited as soon as they are issued. By kind, label and size: a program repeats itself. Not
// thread-safe.
class AwaitHabits {
 public:
  AwaitHabits() { wakes_.fill(1); }  // What is not known yet may be meant to run beside what its issuer does next.
  static size_t SlotOf(const Operation& op);

  // Whether a thread must be woken for such an operation, because its issuer may not come to run it.
  bool MustWake(size_t slot) const { return wakes_[slot] > 0; }
  void AwaitedAtOnce(size_t slot) { wakes_[slot] -= wakes_[slot] > 0 ? 1 : 0; }
  void LeftAlone(size_t slot) { wakes_[slot] = kForget; }

 private:
  static constexpr size_t kSlots = 256;
  static constexpr uint8_t kForget = 16;  // So often awaited at once, one that was left alone counts as awaited again.

  std::array<uint8_t, kSlots> wakes_;
};

class GroupExecutor final : public WorkRunner, public Sleeper, public std::enable_shared_from_this<GroupExecutor> {
 public:
  // Borrows `host` until Close().
  GroupExecutor(std::unique_ptr<Channel> channel, std::shared_ptr<GroupLife> life, ExecutorHost* host);
  ~GroupExecutor() override;

  // Numbers the operation (Operation::seq) and queues it. Send and receive: matched by peer and tag, in the order of issue.
  Work Push(Operation op);
  // A number for an operation that runs elsewhere, in the same order on all ranks.
  uint64_t NextSeq() { return issued_.fetch_add(1, std::memory_order_relaxed) + 1; }
  void Help(QueuedWork& work, int64_t deadline_ns) override;
  // Has the executor's thread call `poll` until it returns false. Thread-safe, never blocks.
  void Attend(std::function<bool()> poll);

  bool Idle();
  // Waits until no operation is left, then joins the thread and closes the channel. Call once, when the operations are
  // bound to end and no more will come; handles may outlive it. Not from a callback of one of them.
  void Close();

  // The group ended or a member left.
  void Wake() override;

 private:
  using Ended = std::pair<std::shared_ptr<QueuedWork>, absl::Status>;

  void RunThread();
  bool MustWake() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetDeadline() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AttendOnce() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SleepUntilNeeded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Runs operations while this thread is the driver; returns when `until` is true, `deadline_ns` has passed, nothing is
  // left, or, after callbacks ran, another thread drives.
  template <class Until>
  void Drive(const Until& until, int64_t deadline_ns) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Tells those who wait. Not the driver meanwhile: callbacks may await. True when this thread drives again.
  bool TellEnded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Of the driver, without the lock.
  bool Advance();            // True when something happened.
  void AcceptNew();
  void StartFront();
  absl::Status Start(Operation& op, uint64_t number);
  void PostTransfer(Operation op);
  void FinishFront();
  void EndFront(const absl::Status& status);
  void EndTransfer(uint64_t token);
  void CheckWaiting();       // Deadlines and peers that left.
  void MissDeadline();
  std::vector<int> NotArrived(const std::vector<int>& members) const;
  const Operation* LateTransfer() const;  // Null: none.
  int64_t DueNs() const;  // Of the next deadline.
  void PlanProbes();
  void Probe();
  void EndGroup(const std::string& cause);
  void FailAll();
  std::string MismatchText(const Mismatch& mismatch) const;
  std::string NameOfRunning() const;

  std::unique_ptr<Channel> channel_;  // Null once closed.
  const std::shared_ptr<GroupLife> life_;
  ExecutorHost* const host_;
  std::atomic<uint64_t> issued_{0};
  std::atomic<int64_t> deadline_ns_;  // The earliest of all operations.
  std::atomic<bool> new_transfers_{false};

  // The driver's.
  struct Transfer {
    Operation op;
    MessageId id;
  };
  ProgramRun run_;
  Operation* front_ = nullptr;     // Runs; in queue_.
  Operation* prelude_ = nullptr;   // Runs before the front one.
  bool failed_ = false;
  int64_t started_ns_ = 0;
  // The members that the front operation waits for are probed, later all.
  int probes_ = 0;          // Sent.
  int64_t probe_ns_ = 0;    // When the next is due.
  int64_t check_ns_ = 0;    // When CheckWaiting is due although something moves.
  int64_t lenient_ns_ = 0;  // Until then others may say who misses the deadline. 0: it is not missed yet.
  absl::flat_hash_map<uint64_t, Transfer> transfers_;  // By token.
  uint64_t transfers_posted_ = 0;
  std::map<std::tuple<OpKind, int, uint32_t>, uint64_t> transfer_numbers_;  // By direction, member and tag.
  std::vector<Channel::Event> events_;
  std::vector<Ended> ended_;

  Mutex mutex_;
  CondVar changed_;
  std::deque<Operation> queue_ ABSL_GUARDED_BY(mutex_);          // Collectives. A deque's elements stay where they are.
  std::deque<Operation> issued_transfers_ ABSL_GUARDED_BY(mutex_);
  std::multiset<int64_t> transfer_deadlines_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::function<bool()>> attended_ ABSL_GUARDED_BY(mutex_);
  uint64_t transfers_issued_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t open_transfers_ ABSL_GUARDED_BY(mutex_) = 0;
  bool driving_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread::id> telling_ ABSL_GUARDED_BY(mutex_);  // Threads that run callbacks.
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_ ABSL_GUARDED_BY(mutex_);
  // Whether the thread must be told of new operations, or finds them itself.
  bool asleep_ ABSL_GUARDED_BY(mutex_) = false;
  bool somebody_waits_ ABSL_GUARDED_BY(mutex_) = false;  // For an operation that another thread runs.
  AwaitHabits habits_ ABSL_GUARDED_BY(mutex_);
  size_t waking_transfers_ ABSL_GUARDED_BY(mutex_) = 0;  // Of the open ones.
  int64_t pushed_ns_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace shoal
