// Operations of a group over channels in one process: threads, order, ends.

#include "collectives/engine/executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "collectives/engine/arguments.h"
#include "collectives/engine/memory_channel.h"
#include "collectives/engine/planner.h"
#include "collectives/engine/routed_channel.h"
#include "collectives/transport/clock.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// How members reach each other.
enum class Layout : uint8_t {
  kOneChannel,
  kHostsOfOne,  // Over two channels in one: members of one host by the first, others by the second.
  kHostsOfTwo
};

class Network {
 public:
  Network(int members, Layout layout) : members_(members), layout_(layout), near_(members, 17), far_(members, 18) {}

  std::unique_ptr<Channel> Open(int member) {
    if (layout_ == Layout::kOneChannel) return near_.Open(member);
    const int per_host = layout_ == Layout::kHostsOfOne ? 1 : 2;
    std::vector<bool> on_host;
    for (int other = 0; other < members_; ++other) on_host.push_back(other / per_host == member / per_host);
    return std::make_unique<RoutedChannel>(std::move(on_host), near_.Open(member), far_.Open(member));
  }
  void End(const absl::Status& status) {
    near_.End(status);
    far_.End(status);
  }

 private:
  const int members_;
  const Layout layout_;
  MemoryNetwork near_, far_;
};

class Life final : public GroupLife {
 public:
  Life(std::vector<int> ranks, int index, Network* network) : GroupLife(1, std::move(ranks), index), network_(*network) {}
  absl::Status End(const std::string& cause) override {
    Finish(absl::AbortedError(cause));
    network_.End(status());
    return status();
  }

 private:
  Network& network_;
};

// One member of a group whose members are objects of this process.
class Member final : public ExecutorHost {
 public:
  Member(Network* network, int size, int index) : size_(size), index_(index), planner_(index, size), gone_(size) {
    std::vector<int> ranks(size);
    std::iota(ranks.begin(), ranks.end(), 0);
    life_ = std::make_shared<Life>(ranks, index, network);
    executor_ = std::make_shared<GroupExecutor>(network->Open(index), life_, this);
  }
  ~Member() override {
    if (executor_ == nullptr) return;
    if (!executor_->Idle()) (void)life_->End("closed");
    executor_->Close();
  }

  Work Issue(Operation op, absl::Duration timeout = absl::Seconds(30)) {
    SHOAL_CHECK_OK(CheckArguments(op, index_, size_));
    op.algorithm = "direct";
    op.deadline_ns = SteadyDeadlineNs(absl::Now() + timeout);
    return executor_->Push(std::move(op));
  }
  Work Sum(const Tensor& data, absl::Duration timeout = absl::Seconds(30), std::string label = "") {
    Operation op;
    op.kind = OpKind::kAllReduce;
    op.dtype = data.dtype();
    op.in = op.out = data;
    op.label = std::move(label);
    return Issue(std::move(op), timeout);
  }
  Work Barrier(absl::Duration timeout = absl::Seconds(30)) { return Issue(Operation(), timeout); }
  Work Broadcast(const Tensor& data, int root) {
    Operation op;
    op.kind = OpKind::kBroadcast;
    op.dtype = data.dtype();
    op.root = root;
    op.in = op.out = data;
    return Issue(std::move(op));
  }
  Work Transfer(OpKind kind, const Tensor& data, int peer, uint32_t tag) {
    Operation op;
    op.kind = kind;
    op.root = peer;
    op.tag = tag;
    (kind == OpKind::kSend ? op.in : op.out) = data;
    return Issue(std::move(op));
  }
  void SayLeft(int member) {
    gone_[member] = true;
    executor_->Wake();
  }
  GroupLife& life() { return *life_; }

  std::string Name(int member) override { return absl::StrCat("rank ", member); }
  std::string Names(const std::vector<int>& members) override {
    return absl::StrJoin(members, ", ", [](std::string* out, int m) { absl::StrAppend(out, "rank ", m); });
  }
  bool Left(int member) override { return gone_[member]; }
  absl::StatusOr<std::shared_ptr<const PreparedProgram>> Prepare(const Operation& op) override {
    return planner_.Find(op).program;
  }
  absl::StatusOr<std::byte*> Scratch(int64_t bytes) override {
    scratch_.resize(std::max<size_t>(scratch_.size(), bytes));
    return scratch_.data();
  }

 private:
  const int size_, index_;
  Planner planner_;
  std::vector<std::atomic<bool>> gone_;
  std::vector<std::byte> scratch_;
  std::shared_ptr<Life> life_;
  std::shared_ptr<GroupExecutor> executor_;
};

Tensor Filled(int64_t elements, float value) {
  const Tensor tensor = Zeros({elements}, DType::kF32);
  for (float& x : tensor.span<float>()) x = value;
  return tensor;
}

class Executor : public ::testing::TestWithParam<Layout> {
 protected:
  // One thread per member.
  static void RunMembers(int size, const std::function<void(Member&, int)>& body) {
    Network network(size, GetParam());
    std::vector<std::unique_ptr<Member>> members;
    for (int i = 0; i < size; ++i) members.push_back(std::make_unique<Member>(&network, size, i));
    std::vector<std::thread> threads;
    for (int i = 0; i < size; ++i) threads.emplace_back([&, i] { body(*members[i], i); });
    for (std::thread& thread : threads) thread.join();
  }
};

std::string NameOf(Layout layout) {
  if (layout == Layout::kOneChannel) return "OneChannel";
  return layout == Layout::kHostsOfOne ? "HostsOfOne" : "HostsOfTwo";
}

INSTANTIATE_TEST_SUITE_P(All, Executor, ::testing::Values(Layout::kOneChannel, Layout::kHostsOfOne, Layout::kHostsOfTwo),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(Executor, CollectivesRunInOrderWhoeverAwaits) {
  RunMembers(3, [](Member& member, int index) {
    std::vector<Tensor> data;
    std::vector<Work> works;
    for (int i = 0; i < 60; ++i) {
      data.push_back(Filled(i * 17, static_cast<float>(index + i)));
      works.push_back(member.Sum(data.back()));
    }
    for (int i = 59; i >= 0; --i) {
      ASSERT_EQ(works[i].Await().ToString(), "OK");
      for (float x : data[i].span<float>()) ASSERT_EQ(x, 3 * i + 3);
      if (i % 7 != 0) works.resize(i);
    }
  });
}

TEST_P(Executor, UnawaitedOperationsRunByThemselves) {
  RunMembers(2, [](Member& member, int) {
    for (int i = 0; i < 5; ++i) {
      const Tensor data = Filled(100, 1);
      const Work work = member.Sum(data);
      while (!work.Done()) std::this_thread::yield();
      ASSERT_EQ(data.data<float>()[99], 2.0f);
    }
  });
}

TEST_P(Executor, TransfersPassCollectivesAndEachOther) {
  RunMembers(2, [](Member& member, int index) {
    const int peer = 1 - index;
    const Tensor mine = Filled(1000, static_cast<float>(index + 1)), theirs = Filled(1000, 0), other = Filled(1000, 0);
    if (index == 0) {
      // The collective waits for the peer, which first wants a message that is sent behind it.
      const Work sum = member.Sum(Filled(10, 1));
      const Work receive = member.Transfer(OpKind::kReceive, theirs, peer, 5);
      EXPECT_EQ(member.Transfer(OpKind::kSend, mine, peer, 5).Await().ToString(), "OK");
      EXPECT_EQ(receive.Await().ToString(), "OK");
      EXPECT_EQ(sum.Await().ToString(), "OK");
      EXPECT_EQ(member.Transfer(OpKind::kSend, mine, peer, 6).Await().ToString(), "OK");
    } else {
      EXPECT_EQ(member.Transfer(OpKind::kReceive, theirs, peer, 5).Await().ToString(), "OK");
      const Work late = member.Transfer(OpKind::kReceive, other, peer, 6);
      EXPECT_EQ(member.Transfer(OpKind::kSend, mine, peer, 5).Await().ToString(), "OK");
      EXPECT_EQ(member.Sum(Filled(10, 1)).Await().ToString(), "OK");
      EXPECT_EQ(late.Await().ToString(), "OK");
      EXPECT_EQ(other.data<float>()[999], 1.0f);
    }
    EXPECT_EQ(theirs.data<float>()[999], static_cast<float>(peer + 1));
  });
}

// Within hosts and between them at once, in all directions.
TEST_P(Executor, EveryMemberTalksToEveryOther) {
  constexpr int kSize = 4;
  RunMembers(kSize, [](Member& member, int index) {
    for (int round = 0; round < 20; ++round) {
      const Tensor sum = Filled(1000, static_cast<float>(index));
      std::vector<Tensor> theirs(kSize);
      std::vector<Work> works = {member.Sum(sum)};
      for (int peer = 0; peer < kSize; ++peer) {
        if (peer == index) continue;
        theirs[peer] = Filled(100, -1);
        works.push_back(member.Transfer(OpKind::kReceive, theirs[peer], peer, round));
        works.push_back(member.Transfer(OpKind::kSend, Filled(100, static_cast<float>(10 * index + peer)), peer, round));
      }
      for (const Work& work : works) ASSERT_EQ(work.Await().ToString(), "OK");
      ASSERT_EQ(sum.data<float>()[999], 6.0f);
      for (int peer = 0; peer < kSize; ++peer) {
        if (peer != index) {
          ASSERT_EQ(theirs[peer].data<float>()[99], static_cast<float>(10 * peer + index));
        }
      }
    }
  });
}

TEST_P(Executor, MessagesOfOneTagComeInTheOrderOfSending) {
  RunMembers(2, [](Member& member, int index) {
    std::vector<Tensor> data;
    std::vector<Work> works;
    for (int i = 0; i < 40; ++i) {
      data.push_back(Filled(10, index == 0 ? static_cast<float>(i) : -1));
      works.push_back(member.Transfer(index == 0 ? OpKind::kSend : OpKind::kReceive, data.back(), 1 - index, i % 3));
    }
    for (const Work& work : works) ASSERT_EQ(work.Await().ToString(), "OK");
    for (int i = 0; i < 40; ++i) ASSERT_EQ(data[i].data<float>()[9], static_cast<float>(i));
  });
}

TEST_P(Executor, AwaitsWithDeadlinesLeaveTheOperationRunning) {
  RunMembers(2, [](Member& member, int index) {
    if (index == 1) {
      const Tensor data = Filled(1, 0);
      EXPECT_EQ(member.Transfer(OpKind::kReceive, data, 0, 1).Await().ToString(), "OK");
      EXPECT_EQ(member.Barrier().Await().ToString(), "OK");
      return;
    }
    const Work barrier = member.Barrier();
    EXPECT_TRUE(absl::IsDeadlineExceeded(barrier.Await(absl::Now() + absl::Milliseconds(10))));
    EXPECT_FALSE(barrier.Done());
    EXPECT_EQ(member.Transfer(OpKind::kSend, Filled(1, 1), 1, 1).Await().ToString(), "OK");
    EXPECT_EQ(barrier.Await().ToString(), "OK");
  });
}

TEST_P(Executor, ACloserDeadlineBehindCountsAndAllThatIsQueuedEnds) {
  Network network(2, GetParam());
  Member member(&network, 2, 0), silent(&network, 2, 1);
  const Work first = member.Sum(Filled(100, 1), absl::Seconds(1000), "norm");
  const Work transfer = member.Transfer(OpKind::kReceive, Filled(1, 1), 1, 3);
  const Work second = member.Barrier(absl::Milliseconds(20));
  EXPECT_THAT(second.Await().ToString(),
              AllOf(HasSubstr("ABORTED: barrier #2: "), HasSubstr("all_reduce \"norm\" #1: deadline passed: rank 1"),
                    Not(HasSubstr("rank 0"))));
  EXPECT_TRUE(absl::IsAborted(first.Await()));
  EXPECT_TRUE(absl::IsAborted(transfer.Await()));
  EXPECT_TRUE(absl::IsAborted(member.Barrier().Await()));
}

// Whoever waits only for a rank that waits itself does not blame that one.
TEST_P(Executor, AMissedDeadlineNamesWhoIsMissing) {
  for (int round = 0; round < 30; ++round) {
    RunMembers(4, [](Member& member, int index) {
      if (index == 2) return;
      const absl::Status status = member.Sum(Filled(5, 1), absl::Milliseconds(30), "norm").Await();
      EXPECT_THAT(status.ToString(), AllOf(HasSubstr("all_reduce \"norm\" #1: deadline passed: rank 2 had not arrived")));
    });
  }
}

TEST_P(Executor, AMissedDeadlineOfATransferNamesItsPeer) {
  Network network(3, GetParam());
  Member member(&network, 3, 0), one(&network, 3, 1), two(&network, 3, 2);
  const Work sum = member.Sum(Filled(100, 1), absl::Seconds(1000));
  Operation receive;
  receive.kind = OpKind::kReceive;
  receive.root = 2;
  receive.out = Filled(1, 1);
  EXPECT_THAT(member.Issue(std::move(receive), absl::Milliseconds(20)).Await().ToString(),
              AllOf(HasSubstr("deadline passed: rank 2 had not arrived"), Not(HasSubstr("rank 1"))));
  EXPECT_TRUE(absl::IsAborted(sum.Await()));
}

TEST(AwaitHabits, TellWhatIsLeftAlone) {
  Operation sum, other;
  sum.kind = OpKind::kAllReduce;
  sum.label = "norm";
  other.kind = OpKind::kReduceScatter;
  other.label = "grads";
  const size_t slot = AwaitHabits::SlotOf(sum);
  ASSERT_NE(slot, AwaitHabits::SlotOf(other));
  ASSERT_EQ(slot, AwaitHabits::SlotOf(sum));
  AwaitHabits habits;
  EXPECT_TRUE(habits.MustWake(slot));  // Unknown.
  habits.AwaitedAtOnce(slot);
  EXPECT_FALSE(habits.MustWake(slot));
  EXPECT_TRUE(habits.MustWake(AwaitHabits::SlotOf(other)));
  habits.LeftAlone(slot);
  for (int i = 0; i < 8; ++i) habits.AwaitedAtOnce(slot);
  EXPECT_TRUE(habits.MustWake(slot));  // Now and then awaited, now and then not.
  for (int i = 0; i < 8; ++i) habits.AwaitedAtOnce(slot);
  EXPECT_FALSE(habits.MustWake(slot));
}

// Threads change places as the driver whenever something has ended: what has ended belongs to one of them at a time.
TEST_P(Executor, CallbacksWhileOthersDriveLoseNothing) {
  RunMembers(2, [](Member& member, int index) {
    constexpr int kThreads = 3, kRounds = 200;
    std::atomic<int> called{0};
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kRounds; ++i) {
          const Tensor data = Filled(4, static_cast<float>(i));
          const Work work = member.Transfer(index == 0 ? OpKind::kSend : OpKind::kReceive, data, 1 - index, t);
          work.OnDone([&](const absl::Status&) {
            ++called;
            std::this_thread::yield();
          });
          ASSERT_EQ(work.Await().ToString(), "OK");
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    while (called < kThreads * kRounds) std::this_thread::yield();
  });
}

TEST_P(Executor, OtherOperationsAreNoticedAndBothAreNamed) {
  for (int64_t elements : {8, 1000, 100'000}) {
    Network network(2, GetParam());
    Member a(&network, 2, 0), b(&network, 2, 1);
    const Work one = a.Sum(Filled(elements, 1), absl::Seconds(30), "grads");
    const Work two = b.Broadcast(Filled(elements, 1), 0);
    const std::string text = one.Await().ToString() + two.Await().ToString();
    EXPECT_THAT(text, AllOf(HasSubstr("all_reduce"), HasSubstr("broadcast"), HasSubstr("not the same operation")));
  }
}

TEST_P(Executor, OtherSizesOfATransferAreNoticed) {
  Network network(2, GetParam());
  Member a(&network, 2, 0), b(&network, 2, 1);
  const Work send = a.Transfer(OpKind::kSend, Filled(10, 1), 1, 4);
  const Work receive = b.Transfer(OpKind::kReceive, Filled(11, 1), 0, 4);
  EXPECT_THAT(receive.Await().ToString(), HasSubstr("tag 4: rank 0 sends 40 bytes to rank 1, which expects 44"));
}

TEST_P(Executor, WaitingForAMemberThatLeftEndsTheGroup) {
  Network network(2, GetParam());
  Member a(&network, 2, 0), gone(&network, 2, 1);
  const Work work = a.Barrier();
  a.SayLeft(1);
  EXPECT_THAT(work.Await().ToString(), HasSubstr("rank 1 left"));
}

TEST_P(Executor, CallbacksMayIssueAndAwait) {
  RunMembers(2, [](Member& member, int) {
    std::atomic<int> done{0};
    const Tensor data = Filled(100, 1);
    member.Sum(data).OnDone([&](const absl::Status& status) {
      EXPECT_TRUE(status.ok());
      EXPECT_TRUE(member.Sum(data).Await().ok());
      member.Sum(data).OnDone([&](const absl::Status&) { ++done; });
    });
    while (done == 0) std::this_thread::yield();
    EXPECT_EQ(data.data<float>()[0], 8.0f);
  });
}

TEST_P(Executor, ManyThreadsAwaitDifferentOperations) {
  RunMembers(2, [](Member& member, int index) {
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 30; ++i) {
          const Tensor out = Filled(50, static_cast<float>(i)), in = Filled(50, -1);
          const Work receive = member.Transfer(OpKind::kReceive, in, 1 - index, t);
          ASSERT_EQ(member.Transfer(OpKind::kSend, out, 1 - index, t).Await().ToString(), "OK");
          ASSERT_EQ(receive.Await().ToString(), "OK");
          ASSERT_EQ(in.data<float>()[49], static_cast<float>(i));
        }
      });
    }
    for (int i = 0; i < 30; ++i) ASSERT_EQ(member.Barrier().Await().ToString(), "OK");
    for (std::thread& thread : threads) thread.join();
  });
}

}  // namespace
}  // namespace shoal
