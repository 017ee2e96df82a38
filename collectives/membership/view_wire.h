// The bytes of members and views within messages (see view.cc). All integers are little-endian of 8 bytes,
// strings have their length before them.
//
//   member: id, pid, host_name, boot, unix_name, number of addresses, addresses, wanted_rank + 1
//   view:   lineage, epoch, number of members, members by rank; the empty view is three zeros
#pragma once

#include "absl/status/status.h"
#include "collectives/membership/view.h"
#include "collectives/transport/wire.h"

namespace shoal {

void Write(const MemberInfo& info, WireWriter& out);
void Write(const View& view, WireWriter& out);
// DATA_LOSS: not such bytes, or beyond a bound.
absl::Status Read(WireReader& in, MemberInfo* info);
absl::Status Read(WireReader& in, View* view);

}  // namespace shoal
