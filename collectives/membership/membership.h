// One process's place in a job whose members come and go. Joins through a coordinator, which forms epochs and never sees
// data; it may crash and come back while collectives go on.
//
//   auto member = Membership::Join(options);
//   while (...) {
//     auto group = (*member)->NextEpoch(deadline);   // After a failure, or at a boundary that all members chose.
//     ... collectives until one ends ABORTED, or until JoinersWaiting() on all members alike ...
//   }
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collectives/communicator.h"
#include "collectives/membership/view.h"

namespace shoal {

struct MembershipOptions {
  // Where coordinators listen: HOST:PORT or unix:NAME. Tried in turn. Or etcd:HOST:PORT[,HOST:PORT...]: ask etcd who leads.
  std::vector<std::string> coordinators;
  int wanted_rank = -1;
  absl::Duration coordinator_timeout = absl::Seconds(60);  // How long Join looks for one.
  absl::Duration heartbeat_interval = absl::Milliseconds(100);
  // Peers and transports: job_id, secret, transport, interface, flows, timeout, heartbeat_timeout. rank, size, master and
  // epoch are not used.
  WorldOptions world = [] {
    WorldOptions elastic;
    elastic.heartbeat_timeout = absl::Seconds(1);
    return elastic;
  }();
};

// What an elastic launcher (`shoal launch --rdzv-backend=shoal`) tells its ranks: coordinators, job_id and secret from
// SHOAL_COORDINATOR, SHOAL_RUN_ID and SHOAL_JOB_SECRET; defaults otherwise. FAILED_PRECONDITION: SHOAL_COORDINATOR is not
// set.
absl::StatusOr<MembershipOptions> MembershipOptionsFromEnvironment();

class Membership {
 public:
  // Blocks until a coordinator has taken the registration. UNAVAILABLE: none answers; PERMISSION_DENIED: the secret is
  // wrong; FAILED_PRECONDITION: refused for another reason.
  static absl::StatusOr<std::unique_ptr<Membership>> Join(const MembershipOptions& options);
  virtual ~Membership() = default;  // Leaves politely.

  // Blocks until the next epoch with this process in it has formed. Ends the present one: operations that are issued on its
  // communicators from now on end ABORTED at once, those under way when they need more of this process, or when the next one
  // begins. The communicators may be destroyed before or after. A process that was excluded joins again, as a new member. DEADLINE_EXCEEDED says whom the
  // coordinator waits for; RESOURCE_EXHAUSTED what this process lacked to work in the epoch, which is over by that for all:
  // when it happens again it joins as a new member, after a delay that grows from time to time.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> NextEpoch(absl::Time deadline) = 0;
  // The view of the epoch that NextEpoch returned last.
  virtual View view() const = 0;
  // How many processes wait to be admitted. A hint, no traffic.
  virtual int JoinersWaiting() const = 0;
};

}  // namespace shoal
