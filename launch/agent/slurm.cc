#include "launch/agent/slurm.h"

#include <cstdint>
#include <cstdio>

#include "absl/strings/numbers.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// More than any machine has: a damaged text must not fill the memory.
constexpr size_t kEntriesMax = 1 << 20;

absl::Status Malformed(std::string_view text, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("\"", AbslSv(text), "\": ", AbslSv(what)));
}

// Cuts at commas outside brackets.
absl::StatusOr<std::vector<std::string_view>> SplitOutsideBrackets(std::string_view text) {
  std::vector<std::string_view> parts;
  size_t begin = 0;
  int depth = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i == text.size() || (text[i] == ',' && depth == 0)) {
      if (i == begin) return Malformed(text, "an empty entry");
      parts.push_back(text.substr(begin, i - begin));
      begin = i + 1;
    } else if (text[i] == '[') {
      if (++depth > 1) return Malformed(text, "'[' inside '['");
    } else if (text[i] == ']') {
      if (--depth < 0) return Malformed(text, "']' without '['");
    }
  }
  if (depth != 0) return Malformed(text, "'[' without ']'");
  return parts;
}

bool ParseDigits(std::string_view text, uint32_t* value) {
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
  }
  return absl::SimpleAtoi(AbslSv(text), value);
}

// "1-3,08" gives {"1", "2", "3", "08"}: numbers keep the width of the range's first word.
absl::StatusOr<std::vector<std::string>> ExpandRanges(std::string_view text) {
  std::vector<std::string> numbers;
  SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string_view> parts, SplitOutsideBrackets(text));
  for (const std::string_view part : parts) {
    const size_t dash = part.find('-');
    const std::string_view first = part.substr(0, dash);
    const std::string_view last = dash == std::string_view::npos ? first : part.substr(dash + 1);
    uint32_t begin = 0;
    uint32_t end = 0;
    if (!ParseDigits(first, &begin) || !ParseDigits(last, &end) || begin > end) {
      return Malformed(part, "not a range of numbers");
    }
    if (end - begin >= kEntriesMax - numbers.size()) return Malformed(part, "too many entries");
    for (uint64_t number = begin; number <= end; ++number) {
      char digits[32];
      std::snprintf(digits, sizeof(digits), "%0*u", static_cast<int>(first.size() < 20 ? first.size() : 20),
                    static_cast<unsigned>(number));
      numbers.push_back(digits);
    }
  }
  return numbers;
}

absl::StatusOr<std::vector<std::string>> ExpandName(std::string_view entry) {
  std::vector<std::string> names = {""};
  while (!entry.empty()) {
    const size_t open = entry.find('[');
    std::vector<std::string> longer;
    std::vector<std::string> numbers = {""};
    const std::string_view literal = entry.substr(0, open);
    entry.remove_prefix(literal.size());
    if (!entry.empty()) {
      const size_t close = entry.find(']');
      SHOAL_ASSIGN_OR_RETURN(numbers, ExpandRanges(entry.substr(1, close - 1)));
      entry.remove_prefix(close + 1);
    }
    if (numbers.size() > kEntriesMax / names.size()) return Malformed(entry, "too many entries");
    for (const std::string& name : names) {
      for (const std::string& number : numbers) {
        longer.push_back(absl::StrCat(name, AbslSv(literal), number));
      }
    }
    names = std::move(longer);
  }
  return names;
}

}  // namespace

absl::StatusOr<std::vector<int>> ExpandTasksPerNode(std::string_view text) {
  std::vector<int> tasks;
  SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string_view> parts, SplitOutsideBrackets(text));
  for (const std::string_view part : parts) {
    const size_t open = part.find("(x");
    uint32_t count = 0;
    uint32_t repeat = 1;
    bool good = ParseDigits(part.substr(0, open), &count);
    if (good && open != std::string_view::npos) {
      good = part.back() == ')' && ParseDigits(part.substr(open + 2, part.size() - open - 3), &repeat);
    }
    if (!good) return Malformed(text, "want for example 2(x3),1");
    if (count > kEntriesMax || repeat > kEntriesMax - tasks.size())
      return Malformed(text, "too many entries");
    tasks.insert(tasks.end(), repeat, static_cast<int>(count));
  }
  return tasks;
}

absl::StatusOr<std::vector<std::string>> ExpandNodeList(std::string_view text) {
  std::vector<std::string> names;
  SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string_view> parts, SplitOutsideBrackets(text));
  for (const std::string_view part : parts) {
    SHOAL_ASSIGN_OR_RETURN(std::vector<std::string> more, ExpandName(part), "\"", AbslSv(text), "\"");
    if (more.size() > kEntriesMax - names.size()) return Malformed(text, "too many entries");
    names.insert(names.end(), more.begin(), more.end());
  }
  return names;
}

}  // namespace shoal
