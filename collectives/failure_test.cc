// How groups end: dead, stopped, leaving and late peers, and aborts. Every survivor learns the cause at once, and groups
// that are not concerned go on. Some tests are named after what went wrong elsewhere (PCCL).

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "runtime/base/mutex.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

class Failures : public ::testing::TestWithParam<std::string> {
 protected:
  WorldOptions Options(int size) const { return RankOptions(0, size, GetParam(), UniqueRendezvous()); }
};
INSTANTIATE_TEST_SUITE_P(All, Failures, ::testing::Values("auto", "tcp"),
                         [](const auto& info) { return info.param; });

// Reduces until the group ends, and checks every sum that is called one; says "running" when heartbeats have told the
// peers what it does, and the cause in the end.
void ReduceForEver(Communicator& group, const RankProcesses::Say& say) {
  const Tensor grads = *group.Allocate({1 << 20}, DType::kF32);
  const Tensor sum = *group.Allocate({1 << 20}, DType::kF32);
  std::fill_n(grads.data<float>(), grads.elements(), 1.0f);
  absl::Status status;
  const absl::Time told = absl::Now() + absl::Milliseconds(200);
  for (bool said = false; status.ok();) {
    if (!said && absl::Now() > told) {
      say("running");
      said = true;
    }
    status = group.AllReduce(grads, sum, ReduceOp::kSum, {.label = "grads"}).Await();
    for (int64_t i = 0; status.ok() && i < sum.elements(); i += 1021) {
      if (sum.data<float>()[i] != group.size()) say("a wrong sum");
    }
  }
  if (group.Barrier({}).Await().ok()) say("an operation of a group that is over succeeded");
  say(status.ToString());
}

TEST_P(Failures, KilledPeerMidAllReduceAbortsEverySurvivorAtOnce) {
  RankProcesses ranks(Options(4), ReduceForEver);
  for (int rank = 0; rank < 4; ++rank) ASSERT_EQ(ranks.Line(rank), "running");
  ranks.Signal(2, SIGKILL);
  const absl::Time killed = absl::Now();
  for (int rank : {0, 1, 3}) {
    EXPECT_THAT(ranks.Line(rank), AllOf(HasSubstr("ABORTED: all_reduce \"grads\""),
                                        HasSubstr(absl::StrCat("rank 2 (pid ", ranks.pid(2), ", host ")),
                                        AnyOf(HasSubstr("connection closed"), HasSubstr("process died"))));
  }
  // Far below any time-out (a heartbeat's is 30 s here); it takes milliseconds on an idle machine.
  EXPECT_LT(absl::Now() - killed, absl::Seconds(5));
}

// One death must neither stop the other group, nor bring down who is in it: both happened elsewhere, because all groups
// shared one vote.
TEST_P(Failures, AKillEndsExactlyTheGroupsThatHaveTheDeadRank) {
  RankProcesses ranks(Options(5), [](Communicator& world, const RankProcesses::Say& say) {
    const bool low = world.index() < 3;
    const std::vector<int> members = low ? std::vector<int>{0, 1, 2} : std::vector<int>{3, 4};
    std::unique_ptr<Communicator> group = *world.Split(members);
    std::unique_ptr<Communicator> rest;  // Of the first group, without the one who will die.
    if (low && world.index() != 1) rest = *group->Split({0, 2});
    const Tensor data = *group->Allocate({100'000}, DType::kF32);
    const auto reduce = [&](Communicator& in) { return in.AllReduce(data, data, ReduceOp::kMax, {}).Await(); };
    for (int i = 0; i < 3; ++i) {
      if (const absl::Status status = reduce(*group); !status.ok()) return say(status.ToString());
    }
    say("running");
    if (low) {
      absl::Status status;
      while (status.ok()) status = reduce(*group);
      say(status.ToString());
    } else {
      while (world.status().ok()) (void)group->status();
      say(world.status().ToString());
    }
    // The death is known. What does not need the dead rank works, and goes on working.
    Communicator& alive = low ? *rest : *group;
    for (int i = 0; i < 200; ++i) {
      if (const absl::Status status = reduce(alive); !status.ok()) return say(status.ToString());
    }
    say(absl::StrCat("alive, the others: ", world.Barrier({}).Await().ToString()));
    (void)alive.Barrier({}).Await();
  });
  for (int rank = 0; rank < 5; ++rank) ASSERT_EQ(ranks.Line(rank), "running");
  ranks.Signal(1, SIGKILL);
  for (int rank : {0, 2, 3, 4}) {
    EXPECT_THAT(ranks.Line(rank), AllOf(HasSubstr("ABORTED: "), HasSubstr("rank 1 (pid "))) << rank;
    EXPECT_THAT(ranks.Line(rank), AllOf(HasSubstr("alive, the others: ABORTED: barrier"),
                                        HasSubstr("rank 1 (pid "))) << rank;
  }
}

TEST_P(Failures, StoppedPeerIsNoticedByItsSilenceAndFindsItsEpochOver) {
  WorldOptions options = Options(3);
  options.heartbeat_timeout = absl::Milliseconds(300);
  RankProcesses ranks(options, ReduceForEver);
  for (int rank = 0; rank < 3; ++rank) ASSERT_EQ(ranks.Line(rank), "running");
  ranks.Signal(1, SIGSTOP);
  const absl::Time stopped = absl::Now();
  for (int rank : {0, 2}) {
    EXPECT_THAT(ranks.Line(rank),
                AllOf(HasSubstr("ABORTED"), HasSubstr("rank 1 (pid "), HasSubstr("silent for 0."),
                      HasSubstr("(last: all_reduce \"grads\" #")));
  }
  EXPECT_LT(absl::Now() - stopped, absl::Seconds(5));
  ranks.Signal(1, SIGCONT);
  EXPECT_THAT(ranks.Line(1), HasSubstr("ABORTED"));
}

TEST_P(Failures, AbortReachesEveryRankWithItsCause) {
  std::atomic<int> called{0};
  RunRanks(3, GetParam(), [&](Communicator& group) {
    (void)group.Barrier({}).Await();  // Before all have connected an abort would refuse them.
    Mutex mutex;
    CondVar changed;
    bool aborted = false;
    group.OnAbort([&](const absl::Status& cause) {
      EXPECT_EQ(cause.ToString(), "ABORTED: rank 1 aborted: disk full");
      MutexLock lock(&mutex);
      ++called;
      aborted = true;
      changed.NotifyAll();
    });
    const Tensor data = Zeros({100'000}, DType::kF32);
    if (group.index() == 1) {
      group.Abort(absl::DataLossError("disk full"));
    } else {
      EXPECT_THAT(group.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(),
                  AllOf(HasSubstr("ABORTED"), HasSubstr("rank 1 aborted: disk full")));
    }
    EXPECT_EQ(group.status().ToString(), "ABORTED: rank 1 aborted: disk full");
    EXPECT_TRUE(absl::IsAborted(group.Barrier({}).Await()));
    EXPECT_TRUE(absl::IsAborted(group.Split({0, 1, 2}).status()));
    EXPECT_EQ(group.Allocate({8}, DType::kF32).status(), group.status());
    MutexLock lock(&mutex);
    while (!aborted) changed.Wait(&mutex);
  });
  EXPECT_EQ(called, 3);
}

TEST_P(Failures, AbortEndsOperationsOfAllGroupsAndAllThatAreQueued) {
  RunRanks(3, GetParam(), [](Communicator& world) {
    (void)world.Barrier({}).Await();  // Before all have connected an abort would refuse them.
    absl::StatusOr<std::unique_ptr<Communicator>> split = world.Split({0, 1, 2});
    std::vector<Work> works;
    if (world.index() != 2) {
      // Rank 2 may be through with it, and abort, before this rank is.
      if (!split.ok()) {
        EXPECT_TRUE(absl::IsAborted(split.status()));
        return;
      }
      std::unique_ptr<Communicator>& group = *split;
      for (int i = 0; i < 20; ++i) {
        works.push_back(world.Barrier({}));
        works.push_back(group->Barrier({}));
      }
    } else {
      world.Abort(absl::CancelledError("enough"));
    }
    for (const Work& work : works) EXPECT_TRUE(absl::IsAborted(work.Await()));
  });
}

TEST_P(Failures, AnAbortEndsTheGroupAndThoseSplitFromItAndNoOther) {
  RunRanks(3, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> group = *world.Split({0, 1, 2});
    std::unique_ptr<Communicator> sibling = *world.Split({0, 1, 2});
    std::unique_ptr<Communicator> child = *group->Split({0, 1, 2});
    EXPECT_EQ(sibling->Barrier({}).Await().ToString(), "OK");  // Everybody has all of them.
    if (world.index() == 1) group->Abort(absl::DataLossError("disk full"));
    for (Communicator* over : {group.get(), child.get()}) {
      EXPECT_THAT(over->Barrier({}).Await().ToString(), HasSubstr("rank 1 aborted: disk full"));
      EXPECT_TRUE(absl::IsAborted(over->Split({0, 1, 2}).status()));
    }
    const Tensor data = Zeros({1000}, DType::kF32);
    for (Communicator* alive : {&world, sibling.get()}) {
      EXPECT_EQ(alive->AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
      EXPECT_EQ(alive->status().ToString(), "OK");
    }
  });
}

// A straggler stalls nobody but those who wait for it, and those not for ever.
TEST_P(Failures, AMissedDeadlineEndsOnlyTheGroupOfTheStraggler) {
  RunRanks(3, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> all = *world.Split({0, 1, 2});
    std::unique_ptr<Communicator> quick;
    if (world.index() != 1) quick = *world.Split({0, 2});
    const Tensor data = Zeros({1000}, DType::kF32);
    if (world.index() == 1) {
      while (all->status().ok()) std::this_thread::yield();
    } else {
      const Work late = all->Barrier({.deadline = absl::Now() + absl::Milliseconds(200), .label = "late"});
      EXPECT_EQ(quick->AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
      EXPECT_TRUE(absl::IsAborted(late.Await()));
      EXPECT_EQ(quick->AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
    }
    EXPECT_THAT(all->status().ToString(), HasSubstr("barrier \"late\" #1: deadline passed: rank 1 (pid "));
    EXPECT_EQ(world.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
  });
}

TEST_P(Failures, RanksInDifferentOperationsEndTheirGroupOnly) {
  RunRanks(2, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> group = *world.Split({0, 1});
    const Tensor data = Zeros({1000}, DType::kF32);
    const Work work = world.index() == 0 ? group->Broadcast(data, 0, {})
                                         : group->AllReduce(data, data, ReduceOp::kSum, {});
    // A broadcast's root may be through before it is known.
    if (world.index() == 1) {
      EXPECT_TRUE(absl::IsAborted(work.Await()));
    }
    while (group->status().ok()) std::this_thread::yield();
    EXPECT_EQ(world.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
  });
}

// One is small enough to go by a way of its own on shared memory, the other is not. Long before the deadline.
TEST_P(Failures, ATinyOperationAndALargeOneInItsPlaceEndTheirGroup) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    (void)group.Barrier({}).Await();
    const Tensor data = Zeros({group.index() == 1 ? 10 : 1'000'000}, DType::kF32);
    EXPECT_THAT(group.AllReduce(data, data, ReduceOp::kSum, {.label = "sizes"}).Await().ToString(),
                AllOf(HasSubstr("ABORTED: all_reduce \"sizes\""), HasSubstr("rank 1 (pid "),
                      HasSubstr("not the same operation, or with other arguments")));
  });
}

TEST_P(Failures, MissedDeadlineNamesTheOperationAndWhoHadNotArrived) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({5}, DType::kF32);
    if (group.index() != 1) {
      const OpOptions options = {.deadline = absl::Now() + absl::Milliseconds(200), .label = "norm"};
      const absl::Status status = group.AllReduce(data, data, ReduceOp::kSum, options).Await();
      EXPECT_TRUE(absl::IsAborted(status)) << status;
    }
    while (group.status().ok()) std::this_thread::yield();
    EXPECT_THAT(group.status().ToString(),
                AllOf(HasSubstr("all_reduce \"norm\" #1: deadline passed: rank 1 (pid "),
                      HasSubstr("(no operation yet)"), HasSubstr("had not arrived"), Not(HasSubstr("rank 0 (")), Not(HasSubstr("rank 2 ("))));
  });
}

TEST_P(Failures, ADeadlineBehindAnotherOperationCountsAsWell) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    if (group.index() == 1) {
      while (group.status().ok()) std::this_thread::yield();
      return;
    }
    const Work first = group.Barrier({});
    const Work second = group.Barrier({.deadline = absl::Now() + absl::Milliseconds(100)});
    EXPECT_TRUE(absl::IsAborted(second.Await()));
    EXPECT_TRUE(absl::IsAborted(first.Await()));
  });
}

TEST_P(Failures, TheDefaultTimeoutBoundsEveryOperation) {
  WorldOptions options = Options(2);
  options.timeout = absl::Milliseconds(200);
  RankProcesses ranks(options, [](Communicator& group, const RankProcesses::Say& say) {
    if (group.index() == 0) {
      say(group.Barrier({}).Await().ToString());
    } else {
      while (group.status().ok()) std::this_thread::yield();
    }
  });
  EXPECT_THAT(ranks.Line(0), AllOf(HasSubstr("ABORTED: barrier #1: "), HasSubstr("rank 1 (pid ")));
}

TEST_P(Failures, LeavingAfterTheLastOperationDisturbsNobody) {
  RunRanks(4, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> rest;
    if (world.index() != 0) rest = *world.Split({1, 2, 3});
    const Tensor data = Zeros({100'000}, DType::kF32);
    EXPECT_EQ(world.Broadcast(data, 0, {}).Await().ToString(), "OK");
    if (world.index() == 0) return;
    for (int i = 0; i < 200; ++i)
      ASSERT_EQ(rest->AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
  });
}

// The end of it may still be in the sockets when the goodbye is known.
TEST_P(Failures, WhatWasSentBeforeLeavingArrives) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({16 << 20}, DType::kU8), part = data.Rows(0, 1 << 20);
    EXPECT_EQ(group.Barrier({}).Await().ToString(), "OK");  // All have connected.
    if (group.index() == 0) {
      std::fill_n(data.data<uint8_t>(), data.elements(), uint8_t{7});
      const Work large = group.Send(data, 1, 7, {}), small = group.Send(part, 2, 7, {});
      EXPECT_EQ(large.Await().ToString(), "OK");
      EXPECT_EQ(small.Await().ToString(), "OK");
      return;
    }
    const Tensor into = group.index() == 1 ? data : part;
    EXPECT_EQ(group.Receive(into, 0, 7, {}).Await().ToString(), "OK");
    EXPECT_EQ(std::count(into.data<uint8_t>(), into.data<uint8_t>() + into.elements(), uint8_t{7}), into.elements());
  });
}

TEST_P(Failures, WhatWasSentBeforeLeavingReachesAPeerThatIsStopped) {
  if (GetParam() == "auto") GTEST_SKIP() << "in shared memory a send ends when it has been read";
  RankProcesses ranks(Options(2), [](Communicator& group, const RankProcesses::Say& say) {
    const Tensor data = Zeros({200'000}, DType::kU8);  // So much the kernels take while nobody reads.
    (void)group.Barrier({}).Await();
    if (group.index() == 0) {
      std::fill_n(data.data<uint8_t>(), data.elements(), uint8_t{7});
      raise(SIGSTOP);
      say(group.Send(data, 1, 7, {}).Await().ToString());
    } else {
      const Work work = group.Receive(data, 0, 7, {});
      (void)work.Await(absl::Now() + absl::Milliseconds(20));  // Now the other one may send.
      say("posted");
      raise(SIGSTOP);
      (void)group.Send(Zeros({8}, DType::kU8), 0, 8, {});
      say(work.Await().ToString());
      say(absl::StrCat(std::count(data.data<uint8_t>(), data.data<uint8_t>() + data.elements(), uint8_t{7})));
    }
  });
  ASSERT_EQ(ranks.Line(1), "posted");
  siginfo_t info;
  for (const int rank : {0, 1}) ASSERT_EQ(waitid(P_PID, ranks.pid(rank), &info, WSTOPPED | WNOWAIT), 0);
  ranks.Signal(0, SIGCONT);
  EXPECT_EQ(ranks.Line(0), "OK");
  // It says goodbye for a second, and stays longer if the other one's system has not taken all.
  info.si_pid = 0;
  for (const absl::Time later = absl::Now() + absl::Milliseconds(1500); absl::Now() < later && info.si_pid == 0;) {
    ASSERT_EQ(waitid(P_PID, ranks.pid(0), &info, WEXITED | WNOHANG | WNOWAIT), 0);
    std::this_thread::yield();
  }
  ranks.Signal(1, SIGCONT);
  EXPECT_EQ(ranks.Line(1), "OK");
  EXPECT_EQ(ranks.Line(1), "200000");
  EXPECT_EQ(ranks.Line(0), "");  // It is gone.
}

TEST_P(Failures, WaitingForARankThatLeftEndsTheEpoch) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    EXPECT_EQ(group.Barrier({}).Await().ToString(), "OK");  // All have connected.
    // All have passed the first one. Who is slow may not pass this one before another finds that the group is over.
    (void)group.Barrier({}).Await();
    if (group.index() == 1) return;
    const Tensor data = Zeros({100'000}, DType::kF32);
    EXPECT_THAT(group.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(),
                AllOf(HasSubstr("ABORTED"), HasSubstr("rank 1 (pid "), HasSubstr("left")));
  });
}

TEST_P(Failures, ClosingWithOperationsPendingAbortsThem) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    if (group.index() == 0) {
      (void)group.Barrier({});  // Dropping the handle does not stop it; the end of the communicator does.
      return;
    }
    while (group.status().ok()) std::this_thread::yield();
    EXPECT_THAT(group.status().ToString(), HasSubstr("rank 0 aborted: closed with operations pending"));
  });
}

TEST_P(Failures, HandlesOutliveTheCommunicator) {
  std::vector<Work> works(2);
  RunRanks(2, GetParam(), [&](Communicator& group) {
    if (group.index() == 0) works[0] = group.Barrier({});
    if (group.index() == 1) works[1] = group.Broadcast(Zeros({1}, DType::kF32), 0, {});
  });
  for (const Work& work : works) EXPECT_TRUE(absl::IsAborted(work.Await()));
}

// What came for them is not kept.
TEST(Groups, MayEndBeforeTheirPeersMakeThemAsOftenAsTheyLike) {
  RunRanks(2, "tcp", [](Communicator& world) {
    const Tensor data = Zeros({1}, DType::kF32);
    for (int i = 0; world.index() == 0 && i < 4200; ++i) {
      const std::unique_ptr<Communicator> group = *world.Split({0, 1});
      ASSERT_EQ(group->Send(data, 1, 0, {}).Await().ToString(), "OK");
      group->Abort(absl::CancelledError("enough"));
    }
    EXPECT_EQ(world.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
  });
}

// Whoever is killed cleans nothing up.
TEST(SharedMemory, HasNoNameThatCouldStayBehind) {
  RankProcesses ranks(RankOptions(0, 2, "auto", UniqueRendezvous()), ReduceForEver);
  for (int rank = 0; rank < 2; ++rank) ASSERT_EQ(ranks.Line(rank), "running");
  std::ifstream maps(absl::StrCat("/proc/", ranks.pid(0), "/maps"));
  int shared = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line[line.find(' ') + 4] != 's') continue;  // rw-s
    ++shared;
    EXPECT_THAT(line, AllOf(HasSubstr(" /memfd:"), HasSubstr(" (deleted)")));
  }
  EXPECT_GT(shared, 0);
}

TEST(OneRankDeathTest, ACommunicatorMayNotBeDestroyedByItsOwnCallback) {
  const auto destroy = [] {
    std::unique_ptr<Communicator> world = *ConnectWorld(WorldOptions());
    world->OnAbort([&](const absl::Status&) { world.reset(); });
    world->Abort(absl::CancelledError("enough"));
  };
  EXPECT_DEATH(destroy(), "a communicator is destroyed by its own OnAbort callback");
}

TEST(OneRank, NeedsNoNetworkAndCanAbort) {
  WorldOptions options;
  options.master_host = "nowhere.invalid";
  std::unique_ptr<Communicator> world = *ConnectWorld(options);
  const Tensor data = *world->Allocate({100}, DType::kF32);
  std::string cause;
  world->OnAbort([&](const absl::Status& status) { cause = status.ToString(); });
  EXPECT_TRUE(world->AllReduce(data, data, ReduceOp::kSum, {}).Done());
  world->Abort(absl::CancelledError("enough"));
  EXPECT_EQ(cause, "ABORTED: rank 0 aborted: enough");
  EXPECT_TRUE(absl::IsAborted(world->Barrier({}).Await()));
}

}  // namespace
}  // namespace shoal
