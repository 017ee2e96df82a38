// Whether one group still lives, and why not. Shared by all that work for the group. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace shoal {

class World;

class GroupLife {
 public:
  virtual ~GroupLife() = default;
  // One relaxed-cost load: fit for spinning loops.
  bool Ended() const { return ended_.load(std::memory_order_acquire); }
  // OK, or ABORTED with the cause.
  virtual absl::Status status() const = 0;
  // Ends this group and those split from it, on every member, unless it is over. Returns status(). Never blocks.
  virtual absl::Status End(const std::string& cause) = 0;

  uint64_t key() const { return key_; }                    // Names the group on the wire.
  const std::vector<int>& ranks() const { return ranks_; }  // Of the world, by index in the group.
  int index() const { return index_; }

 protected:
  GroupLife(uint64_t key, std::vector<int> ranks, int index) : key_(key), ranks_(std::move(ranks)), index_(index) {}
  std::atomic<bool> ended_{false};

 private:
  const uint64_t key_;
  const std::vector<int> ranks_;
  const int index_;
};

}  // namespace shoal
