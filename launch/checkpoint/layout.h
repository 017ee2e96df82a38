// The names of a run's checkpoint folders, and what to do with those that a process left behind. Internal to
// this folder.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "runtime/files/file.h"

namespace shoal::checkpoint {

// <run_dir>/checkpoints
std::string CheckpointsFolder(const std::string& run_dir);
// <run_dir>/checkpoints/step-00001200
std::string StepFolder(const std::string& run_dir, int64_t step);
// rank-00000-of-00002.safetensors
std::string RankFile(int rank, int size);

// Ends of the names of folders that are no committed checkpoints.
inline constexpr std::string_view kPartial = ".partial";    // Being written.
inline constexpr std::string_view kRemoving = ".removing";  // Being removed.
// A committed checkpoint whose step is committed anew: it counts for as long as there is no folder without
// the suffix.
inline constexpr std::string_view kReplaced = ".replaced";

struct FolderName {
  int64_t step;
  std::string_view suffix;  // One of the above, or empty: committed.
};
// False: not one of our folders; hands off.
bool ParseFolderName(std::string_view name, FolderName& parsed);

// Finishes what ended half-way: removes partial and removing folders and those replaced, and gives a replaced
// one its name back if its successor was never committed. Nobody may be writing meanwhile.
absl::Status TidyUp(const std::string& run_dir, DiskFaults* faults);

// Under another name first, so that a half-removed folder never passes for a checkpoint.
absl::Status RemoveCheckpoint(const std::string& run_dir, int64_t step, DiskFaults* faults);

}  // namespace shoal::checkpoint
