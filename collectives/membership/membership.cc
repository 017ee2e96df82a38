#include "collectives/membership/membership.h"

#include <poll.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "collectives/engine/group.h"
#include "collectives/engine/world.h"
#include "collectives/membership/coordinator_dialler.h"
#include "collectives/membership/seat.h"
#include "collectives/membership/setbacks.h"
#include "collectives/transport/clock.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kRetryNs = 20'000'000;         // Between two attempts to reach a coordinator.
constexpr int64_t kAttemptNs = 10'000'000'000;  // For one round through all of them.

class ElasticMembership final : public Membership {
 public:
  explicit ElasticMembership(const MembershipOptions& options) : options_(options) {}
  ~ElasticMembership() override;

  absl::Status TakeSeat(Fd coordinator, int64_t deadline_ns);
  absl::StatusOr<std::unique_ptr<Communicator>> NextEpoch(absl::Time deadline) override;
  View view() const override;
  int JoinersWaiting() const override { return seat_->joiners(); }

 private:
  std::vector<Accusation> LeavePresent() ABSL_EXCLUSIVE_LOCKS_REQUIRED(calls_);
  void EndPresent();
  absl::StatusOr<std::unique_ptr<Communicator>> Enter(Seat::Formed formed, absl::Time deadline,
                                                      std::shared_ptr<World>* world);
  void CountLack() ABSL_EXCLUSIVE_LOCKS_REQUIRED(calls_);

  const MembershipOptions options_;
  Mutex calls_;  // One NextEpoch at a time.
  Setbacks setbacks_ ABSL_GUARDED_BY(calls_);
  mutable Mutex mutex_;
  View view_ ABSL_GUARDED_BY(mutex_);
  // Owned by the groups of the communicator: the epoch ends with them, or when the next one begins.
  std::weak_ptr<World> world_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<World::Deaths> deaths_ ABSL_GUARDED_BY(mutex_);  // In it.
  std::unique_ptr<Seat> seat_;
};

ElasticMembership::~ElasticMembership() {
  seat_.reset();  // First: then the coordinator knows that the goodbye of the world is polite.
}

absl::Status ElasticMembership::TakeSeat(Fd coordinator, int64_t deadline_ns) {
  const auto on_excluded = [this](const std::string& cause) {
    std::shared_ptr<World> world;
    {
      MutexLock lock(&mutex_);
      world = world_.lock();
    }
    if (world != nullptr) (void)world->End(absl::StrCat("this process was excluded from the job: ", cause));
  };
  SHOAL_ASSIGN_OR_RETURN(seat_, Seat::Create(options_, std::move(coordinator), on_excluded));
  return seat_->AwaitRegistration(deadline_ns);
}

View ElasticMembership::view() const {
  MutexLock lock(&mutex_);
  return view_;
}

// What this process knows of the dead of the present epoch, to which it says goodbye: peers may still be in a collective
// that has all it needs from here.
std::vector<Accusation> ElasticMembership::LeavePresent() {
  MutexLock lock(&mutex_);
  std::vector<Accusation> accusations;
  if (deaths_ == nullptr) return accusations;
  if (const std::shared_ptr<World> world = world_.lock()) world->Leave();
  if (deaths_->TakeOwnLack()) {
    CountLack();
  } else {
    setbacks_.OnLeft();
  }
  for (const World::Deaths::Death& dead : deaths_->Get()) {
    accusations.push_back({view_.members[dead.rank].id, dead.cause, dead.died});
  }
  return accusations;
}

// Once nobody can be in one of its collectives any more, or nobody waits for this process.
void ElasticMembership::EndPresent() {
  std::shared_ptr<World> world;
  {
    MutexLock lock(&mutex_);
    world = world_.lock();
    world_.reset();
  }
  if (world != nullptr) (void)world->End("the next epoch has begun");
}

absl::StatusOr<std::unique_ptr<Communicator>> ElasticMembership::NextEpoch(absl::Time deadline) {
  MutexLock calls(&calls_);
  const int64_t deadline_ns = SteadyDeadlineNs(deadline);
  std::vector<Accusation> accusations = LeavePresent();
  while (true) {
    seat_->Ask(std::move(accusations));
    SHOAL_ASSIGN_OR_RETURN(Seat::Formed formed, seat_->Await(deadline_ns), "the next epoch");
    accusations = std::move(formed.accusations);
    // An epoch that breaks while it begins is over before the caller saw it.
    if (formed.links.empty()) continue;
    std::shared_ptr<World> world;
    setbacks_.OnFormed();
    absl::StatusOr<std::unique_ptr<Communicator>> group = Enter(std::move(formed), deadline, &world);
    if (group.ok()) setbacks_.OnEntered();
    if (absl::IsResourceExhausted(group.status())) CountLack();
    if (!absl::IsAborted(group.status())) return group;
    accusations = LeavePresent();
  }
}

void ElasticMembership::CountLack() {
  if (const int times = setbacks_.OnLack(); times > 0) seat_->StandBack(times);
}

absl::StatusOr<std::unique_ptr<Communicator>> ElasticMembership::Enter(Seat::Formed formed, absl::Time deadline,
                                                                       std::shared_ptr<World>* world) {
  EndPresent();
  WorldOptions options = options_.world;
  options.rank = formed.rank;
  options.size = static_cast<int>(formed.view.members.size());
  options.epoch = formed.view.epoch;
  const std::string context = absl::StrCat("epoch ", static_cast<uint64_t>(options.epoch));
  SHOAL_ASSIGN_OR_RETURN(*world, World::Create(options, std::move(formed.links)), context);
  {
    MutexLock lock(&mutex_);
    view_ = std::move(formed.view);
    world_ = *world;
    deaths_ = (*world)->deaths();
  }
  absl::StatusOr<std::unique_ptr<Communicator>> group = NewWorldGroup(*world, deadline);
  if (absl::IsAborted(group.status()) && (*world)->deaths()->TakeOwnLack()) {
    group = absl::ResourceExhaustedError(group.status().message());
  }
  SHOAL_RETURN_IF_ERROR(group.status(), context);
  return group;
}

}  // namespace

absl::StatusOr<MembershipOptions> MembershipOptionsFromEnvironment() {
  const auto told = [](const char* name) -> std::string {
    const char* const value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  MembershipOptions options;
  const std::string coordinators = told("SHOAL_COORDINATOR");
  if (coordinators.empty()) {
    return absl::FailedPreconditionError(
        "SHOAL_COORDINATOR is not set: say where the coordinator is, or start this program by shoal launch "
        "--rdzv-backend=shoal");
  }
  options.coordinators = SplitCoordinators(coordinators);
  if (const std::string job = told("SHOAL_RUN_ID"); !job.empty()) options.world.job_id = job;
  options.world.secret = told("SHOAL_JOB_SECRET");
  return options;
}

absl::StatusOr<std::unique_ptr<Membership>> Membership::Join(const MembershipOptions& options) {
  if (options.world.transport != "auto" && options.world.transport != "tcp") {
    return absl::InvalidArgumentError(
        absl::StrCat("transport '", options.world.transport, "' of an elastic job, want auto or tcp"));
  }
  const CoordinatorPlaces places = {options.coordinators, options.world.job_id, options.world.secret};
  const int64_t deadline_ns = NowNs() + absl::ToInt64Nanoseconds(options.coordinator_timeout);
  absl::StatusOr<Fd> coordinator = DialCoordinator(places, std::min(deadline_ns, NowNs() + kAttemptNs));
  while (absl::IsUnavailable(coordinator.status()) && NowNs() + kRetryNs < deadline_ns) {
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
    coordinator = DialCoordinator(places, std::min(deadline_ns, NowNs() + kAttemptNs));
  }
  SHOAL_RETURN_IF_ERROR(coordinator.status(), "joining job '", options.world.job_id, "'");
  auto membership = std::make_unique<ElasticMembership>(options);
  SHOAL_RETURN_IF_ERROR(membership->TakeSeat(*std::move(coordinator), deadline_ns), "joining job '",
                        options.world.job_id, "'");
  return std::unique_ptr<Membership>(std::move(membership));
}

}  // namespace shoal
