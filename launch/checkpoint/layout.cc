#include "launch/checkpoint/layout.h"

#include <algorithm>
#include <map>
#include <vector>

#include "absl/strings/str_format.h"
#include "launch/checkpoint/checkpoint.h"
#include "runtime/base/status.h"

namespace shoal {
namespace checkpoint {
namespace {

constexpr std::string_view kPrefix = "step-";
constexpr size_t kDigitsMin = 8;
constexpr size_t kDigitsMax = 18;  // Fits an int64_t.

}  // namespace

std::string CheckpointsFolder(const std::string& run_dir) { return JoinPath(run_dir, "checkpoints"); }

std::string StepFolder(const std::string& run_dir, int64_t step) {
  return JoinPath(CheckpointsFolder(run_dir), absl::StrFormat("step-%08d", step));
}

std::string RankFile(int rank, int size) {
  return absl::StrFormat("rank-%05d-of-%05d.safetensors", rank, size);
}

bool ParseFolderName(std::string_view name, FolderName& parsed) {
  if (name.substr(0, kPrefix.size()) != kPrefix) return false;
  name.remove_prefix(kPrefix.size());
  const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
  if (digits < kDigitsMin || digits > kDigitsMax) return false;
  parsed.step = 0;
  for (const char digit : name.substr(0, digits)) parsed.step = parsed.step * 10 + (digit - '0');
  parsed.suffix = name.substr(digits);
  return parsed.suffix.empty() || parsed.suffix == kPartial || parsed.suffix == kRemoving ||
         parsed.suffix == kReplaced;
}

absl::Status TidyUp(const std::string& run_dir, DiskFaults* faults) {
  const std::string parent = CheckpointsFolder(run_dir);
  SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(parent));
  for (const std::string& name : names) {
    FolderName folder;
    if (!ParseFolderName(name, folder) || folder.suffix.empty()) continue;
    const std::string path = JoinPath(parent, name);
    const std::string committed = StepFolder(run_dir, folder.step);
    if (folder.suffix == kReplaced && !IsFolder(committed)) {
      SHOAL_RETURN_IF_ERROR(RenameDurably(path, committed, faults));
    } else {
      SHOAL_RETURN_IF_ERROR(RemoveTree(path, faults));
    }
  }
  return absl::OkStatus();
}

absl::Status RemoveCheckpoint(const std::string& run_dir, int64_t step, DiskFaults* faults) {
  const std::string path = StepFolder(run_dir, step);
  const std::string removing = absl::StrCat(path, AbslSv(kRemoving));
  SHOAL_RETURN_IF_ERROR(RemoveTree(removing, faults));
  SHOAL_RETURN_IF_ERROR(RenameDurably(path, removing, faults));
  return RemoveTree(removing, faults);
}

}  // namespace checkpoint

absl::StatusOr<std::vector<CheckpointFolder>> ListCheckpoints(const std::string& run_dir) {
  const std::string parent = checkpoint::CheckpointsFolder(run_dir);
  absl::StatusOr<std::vector<std::string>> names = ListFolder(parent);
  if (absl::IsNotFound(names.status())) return std::vector<CheckpointFolder>();
  SHOAL_RETURN_IF_ERROR(names.status());
  std::map<int64_t, std::string> found;
  for (const std::string& name : *names) {
    checkpoint::FolderName folder;
    if (!checkpoint::ParseFolderName(name, folder)) continue;
    // A replaced one sorts after its successor's name and yields to it.
    if (folder.suffix.empty() || folder.suffix == checkpoint::kReplaced) {
      found.try_emplace(folder.step, JoinPath(parent, name));
    }
  }
  std::vector<CheckpointFolder> checkpoints;
  for (auto& [step, path] : found) checkpoints.push_back({step, std::move(path)});
  return checkpoints;
}

absl::StatusOr<std::optional<std::string>> NewestCheckpoint(const std::string& run_dir) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<CheckpointFolder> checkpoints, ListCheckpoints(run_dir));
  if (checkpoints.empty()) return std::optional<std::string>();
  return std::optional<std::string>(checkpoints.back().path);
}

}  // namespace shoal
