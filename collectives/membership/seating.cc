#include "collectives/membership/seating.h"

#include <algorithm>
#include <cstdint>

#include "runtime/base/status.h"

namespace shoal {
namespace {

// Drops members of `list` that are in conflict with each other, worst first, later ones first among equals.
void DropWorst(const Conflicts& conflicts, std::vector<MemberInfo>* list, std::vector<Dropped>* dropped) {
  while (true) {
    std::map<uint64_t, int> degree;
    for (const MemberInfo& member : *list) degree[member.id] = 0;
    for (const auto& [pair, cause] : conflicts) {
      if (!degree.contains(pair.first) || !degree.contains(pair.second)) continue;
      ++degree[pair.first];
      ++degree[pair.second];
    }
    const auto worst = std::max_element(
        list->rbegin(), list->rend(),
        [&](const MemberInfo& a, const MemberInfo& b) { return degree[a.id] < degree[b.id]; });
    if (worst == list->rend() || degree[worst->id] == 0) return;
    for (const MemberInfo& other : *list) {
      const auto conflict = conflicts.find(PairOf(worst->id, other.id));
      if (other.id == worst->id || conflict == conflicts.end()) continue;
      dropped->push_back(
          {worst->id, absl::StrCat("it and ", other.Name(), " do not reach each other: ", conflict->second)});
      break;
    }
    list->erase(std::next(worst).base());
  }
}

void DropUnfit(const Conflicts& conflicts, std::vector<MemberInfo>* list, std::vector<Dropped>* dropped) {
  std::erase_if(*list, [&](const MemberInfo& member) {
    const auto conflict = conflicts.find(PairOf(member.id, member.id));
    if (conflict == conflicts.end()) return false;
    dropped->push_back({member.id, conflict->second});
    return true;
  });
}

}  // namespace

std::vector<Dropped> DropConflicting(const Conflicts& conflicts, std::vector<MemberInfo>* survivors,
                                     std::vector<MemberInfo>* newcomers) {
  std::vector<Dropped> dropped;
  if (conflicts.empty()) return dropped;
  DropUnfit(conflicts, survivors, &dropped);
  DropUnfit(conflicts, newcomers, &dropped);
  DropWorst(conflicts, survivors, &dropped);
  std::erase_if(*newcomers, [&](const MemberInfo& newcomer) {
    for (const MemberInfo& survivor : *survivors) {
      const auto conflict = conflicts.find(PairOf(newcomer.id, survivor.id));
      if (conflict == conflicts.end()) continue;
      dropped.push_back({newcomer.id, absl::StrCat("it and ", survivor.Name(),
                                                   " do not reach each other: ", conflict->second)});
      return true;
    }
    return false;
  });
  DropWorst(conflicts, newcomers, &dropped);
  return dropped;
}

std::vector<MemberInfo> Seat(const std::vector<MemberInfo>& survivors,
                             const std::vector<MemberInfo>& newcomers) {
  const int size = static_cast<int>(survivors.size() + newcomers.size());
  std::vector<const MemberInfo*> seats(size, nullptr);
  std::vector<const MemberInfo*> queue;
  for (const MemberInfo& survivor : survivors) queue.push_back(&survivor);
  for (const MemberInfo& newcomer : newcomers) {
    const int wanted = newcomer.wanted_rank;
    if (wanted >= 0 && wanted < size && seats[wanted] == nullptr) {
      seats[wanted] = &newcomer;
    } else {
      queue.push_back(&newcomer);
    }
  }
  const auto any = [](int rank) { return rank < 0 ? INT32_MAX : rank; };
  std::stable_sort(
      queue.begin() + survivors.size(), queue.end(),
      [&](const MemberInfo* a, const MemberInfo* b) { return any(a->wanted_rank) < any(b->wanted_rank); });
  std::vector<MemberInfo> seated;
  auto next = queue.begin();
  for (const MemberInfo* seat : seats) seated.push_back(seat != nullptr ? *seat : **next++);
  return seated;
}

}  // namespace shoal
