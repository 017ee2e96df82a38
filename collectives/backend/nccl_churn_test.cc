// An elastic job (collectives/membership) whose members have devices: what they compute together goes through
// groups of NCCL, they die in the middle of it in all the ways that a group of NCCL can end, the survivors go
// on in the next epoch with communicators of their own, newcomers are admitted, again and again; nothing that
// was summed is lost or summed twice.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/backend/device_group.h"
#include "collectives/backend/fake_nccl.h"
#include "collectives/backend/fake_sum.h"
#include "collectives/membership/coordinator.h"
#include "collectives/membership/membership.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/fake_device.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::IsEmpty;

constexpr int kSeats =
    4;  // Members of an epoch when nobody is dead: the seat is what a member wants as rank, and its device.
constexpr int kSlices = 12;
constexpr int64_t kElements = 257;
constexpr int kStepsAtTheEnd = 3;
// For what must happen: a wait that takes longer is a hang.
constexpr absl::Duration kHang = absl::Minutes(1);

// How a member's life ends, in the middle of what the others do with it.
enum class Manner {
  kSilent,            // They are all inside an all-reduce that it never issues.
  kPending,           // It issues the all-reduce, and is gone at once.
  kCallFails,         // NCCL fails on its device in the all-reduce that they are all inside.
  kConnectingFails,   // NCCL fails on its device while they connect.
  kBeforeConnecting,  // They connect, and it never does.
};
constexpr int kManners = 5;

struct Death {
  int seat;
  Manner manner;
  int step;  // Of the epoch.
};

// Who dies when and how: decided by the seed alone. Each round begins with all seats taken; after a death the
// survivors go on, in some rounds there is another among them, then newcomers take the empty seats.
// Thread-safe.
class Script {
 public:
  Script(unsigned seed, int rounds) {
    std::mt19937 random(seed);
    std::array<Manner, kManners> manners;
    for (int i = 0; i < kManners; ++i) manners[static_cast<size_t>(i)] = static_cast<Manner>(i);
    std::array<int, kSeats> seats;
    std::iota(seats.begin(), seats.end(), 0);
    for (int round = 0; round < rounds; ++round) {
      // So that every manner comes first in a round once in so many.
      if (round % kManners == 0) std::shuffle(manners.begin(), manners.end(), random);
      std::shuffle(seats.begin(), seats.end(), random);
      std::vector<Death>& deaths = deaths_.emplace_back();
      deaths.push_back(
          {seats[0], manners[static_cast<size_t>(round % kManners)], static_cast<int>(random() % 3)});
      if (random() % 2 == 0)
        deaths.push_back(
            {seats[1], static_cast<Manner>(random() % kManners), static_cast<int>(random() % 3)});
      for (size_t dead = 0; dead < deaths.size(); ++dead) {
        const bool all_inside =
            deaths[dead].manner == Manner::kSilent || deaths[dead].manner == Manner::kCallFails;
        if (all_inside) torn_ += kSeats - static_cast<int>(dead) - 1;
      }
    }
  }

  // How often a death ends an operation of a survivor, at least: after some manners it depends on who is
  // faster.
  int torn() const { return torn_; }

  // What happens in this epoch.
  std::optional<Death> DeathIn(const View& view) {
    const MutexLock lock(&mutex_);
    const size_t dead = kSeats - view.members.size();
    if (dead == 0) full_epochs_.emplace(static_cast<uint64_t>(view.epoch), full_epochs_.size());
    const size_t round = full_epochs_.size() - 1;
    if (round >= deaths_.size() || dead >= deaths_[round].size()) return std::nullopt;
    return deaths_[round][dead];
  }
  bool Ends(const View& view) const {
    const MutexLock lock(&mutex_);
    return full_epochs_.size() > deaths_.size() && view.members.size() == kSeats;
  }

  // The survivors compute again, and nobody else dies in this round.
  void Settle() {
    const MutexLock lock(&mutex_);
    settled_ = full_epochs_.size();
    changed_.NotifyAll();
  }
  // False: a hang.
  bool AwaitSettled() {
    const MutexLock lock(&mutex_);
    const auto end = std::chrono::steady_clock::now() + absl::ToChronoSeconds(kHang);
    while (settled_ < full_epochs_.size()) {
      if (!changed_.WaitUntil(&mutex_, end)) return false;
    }
    return true;
  }

 private:
  std::vector<std::vector<Death>> deaths_;  // By round.
  int torn_ = 0;
  mutable Mutex mutex_;
  CondVar changed_;
  std::map<uint64_t, size_t> full_epochs_ ABSL_GUARDED_BY(mutex_);
  size_t settled_ ABSL_GUARDED_BY(mutex_) = 0;  // Rounds.
};

// The job's work: a step adds all slices, whoever has computed them, to the state.
int64_t Slice(int64_t step, int slice, int64_t element) {
  return (step * 31 + slice * 7 + element) % 101 - 50;
}

struct Progress {
  int64_t steps = 0;
  std::vector<int64_t> state = std::vector<int64_t>(kElements);

  void Add(absl::Span<const int64_t> sums) {
    for (size_t i = 0; i < state.size(); ++i) state[i] += sums[i];
    ++steps;
  }
  // As one process would do them.
  void GoTo(int64_t step) {
    while (steps < step) {
      std::vector<int64_t> sums(state.size());
      for (int slice = 0; slice < kSlices; ++slice) {
        for (int64_t i = 0; i < kElements; ++i) sums[static_cast<size_t>(i)] += Slice(steps, slice, i);
      }
      Add(sums);
    }
  }
};

struct Job {
  explicit Job(unsigned seed, int rounds)
      : fake({.devices = kSeats, .protect = false, .kernels = &SumKernels()}),
        nccl(fake),
        script(seed, rounds) {}

  FakeDevice fake;
  FakeNccl nccl;
  Script script;
  std::string coordinator;
  std::atomic<int> torn = 0;  // How often a death ended an operation on a survivor.
};

WorldOptions WorldOptionsOfTest() {
  WorldOptions options;
  options.job_id = "test";
  options.timeout = kHang;
  options.heartbeat_timeout = absl::Seconds(30);
  return options;
}

// One life: from joining to death, or to the job's end.
class Life {
 public:
  Life(Job& job, int seat) : job_(job), seat_(seat) {}

  // OK: the job has ended; CANCELLED: this life has.
  absl::Status Run() {
    SHOAL_ASSIGN_OR_RETURN(device_, Device::Create(job_.nccl.device_api(), seat_));
    MembershipOptions options;
    options.coordinators = {job_.coordinator};
    options.wanted_rank = seat_;
    options.world = WorldOptionsOfTest();
    SHOAL_ASSIGN_OR_RETURN(member_, Membership::Join(options));
    while (true) {
      SHOAL_ASSIGN_OR_RETURN(world_, member_->NextEpoch(absl::Now() + kHang));
      const absl::Status status = RunEpoch();
      CloseGroups();
      if (job_.script.Ends(member_->view()) && status.ok()) return status;
      if (!status.ok() && !absl::IsAborted(status)) return status;
    }
  }

 private:
  // OK: all members go on to the next epoch, or to the end.
  absl::Status RunEpoch() {
    const View view = member_->view();
    const std::optional<Death> death = job_.script.DeathIn(view);
    const bool own = death.has_value() && death->seat == seat_;
    const absl::Status met = Meet(own ? &*death : nullptr);
    if (own && (death->manner == Manner::kBeforeConnecting || death->manner == Manner::kConnectingFails)) {
      return met.ok() ? absl::InternalError("met after all") : absl::CancelledError();
    }
    SHOAL_RETURN_IF_ERROR(met);
    SHOAL_RETURN_IF_ERROR(CatchUp());
    const size_t missing = kSeats - view.members.size();
    for (int step = 0;; ++step) {
      if (own && step == death->step) return Die(death->manner, step);
      const absl::Status stepped = Step();
      if (absl::IsAborted(stepped)) ++job_.torn;
      SHOAL_RETURN_IF_ERROR(stepped);
      SHOAL_RETURN_IF_ERROR(StepOfHalf());
      if (missing > 0 && !death.has_value()) job_.script.Settle();
      SHOAL_ASSIGN_OR_RETURN(const int64_t waiting, LeastOf(member_->JoinersWaiting()));
      if (missing > 0 && waiting == static_cast<int64_t>(missing)) return absl::OkStatus();
      if (job_.script.Ends(view) && step + 1 == kStepsAtTheEnd) return absl::OkStatus();
    }
  }

  // Connects. `death`: the own one of this epoch.
  absl::Status Meet(const Death* death) {
    std::vector<int> all(static_cast<size_t>(world_->size())), half;
    std::iota(all.begin(), all.end(), 0);
    for (int rank : all) {
      if (rank % 2 == world_->index() % 2) half.push_back(rank);
    }
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> host, world_->Split(all));
    if (death != nullptr && death->manner == Manner::kBeforeConnecting) return absl::CancelledError();
    if (death != nullptr && death->manner == Manner::kConnectingFails)
      job_.nccl.FailCall("connect", host->index(), 1);
    // Who is about to die does not wait for the others to close their groups too.
    const absl::Duration close_timeout = death != nullptr ? absl::Milliseconds(1) : kHang;
    SHOAL_ASSIGN_OR_RETURN(
        group_, DeviceGroup(std::move(host), *device_, &job_.nccl.api(),
                            {.connect_timeout = kHang, .timeout = kHang, .close_timeout = close_timeout}));
    SHOAL_ASSIGN_OR_RETURN(half_, group_->Split(half));
    members_of_half_ = std::move(half);
    reductions_.clear();
    for (int rank : all) reductions_.push_back(job_.nccl.Calls("all_reduce", rank));
    // Nobody reduces before all have counted.
    return world_->Barrier({}).Await();
  }

  // The first rank that has come furthest tells its state: some may have finished a step in which others lost
  // a member.
  absl::Status CatchUp() {
    const Tensor own = Zeros({1}, DType::kI64), all = Zeros({world_->size()}, DType::kI64);
    *own.data<int64_t>() = now_.steps;
    const std::vector<int64_t> counts(static_cast<size_t>(world_->size()), 1);
    SHOAL_RETURN_IF_ERROR(world_->AllGather(own, counts, all, {}).Await());
    const int64_t* const steps = all.data<int64_t>();
    const int64_t* const furthest = std::max_element(steps, steps + world_->size());
    SHOAL_ASSIGN_OR_RETURN(const Tensor state, group_->Allocate({kElements}, DType::kI64));
    std::copy(now_.state.begin(), now_.state.end(), state.data<int64_t>());
    SHOAL_RETURN_IF_ERROR(group_->Broadcast(state, static_cast<int>(furthest - steps), {}).Await());
    now_.state.assign(state.data<int64_t>(), state.data<int64_t>() + kElements);
    now_.steps = *furthest;
    return Check();
  }

  // With the contributions of this rank's slices.
  absl::StatusOr<Tensor> OwnSum() const {
    SHOAL_ASSIGN_OR_RETURN(Tensor sum, group_->Allocate({kElements}, DType::kI64));
    std::fill_n(sum.data<int64_t>(), kElements, 0);
    for (int slice = group_->index(); slice < kSlices; slice += group_->size()) {
      for (int64_t i = 0; i < kElements; ++i) sum.data<int64_t>()[i] += Slice(now_.steps, slice, i);
    }
    return sum;
  }

  absl::Status Step() {
    SHOAL_ASSIGN_OR_RETURN(const Tensor sum, OwnSum());
    SHOAL_RETURN_IF_ERROR(group_->AllReduce(sum, sum, ReduceOp::kSum, {.label = "gradients"}).Await());
    now_.Add(sum.span<int64_t>());
    return Check();
  }

  absl::Status Check() {
    expected_.GoTo(now_.steps);
    if (now_.state == expected_.state) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("the state of seat ", seat_, " after ", now_.steps, " steps is wrong"));
  }

  // The same of a part of the group: each gives its rank.
  absl::Status StepOfHalf() {
    const int64_t size = half_->size();
    SHOAL_ASSIGN_OR_RETURN(const Tensor own, half_->Allocate({1}, DType::kI64));
    SHOAL_ASSIGN_OR_RETURN(const Tensor all, half_->Allocate({size}, DType::kI64));
    *own.data<int64_t>() = world_->index();
    SHOAL_RETURN_IF_ERROR(
        half_->AllGather(own, std::vector<int64_t>(static_cast<size_t>(size), 1), all, {.label = "half"})
            .Await());
    if (std::equal(members_of_half_.begin(), members_of_half_.end(), all.data<int64_t>()))
      return absl::OkStatus();
    return absl::DataLossError("a part of the group has gathered something else");
  }

  absl::StatusOr<int64_t> LeastOf(int64_t value) {
    const Tensor least = Zeros({1}, DType::kI64);
    *least.data<int64_t>() = value;
    SHOAL_RETURN_IF_ERROR(world_->AllReduce(least, least, ReduceOp::kMin, {.label = "joiners"}).Await());
    return *least.data<int64_t>();
  }

  // In the epoch's step `step`. CANCELLED, unless something is wrong.
  absl::Status Die(Manner manner, int step) {
    SHOAL_ASSIGN_OR_RETURN(const Tensor sum, OwnSum());
    if (manner != Manner::kPending) SHOAL_RETURN_IF_ERROR(AwaitOthersInside(step));
    if (manner == Manner::kSilent) return absl::CancelledError();
    if (manner == Manner::kCallFails) job_.nccl.FailCall("all_reduce", group_->index(), 1);
    const Work work = group_->AllReduce(sum, sum, ReduceOp::kSum, {.label = "gradients"});
    if (manner == Manner::kCallFails && !absl::IsAborted(work.Await()))
      return absl::InternalError("a call that fails is not noticed");
    CloseGroups();  // While `sum` is there.
    return absl::CancelledError();
  }

  // Until NCCL has the all-reduces of this step from all others.
  absl::Status AwaitOthersInside(int step) const {
    const absl::Time end = absl::Now() + kHang;
    for (int rank = 0; rank < group_->size(); ++rank) {
      const int inside = reductions_[static_cast<size_t>(rank)] + step + 1;
      while (rank != group_->index() && job_.nccl.Calls("all_reduce", rank) < inside) {
        if (absl::Now() > end) return absl::InternalError(absl::StrCat("rank ", rank, " does not reduce"));
        std::this_thread::yield();
      }
    }
    return absl::OkStatus();
  }

  void CloseGroups() {
    half_.reset();
    group_.reset();
    world_.reset();
  }

  Job& job_;
  const int seat_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Membership> member_;
  std::unique_ptr<Communicator> world_, group_, half_;
  std::vector<int> members_of_half_;
  std::vector<int> reductions_;  // By rank: calls before this epoch.
  Progress now_, expected_;
};

// Sums over ranks.
int CallsOf(const FakeNccl& nccl, std::string_view function) {
  int calls = 0;
  for (int rank = 0; rank < kSeats; ++rank) calls += nccl.Calls(function, rank);
  return calls;
}

class NcclChurn : public ::testing::TestWithParam<unsigned> {};
INSTANTIATE_TEST_SUITE_P(Seeds, NcclChurn, ::testing::Range(1u, 5u));

TEST_P(NcclChurn, SurvivorsGoOnAndNewcomersAreAdmitted) {
  constexpr int kRounds = 2 * kManners;
  Job job(GetParam(), kRounds);
  CoordinatorServerOptions options;
  options.core.heartbeat_timeout = WorldOptionsOfTest().heartbeat_timeout;
  options.listen = UniqueRendezvous();
  options.job_id = "test";
  job.coordinator = options.listen;
  const auto coordinator = CoordinatorServer::Start(options);
  ASSERT_TRUE(coordinator.ok()) << coordinator.status();
  std::vector<std::thread> seats;
  for (int seat = 0; seat < kSeats; ++seat) {
    seats.emplace_back([&job, seat] {
      absl::Status end = absl::CancelledError();
      while (absl::IsCancelled(end)) {
        end = Life(job, seat).Run();
        if (absl::IsCancelled(end) && !job.script.AwaitSettled())
          end = absl::DeadlineExceededError("the survivors do not go on");
      }
      EXPECT_EQ(end, absl::OkStatus()) << "seat " << seat;
    });
  }
  for (std::thread& seat : seats) seat.join();
  EXPECT_GE(job.torn, job.script.torn());
  EXPECT_GE(CallsOf(job.nccl, "abort"), job.torn);
  EXPECT_THAT(job.nccl.Faults(), IsEmpty());
}

}  // namespace
}  // namespace shoal
