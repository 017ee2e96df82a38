// What members and the coordinator tell each other. Their bytes: messages.cc (fuzzed).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/membership/view.h"

namespace shoal {

struct Accusation {
  uint64_t id = 0;    // Of the accused: of the accuser itself when it can connect with nobody (kFailed).
  std::string cause;  // What the accuser saw: connection closed, silent for 1 s, missing in all_reduce "x" #17.
  bool died = false;  // The kernel of the accuser's host says that the process is dead: a fact, not an opinion.
};

// Member to coordinator.
struct MemberMessage {
  enum Type : uint8_t {
    kHello = 1,      // First on every connection: info; `committed` (empty lineage: a newcomer); promised = the highest proposed epoch.
    kHeartbeat = 2,  // Every heartbeat interval.
    kReady = 3,      // Wants the epoch after `epoch` (0: joins). With whom it accuses.
    kConnected = 4,  // Connected with everybody of the proposal `epoch`.
    kFailed = 5,     // Could not: `accusations`.
    kLeave = 6,      // Goes politely.
  };
  Type type = kHeartbeat;
  MemberInfo info;           // kHello.
  View committed;            // kHello.
  Epoch promised{0};         // kHello.
  Epoch epoch{0};            // kReady, kConnected, kFailed.
  std::vector<Accusation> accusations;  // kReady, kFailed.
};

// Coordinator to member.
struct CoordinatorMessage {
  enum Type : uint8_t {
    kHeartbeat = 1,
    kPropose = 2,   // `view`: connect with everybody in it.
    kCommit = 3,    // `view.epoch`: everybody is connected; it is the epoch now.
    kExcluded = 4,  // This member is no longer one, for `cause`: it may join again under a new id.
    kRefused = 5,   // It cannot join, ever: `cause`.
    kWaiting = 6,   // For diagnosis: `cause` says whom the coordinator waits for.
    kJoiners = 7,   // So many processes wait to be admitted.
  };
  Type type = kHeartbeat;
  View view;
  std::string cause;
  uint64_t joiners = 0;
};

std::string Encode(const MemberMessage& message);
std::string Encode(const CoordinatorMessage& message);
// DATA_LOSS: bytes that are no message.
absl::StatusOr<MemberMessage> DecodeMemberMessage(std::string_view bytes);
absl::StatusOr<CoordinatorMessage> DecodeCoordinatorMessage(std::string_view bytes);

}  // namespace shoal
