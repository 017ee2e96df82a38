// What must never happen. Sees all processes of a simulated job at once.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "collectives/membership/view.h"

namespace shoal::sim {

class Referee {
 public:
  // A coordinator or a member holds `view` as an epoch. `member`: its id, 0 for coordinators.
  void OnView(const View& view, uint64_t member);
  // A member has completed an all_reduce of the epoch.
  void OnSum(const View& view, uint64_t member, uint64_t op, const std::vector<float>& result,
             const std::vector<float>& expected);
  void Fail(std::string violation);

  bool ok() const { return violations_.empty(); }
  const std::vector<std::string>& violations() const { return violations_; }
  int64_t views() const { return static_cast<int64_t>(views_.size()); }
  int64_t sums() const { return sums_; }

 private:
  using Key = std::pair<uint64_t, uint64_t>;  // Lineage, epoch.
  static std::string Name(const View& view);

  std::map<Key, std::string> views_;
  std::map<uint64_t, Key> newest_;  // By member.
  std::map<std::pair<Key, uint64_t>, std::vector<float>> results_;
  int64_t sums_ = 0;
  std::vector<std::string> violations_;
};

}  // namespace shoal::sim
