// What travels on data connections: the 64 bytes of DataHeader, then `bytes` of payload. Little-endian, as
// every machine that Shoal runs on. docs/wire.md says who sends what when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"

namespace shoal {

constexpr int64_t kEagerBytesMax = 32 << 10;  // Messages up to here are sent unasked.
constexpr int64_t kSliceBytesMax = 1 << 20;   // Of a larger one per frame.

enum class DataType : uint8_t {
  kEager = 1,     // A whole small message.
  kReady = 2,     // To the sender of a message: send it.
  kSlice = 3,     // Part of a message that was asked for.
  kAnnounce = 4,  // A small message beyond the window: waits for kReady.
  kCredit = 5,    // To the sender of small messages: `total` bytes of the group's window are free again.
  kProbe = 6,     // Tells in which operation the sender is.
};

struct DataHeader {
  uint32_t magic;
  DataType type;
  uint8_t zero[3];
  uint32_t signature;  // Of the message, as the next four.
  uint32_t tag;
  uint64_t epoch, group, op;
  uint64_t bytes;   // Payload of this frame.
  uint64_t offset;  // Of the payload in the message.
  uint64_t total;   // Bytes of the message.
};
static_assert(sizeof(DataHeader) == 64);

constexpr uint32_t kDataMagic = 0x4d4f4853;  // "SHOM"

// `bytes`: sizeof(DataHeader) of them, from anybody. DATA_LOSS: no header of this epoch, or one that
// contradicts itself.
absl::Status ParseDataHeader(const std::byte* bytes, uint64_t epoch, DataHeader* header);

}  // namespace shoal
