// What control links carry (transport/control_link.h).
#pragma once

#include <cstdint>

namespace shoal {

enum class ControlType : uint8_t {
  kHeartbeat = 1,  // What the sender does, for diagnosis.
  kEnd = 2,        // A group is over: its key, the cause.
  kBye = 3,        // The sender is done with the epoch and closes.
  kSegment = 4,    // id, bytes; carries the descriptor of shared memory.
  kFree = 5,       // id: nobody uses that memory any more.
  kDead = 6,       // A rank is dead: its number, the cause.
  kWatch = 7,      // Carries the descriptor of the sender's sign of life (transport/death_watch.h).
};

inline bool CarriesDescriptor(ControlType type) {
  return type == ControlType::kSegment || type == ControlType::kWatch;
}

}  // namespace shoal
