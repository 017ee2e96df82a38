// The coordinator's decisions: a pure state machine. Time and messages come in, messages and closures go out; the shell
// (coordinator.h) has the sockets, the simulation (tests/sim) has none.
//
// An epoch forms in two phases: propose a view, everybody in it connects with everybody, all confirm, commit. A member
// remembers the highest epoch that it was proposed. So a coordinator that starts anew learns from any survivor which
// numbers are taken, and there are never two views in one epoch. A restarted coordinator knows nothing but what members
// say when they register again.
//
// The next epoch is proposed when every member of the committed one asked for it, except those who left, who were
// accused by one that asked and are gone (connection closed), or who were silent for `heartbeat_timeout`. All who wait to
// join are admitted then. The first epoch forms when `size_min` processes are there. Two members that accuse each other
// while both answer the coordinator: the one with more accusers goes, then the younger one (higher rank).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "collectives/membership/messages.h"

namespace shoal {

struct CoordinatorOptions {
  int size_min = 1;   // An epoch has at least so many members.
  int size_max = 16384;
  absl::Duration heartbeat_timeout = absl::Seconds(1);
  // How long members of the last epoch that have not come back hold up the next one, after a restart. Also: how long a
  // job that has lost all of its members is remembered before newcomers may begin another one.
  absl::Duration return_timeout = absl::Seconds(5);
  // A coordinator so young forms no first epoch, so that the members of a job whose coordinator has died come first.
  absl::Duration settle_time = absl::Milliseconds(150);
};

class CoordinatorCore {
 public:
  using Connection = uint64_t;
  struct Action {
    enum Type { kSend, kClose, kLog } type = kSend;
    Connection connection = 0;
    CoordinatorMessage message;  // kSend.
    std::string text;            // kLog, kClose: why.
  };

  // `seed`: of random numbers (the lineage). Times: nanoseconds of a steady clock.
  CoordinatorCore(CoordinatorOptions options, uint64_t seed, int64_t now_ns);
  ~CoordinatorCore();

  // The first message of a connection must be a kHello; a connection that is closed by an action is not heard of again.
  std::vector<Action> OnMessage(Connection connection, const MemberMessage& message, int64_t now_ns);
  std::vector<Action> OnClosed(Connection connection, int64_t now_ns);
  std::vector<Action> OnTime(int64_t now_ns);
  // When OnTime is due at the latest. Time that passed without any call was a pause of this process, and counts for nobody.
  int64_t NextTimeNs() const;

  const View& committed() const;  // Empty before the first epoch.

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
