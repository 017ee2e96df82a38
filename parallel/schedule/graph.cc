#include "parallel/schedule/graph.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr std::array<std::string_view, kLanes> kLaneNames = {"compute", "copy", "intra", "inter", "control"};
constexpr std::array<std::string_view, kOps> kOpNames = {
    "gather",  "release",        "materialise", "calibrate", "embed",  "attention", "dense", "route",  "exchange", "arrange",
    "pack",    "stay",           "dispatch",    "experts", "experts weight", "return", "shared", "combine", "head",
    "totals",  "balance",        "reduce",      "reduce experts", "norm", "norm sum", "update"};
constexpr std::array<std::string_view, 4> kPhaseNames = {"forward", "recompute", "backward", "update"};

void Mix(uint64_t* hash, int64_t value) { *hash = (*hash ^ static_cast<uint64_t>(value + 1)) * 0x100000001b3ULL; }

absl::string_view Text(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace

CostKey KeyOf(const Task& task) {
  return {task.op, task.phase == Phase::kRecompute ? Phase::kForward : task.phase, task.lane};
}

std::string_view Name(Lane lane) { return kLaneNames[static_cast<size_t>(lane)]; }
std::string_view Name(Op op) { return kOpNames[static_cast<size_t>(op)]; }
std::string_view Name(Phase phase) { return kPhaseNames[static_cast<size_t>(phase)]; }

std::string Name(const CostKey& key) {
  return absl::StrCat(Text(Name(key.op)), " ", Text(Name(key.phase)), " ", Text(Name(key.lane)));
}

std::string Name(const Task& task) {
  std::string name;
  if (task.layer >= 0) absl::StrAppend(&name, "layer ", task.layer, " ");
  absl::StrAppend(&name, Text(Name(task.op)));
  if (task.phase != Phase::kUpdate) absl::StrAppend(&name, " ", Text(Name(task.phase)));
  if (task.back) absl::StrAppend(&name, " back");
  if (task.chunk >= 0) absl::StrAppend(&name, " ", task.chunk);
  if (task.wave > 0) absl::StrAppend(&name, " (wave ", task.wave, ")");
  if (task.part > 0) absl::StrAppend(&name, " (part ", task.part, ")");
  return name;
}

uint64_t Fingerprint(const Graph& graph) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const Task& task : graph.tasks) {
    for (int64_t value : {static_cast<int64_t>(task.op), static_cast<int64_t>(task.phase), static_cast<int64_t>(task.lane),
                          static_cast<int64_t>(task.back), static_cast<int64_t>(task.part), static_cast<int64_t>(task.wave), static_cast<int64_t>(task.layer),
                          static_cast<int64_t>(task.chunk), static_cast<int64_t>(task.slice),
                          static_cast<int64_t>(task.after.size())}) {
      Mix(&hash, value);
    }
    for (int before : task.after) Mix(&hash, before);
  }
  return hash;
}

}  // namespace shoal
