// For .cc files only: nlohmann-json with errors as Status. It is the one place that knows of its exceptions.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace shoal {

// INVALID_ARGUMENT names `source`, line and column of a syntax error, or the key that an object has twice, or
// nesting deeper than `depth_max`.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source, int depth_max = 16);

}  // namespace shoal
