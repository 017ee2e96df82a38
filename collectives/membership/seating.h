// Who of those that are there can be in one epoch, and in which order. Pure functions of the coordinator's.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "collectives/membership/view.h"

namespace shoal {

using Pair = std::pair<uint64_t, uint64_t>;
inline Pair PairOf(uint64_t a, uint64_t b) { return a < b ? Pair(a, b) : Pair(b, a); }

// Pairs that cannot work together, with the cause. A process in conflict with itself can work with nobody now.
using Conflicts = std::map<Pair, std::string>;

struct Dropped {
  uint64_t id = 0;
  std::string cause;
};

// Removes from both lists until no two that are left are in conflict, and returns whom: those in conflict with
// themselves; then, of survivors, the one with most conflicts first, then the later one of the list. Newcomers give way
// to survivors.
std::vector<Dropped> DropConflicting(const Conflicts& conflicts, std::vector<MemberInfo>* survivors,
                                     std::vector<MemberInfo>* newcomers);

// By rank: newcomers where they want to be if there is such a rank, survivors in their order on the other
// ranks, then the newcomers that are left: those with a wanted rank by it, then the others as they came.
// Wanted ranks are distinct.
std::vector<MemberInfo> Seat(const std::vector<MemberInfo>& survivors,
                             const std::vector<MemberInfo>& newcomers);

}  // namespace shoal
