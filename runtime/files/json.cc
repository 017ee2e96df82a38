#include "runtime/files/json.h"

#include <functional>
#include <set>
#include <vector>

#include "runtime/base/status.h"

namespace shoal {
namespace {

// Whether brackets outside of strings nest at most `depth_max` deep. Looked at before parsing: the parser's
// memory grows with the depth.
bool NestsAtMost(std::string_view text, int depth_max) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > depth_max) return false;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return true;
}

// nlohmann-json silently keeps the last of equal keys; this callback finds the first that stands twice.
class DuplicateKeys {
 public:
  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    const size_t level = static_cast<size_t>(depth);  // Containers around the object, or around its key.
    if (event == Event::object_start) {
      if (keys_.size() <= level) keys_.resize(level + 1);
      keys_[level].clear();
    }
    if (event == Event::key) {
      std::string key = parsed.get<std::string>();
      if (!keys_[level - 1].insert(key).second && first_.empty()) first_ = absl::StrCat("\"", key, "\"");
    }
    return true;
  }

  const std::string& first() const { return first_; }  // Quoted; empty: there is none.

 private:
  std::vector<std::set<std::string>> keys_;  // Per level, of the object that is open there.
  std::string first_;
};

// "parse error at line 1, column 7: ..." without the library's own number, and not longer than a terminal can
// bear.
std::string Readable(const nlohmann::json::exception& error) {
  std::string text = error.what();
  if (const size_t end = text.find("] "); text.front() == '[' && end != std::string::npos)
    text.erase(0, end + 2);
  if (text.size() > 300) text = text.substr(0, 300) + "...";
  return text;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source, int depth_max) {
  if (!NestsAtMost(text, depth_max)) {
    return absl::InvalidArgumentError(
        absl::StrCat(AbslSv(source), ": JSON nested deeper than ", depth_max, " levels"));
  }
  DuplicateKeys duplicates;
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text, std::ref(duplicates));
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(AbslSv(source), ": not valid JSON: ", Readable(error)));
  }
  if (!duplicates.first().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(AbslSv(source), ": key ", duplicates.first(), " stands twice in one object"));
  }
  return value;
}

}  // namespace shoal
