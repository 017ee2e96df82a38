// Errors about configuration keys, collected so that a user sees all of them at once, and where each key was
// set.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace shoal {

// Where keys were set, by key path ("model.head_dim"): "configs/a.yaml:12:5" or "--set model.head_dim=64".
class KeyPositions {
 public:
  void Set(std::string_view key, std::string_view where) { where_[std::string(key)] = std::string(where); }
  // Empty: not set, the default holds.
  std::string Where(std::string_view key) const;
  // "model.head_dim = 64 (configs/a.yaml:12:5)", to name another key of a combination.
  std::string Mention(std::string_view key, std::string_view value) const;

 private:
  std::map<std::string, std::string> where_;
};

class ConfigErrors {
 public:
  // The line "where: key: text". `where` may be empty: "key: text". A key that `where` already spells ("--set
  // key=value") is not repeated.
  void Add(std::string_view where, std::string_view key, std::string_view text);
  bool empty() const { return lines_.empty(); }
  // OK when nothing was added, otherwise INVALID_ARGUMENT with the first ten errors, one a line.
  absl::Status ToStatus() const;

 private:
  std::vector<std::string> lines_;
};

}  // namespace shoal
