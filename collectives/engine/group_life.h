// Whether one group still lives, and why not. Shared by all that work for the group. Thread-safe.
//
// The order of an end, on every member:
//   1. Every sleeper's Fence runs. Ended() and status() do not tell yet.
//   2. Ended() and status() tell.
//   3. Every sleeper's Wake runs; then, on the communicator's thread, the callbacks.
// A Work ends ABORTED because of what Ended() or status() say, so after all fences: a fence that tells the peers "what you
// read from here after this does not count" comes before the caller gets his buffers back.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "collectives/program/program.h"
#include "runtime/base/mutex.h"

namespace shoal {

// Works for a group. Its functions are called with locks held, from any thread: they must not block (for milliseconds a
// Fence may, when a process on this host has stopped), nor call the group's life or the world.
class Sleeper {
 public:
  virtual ~Sleeper() = default;
  // Lets threads that sleep look again: the group ended, or one of its members left.
  virtual void Wake() = 0;
  // The group ends for `cause`. Once, before anybody can know.
  virtual void Fence(const std::string& /*cause*/) {}
};

// What a process did last in a group, for diagnosis. One writer at a time, any reader; no locks, no clock: cheap enough
// for the smallest operation.
class OperationNote {
 public:
  static constexpr size_t kLabelBytes = 40;  // Longer labels are cut.
  struct Value {
    uint64_t changes = 0;  // 0: nothing yet. Odd: the operation runs; even: it has ended.
    OpKind kind = OpKind::kBarrier;
    uint64_t seq = 0;
    std::string label;
  };

  void Start(OpKind kind, std::string_view label, uint64_t seq);
  void End();
  Value Read() const;

 private:
  std::atomic<uint64_t> version_{0};  // Odd while it is written.
  std::atomic<uint64_t> changes_{0}, seq_{0}, kind_and_size_{0};
  std::atomic<uint64_t> label_[kLabelBytes / 8] = {};
};

class GroupLife {
 public:
  virtual ~GroupLife() = default;
  // One relaxed-cost load: fit for spinning loops.
  bool Ended() const { return ended_.load(std::memory_order_acquire); }
  // OK, or ABORTED with the cause. No lock either: may be called with any held.
  virtual absl::Status status() const;
  // Ends this group and those split from it, on every member, unless it is over. Returns status(). Never blocks.
  virtual absl::Status End(const std::string& cause) = 0;

  // The kernel says that the member's process is dead: its threads have been told to stop, and do when their cores are
  // interrupted. False: it may live. Lock-free.
  virtual bool ProcessDied(int /*member*/) const { return false; }

  uint64_t key() const { return key_; }                    // Names the group on the wire.
  const std::vector<int>& ranks() const { return ranks_; }  // Of the world, by index in the group.
  int index() const { return index_; }

  // One that comes too late is fenced and woken at once. RemoveSleeper waits until none of its functions runs.
  void AddSleeper(Sleeper* sleeper);
  void RemoveSleeper(Sleeper* sleeper);
  // `callback` runs once when the group has ended, on the world's monitor thread (in a world of one rank: on the thread
  // that ends it). RemoveCallbacks forgets those of `owner` and waits until none runs, unless it is called by one.
  void AddCallback(const void* owner, std::function<void(const absl::Status&)> callback);
  void RemoveCallbacks(const void* owner);
  // Whether this thread is in a callback of `owner`.
  bool InCallbackOf(const void* owner);

  // The executor of the group's operations writes here what it does.
  OperationNote& note() { return note_; }

 protected:
  GroupLife(uint64_t key, std::vector<int> ranks, int index) : key_(key), ranks_(std::move(ranks)), index_(index) {}
  // Steps 1 to 3 of the end, without the callbacks. Does nothing when the group is over.
  void Finish(const absl::Status& cause);
  void WakeSleepers();
  // Runs the callbacks of a group that has ended.
  void RunCallbacks();
  // Callbacks of an ended group wait for RunCallbacks. Called without locks.
  virtual void RunCallbacksSoon() { RunCallbacks(); }

  std::atomic<bool> ended_{false};

 private:
  using Callback = std::function<void(const absl::Status&)>;

  const uint64_t key_;
  const std::vector<int> ranks_;
  const int index_;
  OperationNote note_;
  absl::Status status_;  // Written before ended_ is set, and final then: who saw that reads it without a lock.
  Mutex mutex_;          // Held while sleepers are called, so Ended() and status() do without it.
  std::set<Sleeper*> sleepers_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::pair<const void*, Callback>> callbacks_ ABSL_GUARDED_BY(mutex_);  // With their owners.
  const void* running_ ABSL_GUARDED_BY(mutex_) = nullptr;                           // The owner of the one that runs.
  std::thread::id runner_ ABSL_GUARDED_BY(mutex_);
  CondVar callback_done_;
};

}  // namespace shoal
