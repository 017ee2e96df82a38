// The layout of a member's segment of a group: a header, then for each seat a counter of what was read from
// it and a ring of messages to it, then the slots of tiny operations.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace shoal {

constexpr int64_t kLine = 64;

struct alignas(kLine) GroupPage {
  // Constant once `ready` is 1.
  std::atomic<uint32_t> ready;
  uint32_t seats;
  uint32_t registered;  // The owner obeys membarrier(2).
  cpu_set_t cores;      // Where the owner may run.
  // The owner has found everybody: from now on nobody looks for the group.
  alignas(kLine) std::atomic<uint32_t> attached;
  std::atomic<uint32_t> ended;   // `cause` is final.
  std::atomic<uint32_t> asleep;  // The owner's threads that sleep on the doorbell, or are about to.
  std::atomic<int32_t> core;     // Where the owner last waited for others, + 1. 0: nowhere yet.
  alignas(kLine) std::atomic<uint32_t> doorbell;  // A futex. Peers write it too.
  // 1: the owner writes to memory that it has borrowed from others (HostGroup::BeginWrite), in each view to these bytes.
  alignas(kLine) std::atomic<uint32_t> writing;
  std::atomic<int64_t> write_begin, write_bytes;
  alignas(kLine) char cause[512];
};
static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);

// How many units of a ring its reader has read, modulo 2^32.
struct alignas(kLine) Consumed {
  std::atomic<uint32_t> units;
};

// What the owner tells the seat that sent it messages: each time it says yes to one of the seat's requests,
// its bit is inverted. A request has one question open at a time.
constexpr int kRequestsMax = 4096;
struct alignas(kLine) Answers {
  struct Word {
    std::atomic<uint64_t> taken;  // The bytes have been read.
    std::atomic<uint64_t> go;     // The message is wanted.
  } words[kRequestsMax / 64];
};

// A tiny operation's contribution. The stamp, written last, is the operation's number among the tiny ones,
// modulo 2^32.
constexpr int kTinySlots = 8;
constexpr int64_t kTinyPayloadMax = 4096;
constexpr int64_t kTinyFirstLineBytes = 40;
struct alignas(kLine) TinySlot {
  std::atomic<uint32_t> stamp;
  uint32_t signature;
  uint64_t seq;
  uint32_t bytes;
  uint32_t spare;
  std::byte first[kTinyFirstLineBytes];  // Payloads that fit here are here, others below.
  alignas(kLine) std::byte payload[kTinyPayloadMax];
};
static_assert(offsetof(TinySlot, payload) == kLine);

class GroupLayout {
 public:
  explicit GroupLayout(int seats) : seats_(seats) {}

  // A power of two. Large groups have small rings: they exist for every ordered pair.
  int64_t ring_units() const { return seats_ <= 4 ? 512 : seats_ <= 32 ? 256 : 64; }
  int64_t bytes() const { return TinyBegin() + kTinySlots * static_cast<int64_t>(sizeof(TinySlot)); }

  Consumed* consumed(GroupPage* page, int from) const { return At<Consumed>(page, ConsumedBegin()) + from; }
  Answers* answers(GroupPage* page, int to) const { return At<Answers>(page, AnswersBegin()) + to; }
  std::byte* ring(GroupPage* page, int to) const {
    return At<std::byte>(page, RingsBegin() + to * ring_units() * kLine);
  }
  TinySlot* tiny(GroupPage* page) const { return At<TinySlot>(page, TinyBegin()); }

 private:
  template <class T>
  static T* At(GroupPage* page, int64_t offset) {
    return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(page) + offset);
  }
  int64_t ConsumedBegin() const { return sizeof(GroupPage); }
  int64_t AnswersBegin() const { return ConsumedBegin() + seats_ * static_cast<int64_t>(sizeof(Consumed)); }
  int64_t RingsBegin() const { return AnswersBegin() + seats_ * static_cast<int64_t>(sizeof(Answers)); }
  int64_t TinyBegin() const { return RingsBegin() + seats_ * ring_units() * kLine; }

  int seats_;
};

}  // namespace shoal
