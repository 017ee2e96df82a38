#include "runtime/config/nearest.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// The parts of `candidate` that `word` lacks when all parts of `word` are among them, otherwise -1.
int MissingParts(const std::string& word, const std::string& candidate) {
  const std::vector<std::string> wanted = absl::StrSplit(word, '_', absl::SkipEmpty());
  std::vector<std::string> present = absl::StrSplit(candidate, '_', absl::SkipEmpty());
  if (wanted.empty()) return -1;
  for (const std::string& part : wanted) {
    const auto found = std::find(present.begin(), present.end(), part);
    if (found == present.end()) return -1;
    present.erase(found);
  }
  return static_cast<int>(present.size());
}

}  // namespace

int EditDistance(std::string_view a, std::string_view b) {
  const size_t width = b.size() + 1;
  std::vector<int> distance((a.size() + 1) * width);
  const auto at = [&](size_t i, size_t j) -> int& { return distance[i * width + j]; };
  for (size_t i = 0; i <= a.size(); ++i) at(i, 0) = static_cast<int>(i);
  for (size_t j = 0; j <= b.size(); ++j) at(0, j) = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = at(i - 1, j - 1) + (a[i - 1] == b[j - 1] ? 0 : 1);
      at(i, j) = std::min({at(i - 1, j) + 1, at(i, j - 1) + 1, substituted});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) at(i, j) = std::min(at(i, j), at(i - 2, j - 2) + 1);
    }
  }
  return at(a.size(), b.size());
}

int Unlikeness(std::string_view word, std::string_view candidate) {
  // A long word is an accident of quoting or a missing line end; comparing it would cost its length squared.
  constexpr size_t kLengthMax = 100;
  if (word.empty() || word.size() > kLengthMax || candidate.size() > kLengthMax) return -1;
  const std::string lower = absl::AsciiStrToLower(AbslSv(word));
  const std::string candidate_lower = absl::AsciiStrToLower(AbslSv(candidate));
  const int edits = EditDistance(lower, candidate_lower);
  if (edits <= std::max<int>(1, static_cast<int>(std::max(word.size(), candidate.size())) / 3)) return edits;
  int missing = MissingParts(lower, candidate_lower);
  if (missing < 0) missing = MissingParts(candidate_lower, lower);
  return missing < 0 ? -1 : missing + 2;
}

std::string Nearest(std::string_view word, const std::vector<std::string>& candidates) {
  int least = -1;
  std::string nearest;
  for (const std::string& candidate : candidates) {
    const int unlikeness = Unlikeness(word, candidate);
    if (unlikeness < 0 || (least >= 0 && unlikeness >= least)) continue;
    least = unlikeness;
    nearest = candidate;
  }
  return nearest;
}

std::string DidYouMean(std::string_view word, const std::vector<std::string>& candidates) {
  const std::string nearest = Nearest(word, candidates);
  return nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?");
}

}  // namespace shoal
