// Whether the arguments of an operation are right, as far as one rank can know.
#pragma once

#include "absl/status/status.h"
#include "collectives/engine/op.h"

namespace shoal {

// INVALID_ARGUMENT says what is wrong. `index`: this rank, in a group of `size`.
absl::Status CheckArguments(const Operation& op, int index, int size);

// Whether the result of a valid operation overwrites its input (see Communicator).
bool IsInPlace(const Operation& op, int index);

}  // namespace shoal
