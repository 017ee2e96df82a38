#include "runtime/config/errors.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace shoal {

std::string KeyPositions::Where(std::string_view key) const {
  const auto found = where_.find(std::string(key));
  return found == where_.end() ? "" : found->second;
}

std::string KeyPositions::Mention(std::string_view key, std::string_view value) const {
  const std::string where = Where(key);
  return absl::StrCat(AbslSv(key), " = ", AbslSv(value), " (", where.empty() ? "default" : where, ")");
}

void ConfigErrors::Add(std::string_view where, std::string_view key, std::string_view text) {
  std::string line(where);
  const bool spelt = absl::StartsWith(AbslSv(where), absl::StrCat("--set ", AbslSv(key), "="));
  if (!line.empty()) line += ": ";
  if (!spelt && !key.empty()) absl::StrAppend(&line, AbslSv(key), ": ");
  lines_.push_back(absl::StrCat(line, AbslSv(text)));
}

absl::Status ConfigErrors::ToStatus() const {
  if (lines_.empty()) return absl::OkStatus();
  constexpr size_t kShownMax = 10;
  std::string message;
  for (size_t i = 0; i < lines_.size() && i < kShownMax; ++i) {
    absl::StrAppend(&message, i == 0 ? "" : "\n", lines_[i]);
  }
  if (lines_.size() > kShownMax) absl::StrAppend(&message, "\n... and ", lines_.size() - kShownMax, " more");
  return absl::InvalidArgumentError(message);
}

}  // namespace shoal
