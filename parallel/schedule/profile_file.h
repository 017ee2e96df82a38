// A profile as a file and as a table for people. Hides the JSON.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "parallel/schedule/profiler.h"

namespace shoal {

// {"version": 1, "about": ..., "interference": ..., "costs": [{"op": ..., "phase": ..., "lane": ..., "fixed_ns": ...}]}.
// `about` says what was measured (model, layout, machine): what another `about` has learnt is of no use.
struct ProfileFile {
  std::string about;
  Profile profile;
};
std::string ToJson(const ProfileFile& file);
// INVALID_ARGUMENT names the field that is missing or wrong.
absl::StatusOr<ProfileFile> ProfileFromJson(std::string_view json);

// A line per cost key, the costliest of the last step first.
std::string ProfileText(const ProfileFile& file);

}  // namespace shoal
