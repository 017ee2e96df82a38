// Brings tensors that every member should hold alike to the same bits: after an epoch with newcomers, after a failure in the
// middle of an update, or as an audit. By agreement on hashes (XXH3, 128 bits, per block of a tensor); only blocks that
// differ travel, each from one of the members that have it, all sources at the same time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"

namespace shoal {

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

enum class SyncRole : uint8_t {
  kEither,       // May win, may be overwritten.
  kReceiveOnly,  // A newcomer: its content never wins.
  kSendOnly,     // Its content must win: never overwritten.
};

struct SyncOptions {
  SyncRole role = SyncRole::kEither;
  absl::Time deadline = absl::InfiniteFuture();  // Infinite: the group's own timeout, per operation.
};

struct SyncReport {
  uint64_t revision = 0;  // Of the content that all have now.
  int64_t bytes_received = 0;
  int64_t bytes_sent = 0;  // Copies for several receivers count once: a tree may pass them on.
  std::vector<std::string> changed;  // Names of the tensors that were written here.
};

// Collective over the group; all ranks give the same names, shapes and types in the same order. The content with the
// highest revision wins; of several with that revision, the one that most ranks hold, then the one of the lowest rank; a
// send-only rank's before all others. Blocks until all have it and every rank has checked what it received.
// FAILED_PRECONDITION, on all ranks alike and with nothing changed: all are receive-only, or send-only ranks differ.
// INVALID_ARGUMENT likewise: names, shapes or types differ (the message says on which ranks). DATA_LOSS: what a rank received
// does not have the hash that was agreed on. ABORTED: the group is over; tensors that were being received are undefined,
// and a repetition in the next epoch mends them.
absl::StatusOr<SyncReport> SyncState(Communicator& group, absl::Span<const NamedTensor> tensors, uint64_t revision,
                                     const SyncOptions& options);

}  // namespace shoal
