#include "collectives/engine/shm/tiny.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <cstring>
#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/engine/op.h"
#include "collectives/engine/shm/group_page.h"
#include "collectives/engine/shm/shm_ranks.h"

namespace shoal {
namespace {

// The tiny operations of all ranks, in one process.
struct TinyRanks {
  explicit TinyRanks(int size, int64_t timeout_ns = 60'000'000'000)
      : ranks(size), attended(size), gone(size) {
    for (int rank = 0; rank < size; ++rank) {
      TinyGroup::Hooks hooks;
      hooks.name = [](int member) { return absl::StrCat("rank ", member); };
      hooks.names = [](const std::vector<int>& members) {
        std::string names;
        for (int member : members) absl::StrAppend(&names, names.empty() ? "" : ", ", "rank ", member);
        return names;
      };
      hooks.left = [this](int member) { return gone[member].load(); };
      hooks.attend = [this, rank] { attended[rank].fetch_add(1); };
      groups.push_back(std::make_unique<TinyGroup>(ranks.groups[rank], timeout_ns, hooks));
    }
  }
  int size() const { return static_cast<int>(groups.size()); }

  ShmRanks ranks;
  std::vector<std::atomic<int>> attended;
  std::vector<std::atomic<bool>> gone;
  std::vector<std::unique_ptr<TinyGroup>> groups;
};

template <class T>
TinyOp Make(OpKind kind, const std::vector<T>& in, std::vector<T>* out, uint64_t seq = 1,
            uint32_t signature = 5) {
  TinyOp op;
  op.kind = kind;
  op.dtype = DTypeOf<T>::value;
  op.in = in.data();
  op.in_bytes = in.size() * sizeof(T);
  op.out = out->data();
  op.out_bytes = out->size() * sizeof(T);
  op.seq = seq;
  op.signature = signature;
  return op;
}

class TinySizes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, TinySizes, ::testing::Values(2, 3, 4, 17));

TEST_P(TinySizes, EveryOperationEqualsTheReference) {
  TinyRanks t(GetParam());
  const int n = t.size();
  OnThreads(n, [&](int rank) {
    TinyGroup& group = *t.groups[rank];
    uint64_t seq = 0;
    const auto run = [&](TinyOp op) {
      op.seq = ++seq;
      const absl::Status status = group.Issue(op).Await();
      EXPECT_TRUE(status.ok()) << status;
    };
    const auto value = [](int r, int i) { return r * 1000 + i; };
    for (const int elements : {0, 1, 3, 10, 11, 50, 1024 / n}) {
      std::vector<int32_t> in(elements), all(elements * n), out(elements), wide_in(elements * n),
          wide(elements * n);
      for (int i = 0; i < elements; ++i) in[i] = value(rank, i);
      for (int i = 0; i < elements * n; ++i) wide_in[i] = value(rank, i);
      run(Make(OpKind::kAllReduce, in, &out));
      for (int i = 0; i < elements; ++i) EXPECT_EQ(out[i], n * i + 1000 * n * (n - 1) / 2);
      TinyOp op = Make(OpKind::kAllReduce, in, &out);
      op.reduce = ReduceOp::kMax;
      run(op);
      for (int i = 0; i < elements; ++i) EXPECT_EQ(out[i], value(n - 1, i));
      run(Make(OpKind::kAllGather, in, &all));
      for (int i = 0; i < elements * n; ++i) EXPECT_EQ(all[i], value(i / elements, i % elements));
      run(Make(OpKind::kAllToAll, wide_in, &wide));
      for (int i = 0; i < elements * n; ++i)
        EXPECT_EQ(wide[i], value(i / elements, rank * elements + i % elements));
      op = Make(OpKind::kReduceScatter, wide_in, &out);
      op.part_begin_bytes = static_cast<int64_t>(rank) * elements * 4;
      run(op);
      for (int i = 0; i < elements; ++i)
        EXPECT_EQ(out[i], n * (rank * elements + i) + 1000 * n * (n - 1) / 2);
      run(TinyOp());  // Barrier.
      for (int root = 0; root < n; ++root) {
        std::vector<int32_t> data(elements), none;
        for (int i = 0; i < elements; ++i) data[i] = rank == root ? value(root, i) : -1;
        op = Make(OpKind::kBroadcast, rank == root ? data : none, &data);
        op.root = root;
        run(op);
        for (int i = 0; i < elements; ++i) EXPECT_EQ(data[i], value(root, i));
        op = Make(OpKind::kReduce, in, rank == root ? &out : &none);
        op.root = root;
        run(op);
        for (int i = 0; rank == root && i < elements; ++i) EXPECT_EQ(out[i], n * i + 1000 * n * (n - 1) / 2);
        op = Make(OpKind::kGather, in, rank == root ? &all : &none);
        op.root = root;
        run(op);
        for (int i = 0; rank == root && i < elements * n; ++i)
          EXPECT_EQ(all[i], value(i / elements, i % elements));
        op = Make(OpKind::kScatter, rank == root ? wide_in : none, &out);
        op.root = root;
        op.part_begin_bytes = static_cast<int64_t>(rank) * elements * 4;
        run(op);
        for (int i = 0; i < elements; ++i) EXPECT_EQ(out[i], value(root, rank * elements + i));
      }
    }
  });
}

TEST_P(TinySizes, ManyInFlightEndInOrder) {
  TinyRanks t(GetParam());
  constexpr int kCount = 200;
  OnThreads(t.size(), [&](int rank) {
    std::vector<std::vector<int64_t>> data(kCount);
    std::vector<Work> works;
    for (int i = 0; i < kCount; ++i) {
      data[i] = {i + rank, -i};
      works.push_back(t.groups[rank]->Issue(Make(OpKind::kAllReduce, data[i], &data[i], i + 1)));
    }
    if (rank % 2 == 0) {
      EXPECT_TRUE(works.back().Await().ok());
      for (const Work& work : works) EXPECT_TRUE(work.Done());
    } else {
      for (const Work& work : works) {
        while (!work.Done()) std::this_thread::yield();
      }
    }
    const int n = t.size();
    for (int i = 0; i < kCount; ++i)
      EXPECT_EQ(data[i], (std::vector<int64_t>{n * i + n * (n - 1) / 2, -i * n}));
  });
}

TEST(Tiny, SleepersAreWoken) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(2);
  std::thread late([&] {
    // Until the other one sleeps.
    while (t.ranks.groups[0]->Sleepers() == 0) std::this_thread::yield();
    EXPECT_TRUE(t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b)).Await().ok());
  });
  EXPECT_TRUE(t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a)).Await().ok());
  late.join();
  EXPECT_EQ(a[0], 3);
  EXPECT_EQ(b[0], 3);
}

TEST(Tiny, CallbacksRunOnceWhoeverLooks) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(2);
  std::atomic<int> calls{0};
  const Work work = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a));
  work.OnDone([&](const absl::Status& status) { calls += status.ok() ? 1 : 100; });
  EXPECT_EQ(t.attended[0], 1);
  EXPECT_TRUE(t.groups[0]->Poll());
  EXPECT_EQ(calls, 0);
  EXPECT_TRUE(t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b)).Await().ok());
  EXPECT_FALSE(t.groups[0]->Poll());
  EXPECT_EQ(calls, 1);
  work.OnDone([&](const absl::Status& status) { calls += status.ok() ? 1 : 100; });
  EXPECT_EQ(calls, 2);
}

TEST(Tiny, AnEarlyDeadlineOfAwaitLeavesTheOperationOpen) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(2);
  const Work work = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a));
  EXPECT_TRUE(absl::IsDeadlineExceeded(work.Await(absl::Now() + absl::Milliseconds(2))));
  EXPECT_FALSE(work.Done());
  EXPECT_TRUE(t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b)).Await().ok());
  EXPECT_TRUE(work.Await().ok());
  EXPECT_EQ(a[0], 3);
}

TEST(Tiny, OtherOperationsEndTheGroupAndNameBoth) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(2);
  const Work first = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a, 7, 100));
  const Work second = t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b, 7, 200));
  const absl::Status status = first.Await();
  EXPECT_TRUE(absl::IsAborted(status));
  EXPECT_NE(status.message().find("rank 0 is in all_reduce #7, rank 1 in"), std::string::npos) << status;
  EXPECT_TRUE(absl::IsAborted(second.Await()));
}

TEST(Tiny, MissedDeadlinesNameTheMissing) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(3);
  TinyOp op = Make(OpKind::kAllReduce, a, &a);
  op.deadline_ns = NowNs() + 3'000'000;
  op.label = "norm";
  const Work work = t.groups[0]->Issue(op);
  (void)t.groups[2]->Issue(Make(OpKind::kAllReduce, b, &b));
  const absl::Status status = work.Await();
  EXPECT_TRUE(absl::IsAborted(status));
  EXPECT_EQ(status.message(),
            "all_reduce \"norm\" #1: all_reduce \"norm\" #1: deadline passed: rank 1 had not arrived");
  (void)t.ranks.lives[2]->End("over");
}

TEST(Tiny, TheGroupsTimeoutBoundsOperationsWithoutADeadline) {
  std::vector<double> a = {1};
  TinyRanks t(2, /*timeout_ns=*/3'000'000);
  EXPECT_TRUE(absl::IsAborted(t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a)).Await()));
}

TEST(Tiny, WaitingForARankThatLeftEndsTheGroup) {
  std::vector<double> a = {1}, b = {2};
  TinyRanks t(2);
  (void)t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b, 1)).Done();
  t.gone[1] = true;
  EXPECT_TRUE(t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a, 1)).Await().ok())
      << "what it did before counts";
  const absl::Status status = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a, 2)).Await();
  EXPECT_TRUE(absl::IsAborted(status));
  EXPECT_NE(status.message().find("rank 1 left"), std::string::npos) << status;
  (void)t.ranks.lives[1]->End("over");
}

TEST(Tiny, AnEndOfTheGroupReachesWhoWaits) {
  for (const int who : {0, 1}) {
    std::vector<double> a = {1};
    TinyRanks t(2);
    std::thread end([&] {
      while (t.ranks.groups[0]->Sleepers() == 0) std::this_thread::yield();
      (void)t.ranks.lives[who]->End("rank 9 died");
    });
    const absl::Status status = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a)).Await();
    EXPECT_EQ(status, absl::AbortedError("all_reduce #1: rank 9 died"));
    end.join();
  }
}

TEST(Tiny, TheEndWaitsForThreadsThatAskForTheGroup) {
  std::vector<double> a = {1};
  std::atomic<bool> asking{false}, destroyed{false};
  ShmRanks ranks(2);
  TinyGroup::Hooks hooks;
  hooks.name = [](int member) { return absl::StrCat("rank ", member); };
  hooks.attend = [] {};
  hooks.left = [&](int) {
    asking = true;
    while (!ranks.lives[0]->Ended()) std::this_thread::yield();
    // As long as it takes others to go on, if they would.
    for (int i = 0; i < 1000; ++i) std::this_thread::yield();
    EXPECT_FALSE(destroyed);
    return true;
  };
  auto group = std::make_unique<TinyGroup>(ranks.groups[0], /*timeout_ns=*/60'000'000'000, hooks);
  std::thread waiter([&, work = group->Issue(Make(OpKind::kAllReduce, a, &a))] {
    EXPECT_EQ(work.Await(), absl::AbortedError("all_reduce #1: closed"));
  });
  while (!asking) std::this_thread::yield();
  (void)ranks.lives[0]->End("closed");
  group.reset();
  destroyed = true;
  waiter.join();
}

TEST(Tiny, HandlesOutliveTheGroup) {
  Work kept, failed;
  std::vector<double> a = {1}, b = {2};
  {
    TinyRanks t(2);
    kept = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a));
    (void)t.groups[1]->Issue(Make(OpKind::kAllReduce, b, &b)).Await();
    EXPECT_TRUE(kept.Await().ok());
    failed = t.groups[0]->Issue(Make(OpKind::kAllReduce, a, &a, 2));
    for (auto& life : t.ranks.lives) (void)life->End("closed");
  }
  EXPECT_TRUE(kept.Done());
  EXPECT_TRUE(kept.Await().ok());
  EXPECT_TRUE(absl::IsAborted(failed.Await()));
}

TEST(SharingCores, OneOfThreeThatWaitOnACoreMovesToAnEmptyOne) {
  cpu_set_t allowed;
  ASSERT_EQ(sched_getaffinity(0, sizeof allowed, &allowed), 0);
  if (CPU_COUNT(&allowed) < 2) GTEST_SKIP() << "one core";
  ShmRanks ranks(3);
  HostGroup& group = *ranks.groups[0];
  bool moved = false;
  for (int64_t now_ns = 1; !moved && now_ns < 100'000'000'000; now_ns += 1'000'000'000) {
    const int core = sched_getcpu();  // The system may move this thread now, but not each time.
    group.page(1).core = group.page(2).core = core + 1;
    group.WaitsHere(now_ns);
    moved = group.page(0).core != core + 1;
  }
  EXPECT_TRUE(moved);
  cpu_set_t after;
  ASSERT_EQ(sched_getaffinity(0, sizeof after, &after), 0);
  EXPECT_TRUE(CPU_EQUAL(&allowed, &after)) << "it may use fewer cores than before";
}

}  // namespace
}  // namespace shoal
