// A communicator in use: many operations at once, groups and threads, callbacks, mistakes, memory.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "collectives/operation_checker.h"
#include "runtime/base/mutex.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Values;

class Usage : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Usage, Values("auto", "tcp"), [](const auto& info) { return info.param; });

TEST_P(Usage, ManyOperationsInFlightMayBeAwaitedInAnyOrder) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    constexpr int kOperations = 200;
    std::vector<Tensor> tensors;
    std::vector<Work> works;
    for (int i = 0; i < kOperations; ++i) {
      tensors.push_back(*group.Allocate({i * 11}, DType::kI64));
      std::fill_n(tensors[i].data<int64_t>(), i * 11, group.index() + i);
      works.push_back(group.AllReduce(tensors[i], tensors[i], ReduceOp::kSum, {}));
    }
    for (int i = kOperations - 1; i >= 0; --i) {
      ASSERT_EQ(works[i].Await().ToString(), "OK");
      for (int64_t value : tensors[i].span<int64_t>()) ASSERT_EQ(value, 3 * i + 3);
      if (i % 50 != 0) works.resize(i);
    }
  });
}

TEST_P(Usage, GroupsRunIndependentlyFromDifferentThreads) {
  RunRanks(4, GetParam(), [](Communicator& world) {
    const int me = world.index();
    const std::vector<int> pair = me < 2 ? std::vector<int>{0, 1} : std::vector<int>{2, 3};
    const std::vector<int> stripe = {me % 2, me % 2 + 2};
    std::unique_ptr<Communicator> pairs = *world.Split(pair);
    std::unique_ptr<Communicator> stripes = *world.Split(stripe);
    std::unique_ptr<Communicator> again = *world.Split(stripe);
    EXPECT_EQ(pairs->size(), 2);
    EXPECT_EQ(pairs->index(), me % 2);
    const auto work = [](Communicator* group, Place place, uint64_t seed) {
      Checker checker(*group, place);
      for (int i = 0; i < 40; ++i) {
        checker.AllReduce(i * 997, DType::kF32, ReduceOp::kSum, seed + i);
        checker.AllGather(UnevenCounts(group->size(), i * 500), DType::kI32, true, seed + i);
        checker.AllToAll(UnevenMatrix(group->size(), i * 300), DType::kBF16, seed + i);
      }
    };
    std::thread a(work, pairs.get(), Place::kShared, 1 + me / 2 * 1000);
    std::thread b(work, stripes.get(), Place::kPrivate, 2 + me % 2 * 1000);
    std::thread c(work, again.get(), Place::kMixed, 3 + me % 2 * 1000);
    work(&world, Place::kShared, 4);
    a.join();
    b.join();
    c.join();
  });
}

TEST_P(Usage, DifferentGroupsInDifferentOrderDoNotBlockEachOther) {
  RunRanks(2, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> other = *world.Split({0, 1});
    constexpr int64_t kElements = 1 << 20;
    const Tensor a = Zeros({kElements}, DType::kF32), b = Zeros({kElements}, DType::kF32);
    std::fill_n(a.data<float>(), kElements, 1.0f);
    std::fill_n(b.data<float>(), kElements, 2.0f);
    Communicator* first = world.index() == 0 ? &world : other.get();
    Communicator* second = world.index() == 0 ? other.get() : &world;
    const Work one = first->AllReduce(world.index() == 0 ? a : b, world.index() == 0 ? a : b, ReduceOp::kSum, {});
    const Work two = second->AllReduce(world.index() == 0 ? b : a, world.index() == 0 ? b : a, ReduceOp::kSum, {});
    EXPECT_EQ(two.Await().ToString(), "OK");
    EXPECT_EQ(one.Await().ToString(), "OK");
    EXPECT_EQ(a.data<float>()[kElements - 1], 2.0f);
    EXPECT_EQ(b.data<float>()[0], 4.0f);
  });
}

TEST_P(Usage, AGroupOfOneInsideALargerJobIsLocal) {
  RunRanks(2, GetParam(), [](Communicator& world) {
    std::unique_ptr<Communicator> self = *world.Split({world.index()});
    Checker checker(*self, Place::kShared);
    checker.AllReduce(1000, DType::kF32, ReduceOp::kSum, 1);
    checker.AllGather({1000}, DType::kF32, false, 1);
  });
}

TEST_P(Usage, BadArgumentsEndTheWorkAndNotTheEpoch) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor four = Zeros({4}, DType::kF32), two = Zeros({2}, DType::kF32),
                 ints = Zeros({2}, DType::kI32);
    const std::vector<Work> bad = {
        group.ReduceScatter(four, {2, 1}, two, ReduceOp::kSum, {}),
        group.ReduceScatter(four, {2, 2}, ints, ReduceOp::kSum, {}),
        group.ReduceScatter(four, {2, 2}, four.Elements(1, {2}), ReduceOp::kSum, {}),
        group.AllGather(two, {2, 2, 0}, four, {}),
        group.AllGather(two, {6, -2}, four, {}),
        group.AllGather(four.Elements(1, {2}), {2, 2}, four, {}),
        group.AllToAll(four, {2, 2}, four, {2, 2}, {}),
        group.Broadcast(four, 2, {}),
        group.AllReduce(four, two, ReduceOp::kSum, {}),
        group.AllReduce(four.Elements(0, {3}), four.Elements(1, {3}), ReduceOp::kSum, {}),
        group.AllReduce(ints, ints, ReduceOp::kSum, {.wire = WireFormat::kInt8}),
        group.AllReduce(four, four, ReduceOp::kSum, {.algorithm = "no such"}),
        group.AllReduce(four, four, ReduceOp::kSum, {.wire = WireFormat::kBf16, .algorithm = "fused"}),
        group.Reduce(four, four, -1, ReduceOp::kSum, {}),
        group.Gather(two, {1, 1}, four, 0, {}),
        group.Scatter(four, {3, 3}, two, 0, {}),
        group.Send(four, group.index(), 0, {}),
        group.Receive(four, 2, 0, {}),
        group.SparseAllGather({four}, {{0, 0, {0}}}, {}),
        group.SparseAllGather({four}, {{1, 0, {1}}}, {}),
    };
    for (const Work& work : bad) EXPECT_TRUE(absl::IsInvalidArgument(work.Await())) << work.Await();
    // Needs memory that peers can write to.
    const absl::Status fused = group.AllReduce(four, four, ReduceOp::kSum, {.algorithm = "fused"}).Await();
    EXPECT_TRUE(GetParam() == "tcp" ? absl::IsInvalidArgument(fused) : fused.ok()) << fused;
    EXPECT_FALSE(group.Split({1, 0}).ok());
    EXPECT_FALSE(group.Split({1 - group.index()}).ok());
    EXPECT_TRUE(group.status().ok());
    EXPECT_EQ(group.Barrier({}).Await().ToString(), "OK");
  });
}

TEST_P(Usage, DifferentOperationsEndTheEpochAndNameBoth) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({8}, DType::kF32);
    const absl::Status status = group.index() == 0
                                    ? group.AllReduce(data, data, ReduceOp::kSum, {.label = "grads"}).Await()
                                    : group.Broadcast(data, 0, {.label = "weights"}).Await();
    EXPECT_TRUE(absl::IsAborted(status)) << status;
    EXPECT_THAT(std::string(group.status().message()), HasSubstr("all_reduce"));
    EXPECT_THAT(std::string(group.status().message()), HasSubstr("broadcast"));
  });
}

TEST_P(Usage, AnEarlyDeadlineOfAwaitLeavesTheOperationRunning) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    std::unique_ptr<Communicator> side = *group.Split({0, 1});
    if (group.index() == 0) {
      const Work work = group.Barrier({});
      EXPECT_TRUE(absl::IsDeadlineExceeded(work.Await(absl::Now() + absl::Milliseconds(20))));
      EXPECT_FALSE(work.Done());
      EXPECT_TRUE(side->Barrier({}).Await().ok());  // Only now the other one comes.
      EXPECT_TRUE(work.Await().ok());
    } else {
      EXPECT_TRUE(side->Barrier({}).Await().ok());
      EXPECT_TRUE(group.Barrier({}).Await().ok());
    }
  });
}

TEST_P(Usage, CallbacksRunOnceAndMayIssueMore) {
  RunRanks(2, GetParam(), [](Communicator& group) {
    const Tensor data = Zeros({100}, DType::kF32);
    std::fill_n(data.data<float>(), 100, 1.0f);
    std::atomic<int> calls{0};
    Work second;
    Mutex mutex;
    CondVar done;
    group.AllReduce(data, data, ReduceOp::kSum, {}).OnDone([&](const absl::Status& status) {
      EXPECT_TRUE(status.ok());
      group.AllReduce(data, data, ReduceOp::kSum, {}).OnDone([&](const absl::Status& again) {
        EXPECT_TRUE(again.ok());
        MutexLock lock(&mutex);
        ++calls;
        done.NotifyAll();
      });
    });
    MutexLock lock(&mutex);
    while (calls == 0) done.Wait(&mutex);
    EXPECT_EQ(data.data<float>()[99], 4.0f);
  });
}

TEST(Allocate, TooMuchIsResourceExhaustedAndSaysHowMuch) {
  RunRanks(2, "auto", [](Communicator& group) {
    const absl::StatusOr<Tensor> tensor = group.Allocate({int64_t{1} << 43}, DType::kF32);
    EXPECT_TRUE(absl::IsResourceExhausted(tensor.status())) << tensor.status();
    EXPECT_THAT(std::string(tensor.status().message()), HasSubstr("35184372088832"));
    EXPECT_TRUE(group.Barrier({}).Await().ok());
  });
}

TEST(Allocate, MemoryIsZeroedAndOutlivesTheCommunicator) {
  std::vector<Tensor> kept(2);
  RunRanks(2, "auto", [&](Communicator& group) {
    for (int64_t elements : {0, 1, 1000, 1 << 20}) {
      const Tensor tensor = *group.Allocate({elements}, DType::kI64);
      for (int64_t value : tensor.span<int64_t>()) ASSERT_EQ(value, 0);
      kept[group.index()] = tensor;
    }
    std::fill_n(kept[group.index()].data<int64_t>(), 1 << 20, 7);
    EXPECT_TRUE(group.Barrier({}).Await().ok());
  });
  for (const Tensor& tensor : kept) {
    EXPECT_EQ(tensor.data<int64_t>()[0] + tensor.data<int64_t>()[(1 << 20) - 1], 14);
  }
}

// More than the descriptors that a process may have at a time would ever allow if they leaked.
TEST(Allocate, MemoryIsGivenBackHereAndAtThePeers) {
  RunRanks(2, "auto", [](Communicator& group) {
    for (int i = 0; i < 1500; ++i) {
      const Tensor tensor = *group.Allocate({100'000}, DType::kF32);
      tensor.data<float>()[99'999] = 1.0f;
      ASSERT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await().ToString(), "OK");
      ASSERT_EQ(tensor.data<float>()[99'999], 2.0f);
    }
  });
}

int OpenDescriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<int>(std::distance(begin(all), end(all)));
}

TEST_P(Usage, GroupsMakeNoConnectionsOfTheirOwn) {
  RunRanks(3, GetParam(), [](Communicator& world) {
    std::vector<std::unique_ptr<Communicator>> groups;
    const auto meet = [&] {
      for (const auto& group : groups) ASSERT_EQ(group->Barrier({}).Await().ToString(), "OK");
      ASSERT_EQ(world.Barrier({}).Await().ToString(), "OK");
    };
    groups.push_back(*world.Split({0, 1, 2}));
    meet();
    const int before = OpenDescriptors();  // Of all ranks, which are threads.
    meet();
    for (int i = 0; i < 20; ++i) groups.push_back(*world.Split({0, 1, 2}));
    meet();
    // What a group shares travels through descriptors that are closed when they have arrived.
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    int after = OpenDescriptors();  // Those with which other ranks count are among them.
    for (; after > before && absl::Now() < deadline; after = OpenDescriptors()) std::this_thread::yield();
    EXPECT_LE(after, before);
    meet();
  });
}

TEST(Split, GroupsMayComeAndGoManyTimes) {
  RunRanks(3, "auto", [](Communicator& world) {
    for (int i = 0; i < 400; ++i) {
      std::unique_ptr<Communicator> group = *world.Split({0, 1, 2});
      if (i % 7 == 0) {
        ASSERT_TRUE(group->Barrier({}).Await().ok());
      }
    }
  });
}

}  // namespace
}  // namespace shoal
