#include "collectives/engine/group_life.h"

#include <algorithm>
#include <cstring>

namespace shoal {

// ---- OperationNote: a sequence lock over relaxed atomics.

void OperationNote::Start(OpKind kind, std::string_view label, uint64_t seq) {
  const size_t size = std::min(label.size(), kLabelBytes);
  const uint64_t version = version_.load(std::memory_order_relaxed);
  version_.store(version + 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  for (size_t at = 0; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, label.data() + at, std::min<size_t>(8, size - at));
    label_[at / 8].store(word, std::memory_order_relaxed);
  }
  kind_and_size_.store(static_cast<uint64_t>(kind) << 32 | size, std::memory_order_relaxed);
  seq_.store(seq, std::memory_order_relaxed);
  // An operation that never said it ended has: only one is noted at a time.
  changes_.store((changes_.load(std::memory_order_relaxed) + 1) | 1, std::memory_order_relaxed);
  version_.store(version + 2, std::memory_order_release);
}

void OperationNote::End() {
  const uint64_t changes = changes_.load(std::memory_order_relaxed);
  if (changes % 2 == 1) changes_.store(changes + 1, std::memory_order_relaxed);
}

OperationNote::Value OperationNote::Read() const {
  while (true) {
    const uint64_t before = version_.load(std::memory_order_acquire);
    Value value;
    value.changes = changes_.load(std::memory_order_relaxed);
    value.seq = seq_.load(std::memory_order_relaxed);
    const uint64_t kind_and_size = kind_and_size_.load(std::memory_order_relaxed);
    char label[kLabelBytes];
    for (size_t at = 0; at < kLabelBytes; at += 8) {
      const uint64_t word = label_[at / 8].load(std::memory_order_relaxed);
      std::memcpy(label + at, &word, sizeof word);
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (before % 2 == 1 || version_.load(std::memory_order_relaxed) != before) {
      std::this_thread::yield();
      continue;
    }
    value.kind = static_cast<OpKind>(kind_and_size >> 32);
    value.label.assign(label, kind_and_size & 0xffffffff);
    return value;
  }
}

// ---- GroupLife

absl::Status GroupLife::status() const {
  return Ended() ? status_ : absl::OkStatus();
}

void GroupLife::AddSleeper(Sleeper* sleeper) {
  MutexLock lock(&mutex_);
  sleepers_.insert(sleeper);
  if (!Ended()) return;
  sleeper->Fence(std::string(status_.message()));
  sleeper->Wake();
}

void GroupLife::RemoveSleeper(Sleeper* sleeper) {
  MutexLock lock(&mutex_);
  sleepers_.erase(sleeper);
}

void GroupLife::WakeSleepers() {
  MutexLock lock(&mutex_);
  for (Sleeper* sleeper : sleepers_) sleeper->Wake();
}

void GroupLife::Finish(const absl::Status& cause) {
  MutexLock lock(&mutex_);
  if (Ended()) return;
  const std::string text(cause.message());
  for (Sleeper* sleeper : sleepers_) sleeper->Fence(text);
  status_ = cause;
  ended_.store(true, std::memory_order_release);
  for (Sleeper* sleeper : sleepers_) sleeper->Wake();
}

void GroupLife::AddCallback(const void* owner, Callback callback) {
  {
    MutexLock lock(&mutex_);
    callbacks_.emplace_back(owner, std::move(callback));
    if (!Ended()) return;
  }
  RunCallbacksSoon();
}

void GroupLife::RemoveCallbacks(const void* owner) {
  std::vector<Callback> removed;  // What they hold goes without the lock.
  MutexLock lock(&mutex_);
  for (auto& [of, callback] : callbacks_) {
    if (of == owner) removed.push_back(std::move(callback));
  }
  std::erase_if(callbacks_, [owner](const auto& entry) { return entry.first == owner; });
  while (running_ == owner && runner_ != std::this_thread::get_id()) callback_done_.Wait(&mutex_);
}

bool GroupLife::InCallbackOf(const void* owner) {
  MutexLock lock(&mutex_);
  return running_ == owner && runner_ == std::this_thread::get_id();
}

void GroupLife::RunCallbacks() {
  MutexLock lock(&mutex_);
  // Whoever runs some runs all.
  while (running_ == nullptr && Ended() && !callbacks_.empty()) {
    auto [owner, callback] = std::move(callbacks_.front());
    callbacks_.pop_front();
    running_ = owner;
    runner_ = std::this_thread::get_id();
    mutex_.Unlock();
    callback(status_);
    callback = nullptr;  // What it holds goes without the lock.
    mutex_.Lock();
    running_ = nullptr;
    callback_done_.NotifyAll();
  }
}

}  // namespace shoal
