// What the ranks of one host tell each other through shared memory. Each rank has one page, which it alone
// writes (but for `sleepers`); a group has one block in the page of each of its members, found by the group's
// key.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/base/mutex.h"

namespace shoal {

constexpr int kGroupsMax = 128;     // Alive at a time, per process.
constexpr int kHostRanksMax = 256;  // In one group.
constexpr int64_t kInlineBytes = 4096;
constexpr size_t kLabelBytes = 40;

// Where peers find the data of an operation.
enum class Where : uint8_t {
  kInline,  // In the block. Peers are told once; nobody waits for them to have read it.
  kDirect,  // In a segment, in place.
  kStaged,  // In the group's staging segment, chunk by chunk.
};

// One rank's side of one operation. Plain data: published by the counter `arrived`.
struct Post {
  uint64_t seq;
  uint32_t signature;
  uint8_t kind;
  Where where;
  uint32_t segment;
  int64_t offset;
  int64_t bytes;
  char label[kLabelBytes];
  int64_t displacements[kHostRanksMax + 1];  // Of an all_to_all: where each rank's part begins, in bytes.
};

struct ControlBlock {
  std::atomic<uint64_t> key;  // 0: never used.
  std::atomic<uint32_t> closed;
  // The number of meeting points that the rank has reached; a futex. Wraps.
  alignas(64) std::atomic<uint32_t> arrived;
  // Peers that sleep on `arrived`.
  alignas(64) std::atomic<uint32_t> sleepers;
  // By parity of the operation: a rank may be one ahead of a peer that still reads.
  alignas(64) Post posts[2];
  alignas(64) std::byte payloads[2][kInlineBytes];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

struct ControlPage {
  ControlBlock blocks[kGroupsMax];
};

// Hands out the blocks of this rank's page. A block is used again only when every peer has closed its own, as
// a peer may still be looking for the group. Thread-safe.
class ControlSlots {
 public:
  explicit ControlSlots(ControlPage* page) : page_(page) {}

  // A clean block, published under `key`. RESOURCE_EXHAUSTED: kGroupsMax groups are alive.
  absl::StatusOr<ControlBlock*> Claim(uint64_t key);
  // `peers`: the same group's blocks of the other members.
  void Retire(ControlBlock* block, std::vector<ControlBlock*> peers);

 private:
  struct Retired {
    ControlBlock* block;
    std::vector<ControlBlock*> peers;
  };

  ControlPage* const page_;
  Mutex mutex_;
  std::vector<Retired> retired_ ABSL_GUARDED_BY(mutex_);
  int used_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace shoal
