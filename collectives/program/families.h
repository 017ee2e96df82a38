// The algorithms by family, one file each.
#pragma once

#include "collectives/program/algorithms.h"

namespace shoal {

absl::Span<const Algorithm> DirectAlgorithms();

}  // namespace shoal
