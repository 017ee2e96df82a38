// A ring of 64-byte units between one writing and one reading process. A record is a descriptor, followed by
// its inline payload in further units when that does not fit into it. The descriptor's stamp, written last,
// publishes the record. Every unit begins with a stamp, so that what an earlier lap left there is never taken
// for a new record.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "collectives/engine/shm/group_page.h"

namespace shoal {

enum class RecordKind : uint8_t {
  kInline,  // The message itself.
  kDirect,  // Where it lies in the sender's memory. Answered: taken.
  kOffer,   // The sender asks before it stages the message's fragments. Answered: go, when it is wanted.
  kStaged,  // The next fragment of a message, in the sender's staging memory. Answered: taken.
};

struct Record {
  static constexpr uint8_t kEager = 1;  // Of kStaged: the message is one fragment that came unasked.
  static constexpr uint8_t kLent = 2;   // The receiver may write to it and gives it back.
  static constexpr int64_t kInlineMax = 512;
  static constexpr int64_t kShortMax = 28;                       // Payloads that fit into the descriptor.
  static constexpr int64_t kUnitMax = kLine - sizeof(uint32_t);  // Payload in a unit of its own.

  uint32_t stamp;  // Atomic in the ring. The unit's position + 1, modulo 2^32.
  RecordKind kind;
  uint8_t flags;
  uint16_t payload_bytes;  // Of kInline.
  uint64_t op;
  uint32_t tag;
  uint32_t signature;
  int64_t bytes;     // Of the whole message.
  uint32_t request;  // The sender's number for it.
  union {
    struct {
      uint32_t segment_low, segment_high;
      uint32_t offset_low, offset_high;
    } place;
    std::byte payload[kShortMax];
  };

  void SetPlace(uint64_t segment, int64_t offset) {
    place = {static_cast<uint32_t>(segment), static_cast<uint32_t>(segment >> 32),
             static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
  }
  uint64_t segment() const { return place.segment_low | static_cast<uint64_t>(place.segment_high) << 32; }
  int64_t offset() const {
    return static_cast<int64_t>(place.offset_low | static_cast<uint64_t>(place.offset_high) << 32);
  }

  static uint32_t Units(int64_t payload_bytes) {
    return payload_bytes <= kShortMax ? 1
                                      : 1 + static_cast<uint32_t>((payload_bytes + kUnitMax - 1) / kUnitMax);
  }
};
static_assert(sizeof(Record) == kLine && alignof(Record) == 8);

class RingWriter {
 public:
  RingWriter(std::byte* units, int64_t count, const std::atomic<uint32_t>* consumed)
      : units_(units), mask_(static_cast<uint32_t>(count - 1)), consumed_(consumed) {}

  // Room for a record with so much payload. Looks at the reader's counter only when it must.
  bool Fits(int64_t payload_bytes) {
    const uint32_t wanted = Record::Units(payload_bytes);
    if (written_ + wanted - seen_ <= mask_ + 1) return true;
    seen_ = consumed_->load(std::memory_order_acquire);
    return written_ + wanted - seen_ <= mask_ + 1;
  }

  // `record`: all but stamp and payload. There must be room.
  void Write(const Record& record, const std::byte* payload, int64_t payload_bytes) {
    Record& slot = *reinterpret_cast<Record*>(At(written_));
    slot.kind = record.kind;
    slot.flags = record.flags;
    slot.payload_bytes = static_cast<uint16_t>(payload_bytes);
    slot.op = record.op;
    slot.tag = record.tag;
    slot.signature = record.signature;
    slot.bytes = record.bytes;
    slot.request = record.request;
    if (payload_bytes == 0) {
      slot.place = record.place;
    } else if (payload_bytes <= Record::kShortMax) {
      std::memcpy(slot.payload, payload, payload_bytes);
    } else {
      uint32_t unit = written_ + 1;
      for (int64_t done = 0; done < payload_bytes; done += Record::kUnitMax, ++unit) {
        const uint32_t stamp = unit + 1;
        std::memcpy(At(unit), &stamp, sizeof stamp);
        std::memcpy(At(unit) + sizeof stamp, payload + done,
                    std::min(Record::kUnitMax, payload_bytes - done));
      }
    }
    const uint32_t stamp = written_ + 1;
    written_ += Record::Units(payload_bytes);
    std::atomic_ref<uint32_t>(slot.stamp).store(stamp, std::memory_order_release);
  }

 private:
  std::byte* At(uint32_t unit) const { return units_ + static_cast<int64_t>(unit & mask_) * kLine; }

  std::byte* const units_;
  const uint32_t mask_;
  const std::atomic<uint32_t>* const consumed_;
  uint32_t written_ = 0;
  uint32_t seen_ = 0;
};

class RingReader {
 public:
  RingReader(const std::byte* units, int64_t count, std::atomic<uint32_t>* consumed)
      : units_(units), mask_(static_cast<uint32_t>(count - 1)), consumed_(consumed) {}

  // The next record, or null. Stays until Pop.
  const Record* Front() const {
    auto* record = reinterpret_cast<Record*>(const_cast<std::byte*>(At(read_)));  // For atomic_ref alone.
    const std::atomic_ref<uint32_t> stamp(record->stamp);
    return stamp.load(std::memory_order_acquire) == read_ + 1 ? record : nullptr;
  }
  // Of the front record, whose size the peer wrote: at most kInlineMax bytes are copied.
  int64_t PayloadBytes() const {
    return std::min<int64_t>(reinterpret_cast<const Record*>(At(read_))->payload_bytes, Record::kInlineMax);
  }
  void CopyPayload(std::byte* into) const {
    const int64_t bytes = PayloadBytes();
    if (bytes <= Record::kShortMax) {
      std::memcpy(into, reinterpret_cast<const Record*>(At(read_))->payload, bytes);
      return;
    }
    uint32_t unit = read_ + 1;
    for (int64_t done = 0; done < bytes; done += Record::kUnitMax, ++unit) {
      std::memcpy(into + done, At(unit) + sizeof(uint32_t), std::min(Record::kUnitMax, bytes - done));
    }
  }
  // True: the writer has been told of new room, for which it may sleep: enough for the largest record, as always when
  // nothing is left to read.
  bool Pop() {
    read_ += Record::Units(PayloadBytes());
    // Rarely: the writer's core has to fetch the line.
    if (read_ - told_ <= mask_ / 4) return false;
    told_ = read_;
    consumed_->store(read_, std::memory_order_release);
    return true;
  }

 private:
  const std::byte* At(uint32_t unit) const { return units_ + static_cast<int64_t>(unit & mask_) * kLine; }

  const std::byte* const units_;
  const uint32_t mask_;
  std::atomic<uint32_t>* const consumed_;
  uint32_t read_ = 0;
  uint32_t told_ = 0;
};

}  // namespace shoal
