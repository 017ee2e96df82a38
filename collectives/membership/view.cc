#include "collectives/membership/view.h"

#include "runtime/base/status.h"

namespace shoal {

std::string MemberInfo::Name() const { return absl::StrCat("pid ", pid, ", host ", host_name); }

int View::RankOf(uint64_t id) const {
  for (size_t rank = 0; rank < members.size(); ++rank) {
    if (members[rank].id == id) return static_cast<int>(rank);
  }
  return -1;
}

}  // namespace shoal
