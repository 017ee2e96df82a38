// Who is in an epoch. Plain values, and their bytes on the wire.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"

namespace shoal {

// What a process says about itself when it joins.
struct MemberInfo {
  uint64_t id = 0;  // Random, new for every start of a process and after every exclusion.
  int64_t pid = 0;
  std::string host_name;
  std::string boot;                    // Equal on processes that run on one kernel; "" when unknown.
  std::string unix_name;               // Its door for peers of its host; "" when it has none.
  std::vector<std::string> addresses;  // Its doors for others: IP:PORT, [IP]:PORT.
  int wanted_rank = -1;                // -1: any.

  std::string Name() const;  // pid 71, host b
};

// One agreed membership. Never two different views with one (lineage, epoch).
struct View {
  uint64_t lineage = 0;  // Random, from the job's first epoch: a job that lost all of its members is another one.
  Epoch epoch{0};
  std::vector<MemberInfo> members;  // By rank.

  int RankOf(uint64_t id) const;  // -1: not a member.
};

std::string Encode(const View& view);
absl::StatusOr<View> DecodeView(std::string_view bytes);

}  // namespace shoal
