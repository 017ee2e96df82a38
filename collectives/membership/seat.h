// A member's shell: the thread that talks with the coordinator, listens at the doors and forms the connections of each
// proposed view, as member_core.h decides. Thread-safe.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/membership/coordinator_dialler.h"
#include "collectives/membership/doors.h"
#include "collectives/membership/frame.h"
#include "collectives/membership/member_core.h"
#include "collectives/membership/membership.h"
#include "collectives/membership/mesh.h"
#include "collectives/membership/message_link.h"
#include "runtime/base/mutex.h"

namespace shoal {

class Seat {
 public:
  // An epoch that the coordinator has committed.
  struct Formed {
    View view;
    int rank = 0;
    std::vector<PeerLink> links;  // By rank. Empty: a connection broke at the last moment, and the epoch is over;
    std::vector<Accusation> accusations;  // they say why.
  };

  // `coordinator`: from DialCoordinator. `on_excluded` runs on the seat's thread and must not block. RESOURCE_EXHAUSTED: no
  // descriptors left.
  static absl::StatusOr<std::unique_ptr<Seat>> Create(const MembershipOptions& options, Fd coordinator,
                                                      std::function<void(const std::string& cause)> on_excluded);
  ~Seat();  // Leaves politely.

  // Blocks until the coordinator has answered. FAILED_PRECONDITION: it refuses this process, for good.
  absl::Status AwaitRegistration(int64_t deadline_ns);
  // This process wants the epoch after the present one. `accusations`: whom it found dead in that. Does nothing when that
  // was asked already.
  void Ask(std::vector<Accusation> accusations);
  // This process cannot work in the epochs that form: it leaves, and joins again as a new member, after RejoinDelay of
  // `times` (1 or more; setbacks.h).
  void StandBack(int times);
  // Blocks until the epoch that was asked for has formed. DEADLINE_EXCEEDED says whom the coordinator waits for.
  absl::StatusOr<Formed> Await(int64_t deadline_ns);
  int joiners() const { return joiners_.load(std::memory_order_acquire); }

 private:
  Seat(const MembershipOptions& options, Fd coordinator, std::function<void(const std::string&)> on_excluded);
  absl::Status Open(const SocketAddress& local, const SocketAddress& coordinator);

  // The thread.
  void Run();
  void Turn(Greeter* greeter);
  void NewCore(absl::Duration delay);
  void TakeRequests();
  void TakeDial();
  void ReadCoordinator();
  void LoseCoordinator();
  void WatchMesh();
  void Act(std::vector<MemberCore::Action> actions);
  void Perform(MemberCore::Action& action);
  void OnExcluded(const std::string& cause);
  void Commit(const View& view);
  void Leave();
  int64_t NextTimeNs() const;

  const MembershipOptions options_;
  const MemberOptions core_options_;
  const std::function<void(const std::string&)> on_excluded_;
  Doors doors_;
  std::vector<std::string> addresses_;
  Fd wake_;
  std::unique_ptr<CoordinatorDialler> dialler_;
  std::unique_ptr<Mesh> mesh_;

  // The thread's own.
  std::unique_ptr<MemberCore> core_;
  uint64_t id_ = 0;
  Fd first_;                           // The connection that Join made, until it is used.
  std::unique_ptr<MessageLink> link_;  // Null: not connected with a coordinator.
  Epoch proposed_{0};
  bool told_ = false;  // What became of the mesh of `proposed_`: connected,
  bool broke_ = false;  // failed.
  int exclusions_ = 0;  // Since the last epoch.
  std::deque<MemberCore::Action> actions_;
  bool acting_ = false;

  std::atomic<int> joiners_{0};
  Mutex mutex_;
  CondVar changed_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool registered_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status refused_ ABSL_GUARDED_BY(mutex_);
  std::string waiting_ ABSL_GUARDED_BY(mutex_);  // What the coordinator said last.
  bool asked_ ABSL_GUARDED_BY(mutex_) = false;   // Until the epoch forms.
  bool excluded_ ABSL_GUARDED_BY(mutex_) = false;  // Since the last epoch: it has nobody to accuse.
  std::optional<std::vector<Accusation>> request_ ABSL_GUARDED_BY(mutex_);
  int stand_back_ ABSL_GUARDED_BY(mutex_) = 0;  // Requested; 0: not.
  std::optional<Formed> formed_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace shoal
