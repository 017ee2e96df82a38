// What a member does all its life in the tests of this folder, as LiveAsMember of harness/elastic.h, but more
// of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/membership/membership.h"
#include "tests/harness/elastic.h"

namespace shoal {

// Epoch after epoch: brings a replicated state to the same bits (sync_state, now and then again), then runs
// rounds of five concurrent collectives on the group of all, on one split from it with the same members, and
// on one of half of them. Every element of every result is checked. Says what MemberReport has, and "wrong:
// ..." when a result is not what it must be or something ends neither well nor ABORTED in time; then it ends.
// Understands "rounds", "leave" and "cut" (break all connections that it has). All members go on to the next
// epoch together when somebody waits to join.
void LiveInCluster(Membership& membership, Child::Parent& parent);

// A line that such a member says.
struct MemberReport {
  enum Type : uint8_t {
    kView,     // It is in an epoch.
    kWorked,   // The epoch's first round has ended well.
    kAborted,  // A collective ended so.
    kDone,     // It goes on to the next epoch, as all have agreed.
    kRounds,   // So many have ended well, in all epochs.
    kOther,    // `text` has all of the line.
  } type = kOther;
  uint64_t lineage = 0, epoch = 0;
  int64_t at_ns = 0;  // Of the machine's clock (NowNs()).
  int64_t rounds = 0;
  std::vector<int64_t> pids;  // kView: by rank.
  int unix_connections = 0;   // kWorked: how many connected unix sockets it has.
  std::string text;           // kAborted: the cause. Otherwise the line.
};

MemberReport ParseMemberReport(const std::string& line);

}  // namespace shoal
