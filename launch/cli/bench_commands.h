// The commands of `shoal bench`.
#pragma once

#include <string>

#include "absl/types/span.h"

namespace shoal {

int RunBenchCollectives(absl::Span<const std::string> args);

}  // namespace shoal
