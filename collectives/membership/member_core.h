// A member's side of the membership protocol: a pure state machine, as coordinator_core.h. The shell (membership.h)
// has the sockets and forms the connections of a proposed view.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "collectives/membership/messages.h"

namespace shoal {

struct MemberOptions {
  absl::Duration heartbeat_interval = absl::Milliseconds(100);
  absl::Duration heartbeat_timeout = absl::Seconds(1);  // A silent coordinator is dialled anew.
  absl::Duration redial_interval = absl::Milliseconds(50);
  absl::Duration first_dial_delay = absl::ZeroDuration();
};

class MemberCore {
 public:
  struct Action {
    enum Type {
      kDial,     // Connect with the coordinator (any of its addresses), then OnCoordinator(true).
      kHangUp,   // Close that connection.
      kSend,     // `message` to the coordinator.
      kConnect,  // Connect with everybody in `view`; then OnConnected or OnConnectFailed. Replaces an attempt under way.
      kCommit,   // `view` is the epoch.
      kExcluded, // No longer a member: `text`. Joining again needs a new core with a new id.
      kRefused,  // Cannot join: `text`.
      kJoiners,  // So many wait to be admitted. Again 0 after every commit.
      kWaiting,  // For diagnosis: `text` says whom the coordinator waits for.
      kLog,
    } type = kSend;
    MemberMessage message;
    View view;
    std::string text;
    uint64_t joiners = 0;
  };

  // OnTime is due at once. After kExcluded, kRefused and Leave nothing more is asked for.
  MemberCore(MemberInfo self, MemberOptions options, int64_t now_ns);
  ~MemberCore();

  // The application: wants the epoch after the present one, accusing those that it found dead. Not again before kCommit.
  std::vector<Action> Ready(std::vector<Accusation> accusations, int64_t now_ns);
  std::vector<Action> Leave(int64_t now_ns);
  // The connection with the coordinator: is up, or closed (also: a dial failed). After a kHangUp nothing more may come from
  // the connection or dial that it ended.
  std::vector<Action> OnCoordinator(bool up, int64_t now_ns);
  std::vector<Action> OnMessage(const CoordinatorMessage& message, int64_t now_ns);
  // What became of the last kConnect. OnConnectFailed may follow OnConnected, when a connection breaks before kCommit.
  std::vector<Action> OnConnected(Epoch epoch, int64_t now_ns);
  std::vector<Action> OnConnectFailed(Epoch epoch, std::vector<Accusation> accusations, int64_t now_ns);
  std::vector<Action> OnTime(int64_t now_ns);
  int64_t NextTimeNs() const;

  const View& committed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
