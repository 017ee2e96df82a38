#include "collectives/backend/peer_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/backend/device_mirror.h"
#include "collectives/backend/fake_sum.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/operation_checker.h"
#include "runtime/base/status.h"
#include "runtime/device/fake_device.h"
#include "runtime/device/stream.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// Ranks with a Device each, as processes have, on one or several fake ones.
class PeerJob {
 public:
  explicit PeerJob(int size, int devices = 1, const DeviceKernels& kernels = SumKernels())
      : size_(size),
        devices_(devices),
        fake_({.progress = FakeDeviceOptions::Progress::kByWaits, .devices = devices, .kernels = &kernels}) {}

  FakeDevice& fake() { return fake_; }

  // `body` has the world and a group of all ranks that a group of peers can be built on.
  using Body = std::function<void(Communicator& world, std::unique_ptr<Communicator> host, Device& device)>;
  void Run(const Body& body) {
    RunRanks(size_, "auto", [&](Communicator& world) {
      auto device = Device::Create(fake_.api(), world.index() % devices_);
      ASSERT_TRUE(device.ok()) << device.status();
      std::vector<int> all(static_cast<size_t>(size_));
      std::iota(all.begin(), all.end(), 0);
      auto host = world.Split(all);
      ASSERT_TRUE(host.ok()) << host.status();
      body(world, *std::move(host), **device);
    });
  }
  void RunConnected(const std::function<void(Communicator&, Device&)>& body) {
    Run([&](Communicator& world, std::unique_ptr<Communicator> host, Device& device) {
      auto group = ConnectPeers(std::move(host), device);
      ASSERT_TRUE(group.ok()) << group.status();
      body(**group, device);
      group->reset();
      EXPECT_EQ(world.Barrier({}).Await(), absl::OkStatus());
    });
  }

 private:
  const int size_, devices_;
  FakeDevice fake_;
};

class PeerGroupTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, PeerGroupTest, ::testing::Values(1, 2, 3, 5));

// On tensors that the host cannot touch.
void CheckAll(Communicator& group, Device& device, int64_t elements, DType dtype) {
  const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
  CheckDenseOperations(*mirror, Place::kShared, elements, dtype);
  Checker(*mirror, Place::kShared).Sparse(elements, dtype, 12);
}

TEST_P(PeerGroupTest, OperationsEqualTheReference) {
  PeerJob(GetParam()).RunConnected([](Communicator& group, Device& device) {
    for (const int64_t elements : {0, 1, 37, 9001}) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI32}) CheckAll(group, device, elements, dtype);
    }
    for (const DType dtype : {DType::kF64, DType::kI64, DType::kI8, DType::kU8}) CheckAll(group, device, 100, dtype);
  });
}

TEST_P(PeerGroupTest, RandomSequencesEqualTheReference) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  PeerJob(GetParam(), /*devices=*/2).RunConnected([&](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    Checker checker(*mirror, Place::kShared);
    std::mt19937 random(seed);
    const auto below = [&](int64_t end) { return static_cast<int64_t>(random() % static_cast<uint64_t>(end)); };
    for (uint64_t round = 0; round < 60; ++round) {
      const DType dtype = std::vector<DType>{DType::kF32, DType::kBF16, DType::kI8}[static_cast<size_t>(below(3))];
      const int64_t elements = below(below(2) == 0 ? 20 : 5000);
      std::vector<int64_t> counts;
      for (int rank = 0; rank < group.size(); ++rank) counts.push_back(below(3) == 0 ? 0 : below(700));
      const int root = static_cast<int>(below(group.size()));
      const bool in_place = below(2) == 0;
      switch (below(9)) {
        case 0: checker.AllReduce(elements, dtype, ReduceOp::kSum, round); break;
        case 1: checker.OutOfPlace(elements, dtype, ReduceOp::kSum, round); break;
        case 2: checker.ReduceScatter(counts, dtype, ReduceOp::kSum, in_place, round); break;
        case 3: checker.AllGather(counts, dtype, in_place, round); break;
        case 4: checker.Reduce(elements, dtype, ReduceOp::kSum, root, in_place, round); break;
        case 5: checker.Gather(counts, dtype, root, in_place, round); break;
        case 6: checker.Scatter(counts, dtype, root, in_place, round); break;
        case 7: checker.Sparse(elements, dtype, round); break;
        default: checker.Exchange(elements, dtype, round);
      }
    }
  });
}

TEST(PeerGroup, DevicesMayDiffer) {
  PeerJob(4, /*devices=*/3).RunConnected([](Communicator& group, Device& device) { CheckAll(group, device, 333, DType::kF32); });
}

// Buffers outside of the device, on some ranks: the operation is staged on all.
TEST_P(PeerGroupTest, TensorsElsewhereAreStaged) {
  PeerJob(GetParam()).RunConnected([](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    for (Communicator* own : {&group, group.index() % 2 == 0 ? mirror.get() : &group}) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI32}) {
        CheckDenseOperations(*own, Place::kPrivate, 500, dtype);
        Checker(*own, Place::kPrivate).Sparse(500, dtype, 12);
      }
    }
  });
}

// Values whose sum depends on the order.
TEST_P(PeerGroupTest, SumsAreInTheOrderOfRanksOnAllOfThem) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  const int n = GetParam();
  constexpr int64_t kElements = 2000;
  std::vector<std::vector<float>> values(static_cast<size_t>(n), std::vector<float>(kElements));
  std::mt19937 random(seed);
  for (std::vector<float>& own : values) {
    for (float& value : own) value = std::ldexp(static_cast<float>(random() % 4096) - 2048, static_cast<int>(random() % 20));
  }
  std::vector<float> want = values[0];
  for (int rank = 1; rank < n; ++rank) {
    for (size_t i = 0; i < want.size(); ++i) want[i] += values[static_cast<size_t>(rank)][i];
  }
  PeerJob(n).RunConnected([&](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    const Tensor tensor(values[static_cast<size_t>(group.index())].data(), {kElements}, DType::kF32);
    ASSERT_EQ(mirror->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
    EXPECT_EQ(std::vector<float>(tensor.data<float>(), tensor.data<float>() + kElements), want);
  });
}

TEST(PeerGroup, DataOfSumsAndCopiesStaysOnTheDevice) {
  PeerJob job(3);
  job.RunConnected([&](Communicator& group, Device&) {
    const Tensor floats = *group.Allocate({3000}, DType::kF32), ints = *group.Allocate({3000}, DType::kI64);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    const int64_t pinned = job.fake().Calls("allocate_host");
    EXPECT_EQ(group.AllReduce(floats, floats, ReduceOp::kSum, {}).Await(), absl::OkStatus());
    EXPECT_EQ(group.AllGather(ints.Elements(1000 * group.index(), {1000}), {1000, 1000, 1000}, ints, {}).Await(), absl::OkStatus());
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    EXPECT_EQ(job.fake().Calls("allocate_host"), pinned);
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    EXPECT_EQ(group.AllReduce(ints, ints, ReduceOp::kSum, {}).Await(), absl::OkStatus());
    EXPECT_GT(job.fake().Calls("allocate_host"), pinned) << "other types go through the host";
  });
}

TEST(PeerGroup, WhatPeersDoNotDoIsDoneThroughTheHost) {
  PeerJob(2).RunConnected([](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    const Tensor tensor = Zeros({4}, DType::kF32);
    const auto fill = [&] { std::fill_n(tensor.data<float>(), 4, static_cast<float>(2 + group.index())); };
    fill();
    EXPECT_EQ(mirror->AllReduce(tensor, tensor, ReduceOp::kAverage, {}).Await(), absl::OkStatus());
    EXPECT_EQ(tensor.data<float>()[3], 2.5f);
    fill();
    EXPECT_EQ(mirror->AllReduce(tensor, tensor, ReduceOp::kProduct, {}).Await(), absl::OkStatus());
    EXPECT_EQ(tensor.data<float>()[0], 6.0f);
    fill();
    EXPECT_EQ(mirror->AllReduce(tensor, tensor, ReduceOp::kSum, {.wire = WireFormat::kBf16}).Await(), absl::OkStatus());
    EXPECT_EQ(tensor.data<float>()[1], 5.0f);
    fill();
    EXPECT_EQ(mirror->AllReduce(tensor, tensor, ReduceOp::kSum, {.algorithm = "ring"}).Await(), absl::OkStatus());
    EXPECT_EQ(tensor.data<float>()[2], 5.0f);
    EXPECT_TRUE(absl::IsInvalidArgument(mirror->AllReduce(tensor, tensor, ReduceOp::kSum, {.algorithm = "magic"}).Await()));
    EXPECT_TRUE(absl::IsInvalidArgument(mirror->AllGather(tensor, {1, 1}, tensor, {}).Await()));
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus()) << "the group lives";
  });
}

TEST_P(PeerGroupTest, ManyOperationsMayBeInFlight) {
  PeerJob(GetParam()).RunConnected([](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    Checker(*mirror, Place::kShared).ManyInFlight(50);  // Staged: of i64.
    std::vector<Tensor> tensors;
    std::vector<Work> works;
    for (int i = 0; i < 60; ++i) {
      tensors.push_back(Zeros({100 + i}, DType::kF32));
      std::fill_n(tensors.back().data<float>(), 100 + i, static_cast<float>(i));
      const Tensor& tensor = tensors.back();
      works.push_back(i % 3 == 0 ? mirror->Broadcast(tensor, i % group.size(), {})
                                 : mirror->AllReduce(tensor, tensor, i % 3 == 1 ? ReduceOp::kSum : ReduceOp::kMax, {}));
    }
    for (size_t i = works.size(); i-- > 0;) {
      EXPECT_EQ(works[i].Await(), absl::OkStatus());
      EXPECT_EQ(tensors[i].data<float>()[99], static_cast<float>(i) * (i % 3 == 1 ? static_cast<float>(group.size()) : 1)) << i;
    }
  });
}

TEST(PeerGroup, MessagesPassCollectivesThatWait) {
  PeerJob(2).RunConnected([](Communicator& group, Device& device) {
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(group, device);
    const Tensor sum = Zeros({64}, DType::kF32), message = Zeros({8}, DType::kI32);
    Work work;
    if (group.index() == 0) {
      work = mirror->AllReduce(sum, sum, ReduceOp::kSum, {});
      EXPECT_EQ(mirror->Receive(message, 1, 5, {}).Await(), absl::OkStatus());
      EXPECT_EQ(message.data<int32_t>()[7], 42);
    } else {
      std::fill_n(message.data<int32_t>(), 8, 42);
      EXPECT_EQ(mirror->Send(message, 0, 5, {}).Await(), absl::OkStatus());
      work = mirror->AllReduce(sum, sum, ReduceOp::kSum, {});
    }
    EXPECT_EQ(work.Await(), absl::OkStatus());
  });
}

TEST(PeerGroup, MemoryIsOpenedOnceAndReused) {
  PeerJob job(2);
  job.RunConnected([&](Communicator& group, Device& device) {
    for (int round = 0; round < 100; ++round) {
      const Tensor tensor = *group.Allocate({100'000}, DType::kF32), other = *group.Allocate({1000}, DType::kBF16);
      ASSERT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
      ASSERT_EQ(group.Broadcast(other, 0, {}).Await(), absl::OkStatus());
    }
    EXPECT_EQ(device.memory().stats().in_use_bytes, 0);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    EXPECT_EQ(job.fake().Calls("export_memory"), 2);
    EXPECT_EQ(job.fake().Calls("open_memory"), 2);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  });
  EXPECT_EQ(job.fake().Calls("close_memory"), 2);
  EXPECT_EQ(job.fake().allocated_bytes(), 0);
}

TEST(PeerGroup, PartsOfAGroupLiveOnTheirOwn) {
  PeerJob(3).RunConnected([](Communicator& group, Device&) {
    const int me = group.index();
    const Tensor tensor = *group.Allocate({5}, DType::kF32);
    if (me != 1) {
      auto part = group.Split({0, 2});
      ASSERT_TRUE(part.ok()) << part.status();
      EXPECT_EQ((*part)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
      EXPECT_EQ((*part)->Barrier({}).Await(), absl::OkStatus());
      if (me == 0) (*part)->Abort(absl::CancelledError("the part alone"));
      EXPECT_TRUE(absl::IsAborted((*part)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await()));
    }
    EXPECT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
  });
}

// ---- Ends.

TEST(PeerGroup, AbortReachesAllRanks) {
  PeerJob(3).RunConnected([](Communicator& group, Device&) {
    const Tensor tensor = *group.Allocate({64}, DType::kF32);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    Work work, received;
    if (group.index() != 2) {
      work = group.AllReduce(tensor, tensor, ReduceOp::kSum, {.label = "grads"});
      received = group.Receive(tensor, 2, 1, {});
    } else {
      group.Abort(absl::CancelledError("enough"));
      work = received = group.AllReduce(tensor, tensor, ReduceOp::kSum, {.label = "grads"});
    }
    const absl::Status end = work.Await();
    EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
    EXPECT_THAT(std::string(end.message()), AllOf(HasSubstr("all_reduce \"grads\""), HasSubstr("enough")));
    EXPECT_TRUE(absl::IsAborted(received.Await()));
    EXPECT_FALSE(group.status().ok());
    EXPECT_TRUE(absl::IsAborted(group.Broadcast(tensor, 0, {}).Await()));
  });
}

// Counts down sums on all ranks; rank 0's group is aborted before the last.
std::atomic<int> g_sums_left = 0;
std::atomic<Communicator*> g_aborted = nullptr;

DeviceResult SumOrAbort(const DeviceTensor* from, int32_t count, const DeviceTensor& to, DeviceStream* stream) {
  if (--g_sums_left == 0) g_aborted.load()->Abort(absl::CancelledError("in the middle"));
  return SumKernels().sum_tensors(from, count, to, stream);
}

TEST(PeerGroup, AnAbortInTheMiddleOfAnOperationReachesAllRanks) {
  const DeviceKernels kernels = {.sum_tensors = &SumOrAbort};
  for (const int sums : {1, 2, 3, 4, 50}) {
    SCOPED_TRACE(absl::StrCat(sums, " sums"));
    g_sums_left = sums;
    PeerJob(3, 1, kernels).RunConnected([](Communicator& group, Device&) {
      if (group.index() == 0) g_aborted = &group;
      std::vector<Tensor> tensors;
      for (int i = 0; i < 4; ++i) tensors.push_back(*group.Allocate({1000}, DType::kF32));
      ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
      absl::Status end;
      while (end.ok()) {
        std::vector<Work> works;
        for (const Tensor& tensor : tensors) works.push_back(group.AllReduce(tensor, tensor, ReduceOp::kSum, {}));
        for (const Work& work : works) end.Update(work.Await());
      }
      EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
      EXPECT_THAT(std::string(end.message()), HasSubstr("in the middle"));
    });
  }
}

TEST(PeerGroup, ClosingEndsWhatIsPendingEverywhere) {
  PeerJob(3).RunConnected([](Communicator& group, Device&) { CheckClosingEndsWhatIsPending(group); });
}

// Rank 1 goes, with the memory that others have open, while they wait for it in an operation.
TEST(PeerGroup, AMemberThatIsGoneEndsTheGroup) {
  PeerJob job(3);
  const std::string rendezvous = UniqueRendezvous();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 3; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto device = Device::Create(job.fake().api(), 0);
      ASSERT_TRUE(device.ok()) << device.status();
      auto world = ConnectWorld(RankOptions(rank, 3, "auto", rendezvous));
      ASSERT_TRUE(world.ok()) << world.status();
      auto group = ConnectPeers(*std::move(world), **device);
      ASSERT_TRUE(group.ok()) << group.status();
      const Tensor tensor = *(*group)->Allocate({64}, DType::kBF16);
      ASSERT_EQ((*group)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
      ASSERT_EQ((*group)->Barrier({}).Await(), absl::OkStatus());
      if (rank == 1) return;
      const absl::Status end = (*group)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await();
      EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
      EXPECT_THAT(std::string(end.message()), HasSubstr("rank 1"));
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(job.fake().allocated_bytes(), 0);
}

TEST(PeerGroup, DifferentOperationsEndTheGroup) {
  for (const std::string what : {"length", "kind", "counts", "message"}) {
    PeerJob(2).RunConnected([&](Communicator& group, Device&) {
      const Tensor tensor = *group.Allocate({64}, DType::kF32), out = *group.Allocate({64}, DType::kF32);
      const int me = group.index();
      const Tensor half = tensor.Elements(0, {32});
      Work work;
      if (what == "length") work = group.AllReduce(me == 0 ? tensor : half, me == 0 ? tensor : half, ReduceOp::kSum, {});
      if (what == "kind") work = me == 0 ? group.Broadcast(tensor, 0, {}) : group.AllReduce(tensor, tensor, ReduceOp::kSum, {});
      const std::vector<int64_t> counts = {me == 0 ? 32 : 31, me == 0 ? 32 : 33};
      if (what == "counts") work = group.AllToAll(tensor, counts, out, counts, {});
      if (what == "message") work = me == 0 ? group.Send(tensor, 1, 9, {}) : group.Receive(half, 0, 9, {});
      const absl::Status end = work.Await(absl::Now() + absl::Seconds(30));
      EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << what << " " << end;
    });
  }
}

TEST(PeerGroup, AMissedDeadlineEndsTheGroup) {
  PeerJob(2).RunConnected([](Communicator& group, Device&) {
    const Tensor tensor = *group.Allocate({64}, DType::kF32);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    if (group.index() == 0) {
      const absl::Time soon = absl::Now() + absl::Milliseconds(20);
      const absl::Status end = group.AllReduce(tensor, tensor, ReduceOp::kSum, {.deadline = soon, .label = "late"}).Await();
      EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
    } else {
      // Ends with the group: nobody sends.
      EXPECT_EQ(group.Receive(tensor, 0, 3, {}).Await().code(), absl::StatusCode::kAborted);
    }
  });
}

// Several operations of all ways, one after the other; the first failure.
absl::Status UseAll(Communicator& group, const Tensor& in, const Tensor& part) {
  SHOAL_RETURN_IF_ERROR(group.AllReduce(in, in, ReduceOp::kSum, {}).Await());
  SHOAL_RETURN_IF_ERROR(group.ReduceScatter(in, {3, 7}, part, ReduceOp::kSum, {}).Await());
  const Work message = group.index() == 0 ? group.Send(in, 1, 1, {}) : group.Receive(in, 0, 1, {});
  SHOAL_RETURN_IF_ERROR(group.AllGather(part, {3, 7}, in, {}).Await());
  SHOAL_RETURN_IF_ERROR(message.Await());
  SHOAL_RETURN_IF_ERROR(group.AllReduce(in, in, ReduceOp::kMax, {}).Await());
  return group.Barrier({}).Await();
}

// Whatever call of the device fails: all ranks learn of it, or the operation finds another way; nothing hangs or is left.
TEST(PeerGroup, FailuresOfTheDeviceReachAllRanks) {
  for (const std::string function : {"open_memory", "copy", "kernel", "wait_stream", "export_memory"}) {
    for (int nth = 1; nth <= (function == "export_memory" ? 2 : 7); ++nth) {
      SCOPED_TRACE(absl::StrCat(function, " call ", nth));
      std::atomic<int> failed = 0;
      PeerJob job(2);
      job.RunConnected([&](Communicator& group, Device&) {
        const Tensor in = *group.Allocate({10}, DType::kF32), part = *group.Allocate({group.index() == 0 ? 3 : 7}, DType::kF32);
        ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
        if (group.index() == 0) job.fake().FailCall(function, nth, DeviceResult::Code::kFailed, "told to fail");
        ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
        absl::Status end;
        for (int round = 0; end.ok() && round < 3; ++round) end = UseAll(group, in, part);
        if (end.ok()) return;
        ++failed;
        EXPECT_THAT(std::string(end.message()), HasSubstr("told to fail"));
      });
      const bool not_reached = function == "open_memory" && nth > 2;  // Once on each rank.
      EXPECT_EQ(failed, function == "export_memory" || not_reached ? 0 : 2);
    }
  }
}

TEST(FindPeerObstacle, SaysWhichRankCannotDoWhat) {
  for (const std::string function : {"", "export_memory", "open_memory", "create_stream"}) {
    PeerJob job(3);
    if (!function.empty()) job.fake().FailCall(function, 2, DeviceResult::Code::kFailed, "not in this container");
    Mutex mutex;
    std::vector<std::string> found;
    job.Run([&](Communicator&, std::unique_ptr<Communicator> host, Device& device) {
      const auto obstacle = FindPeerObstacle(*host, device, absl::Now() + absl::Seconds(60));
      ASSERT_TRUE(obstacle.ok()) << obstacle.status();
      const MutexLock lock(&mutex);
      found.push_back(*obstacle);
    });
    ASSERT_EQ(found.size(), 3u);
    EXPECT_EQ(found[0], found[1]);
    EXPECT_EQ(found[0], found[2]);
    EXPECT_THAT(found[0], function.empty() ? testing::IsEmpty() : testing::Matcher<std::string>(HasSubstr("not in this container")));
    if (function == "open_memory") {
      EXPECT_THAT(found[0], HasSubstr("cannot read memory of rank"));
    }
    if (function == "export_memory") {
      EXPECT_THAT(found[0], HasSubstr("cannot share its memory"));
    }
  }
}

}  // namespace
}  // namespace shoal
