#include "collectives/backend/nccl_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/backend/fake_nccl.h"
#include "collectives/backend/fake_sum.h"
#include "collectives/operation_checker.h"
#include "runtime/base/status.h"
#include "runtime/device/fake_device.h"
#include "runtime/device/stream.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Ranks with a device of their own each, and what is beneath them.
class NcclJob {
 public:
  explicit NcclJob(int size, int devices = 0)
      : size_(size),
        devices_(devices == 0 ? size : devices),
        device_({.devices = devices_, .protect = false, .kernels = &SumKernels()}),
        nccl_(device_) {}
  ~NcclJob() { EXPECT_THAT(nccl_.Faults(), IsEmpty()); }

  FakeNccl& nccl() { return nccl_; }

  // `body` has the world, a group of all ranks that a group of NCCL can be built on, and the rank's device.
  using Body = std::function<void(Communicator& world, std::unique_ptr<Communicator> host, Device& device)>;
  void Run(const Body& body) {
    RunRanks(size_, "auto", [&](Communicator& world) {
      auto device = Device::Create(nccl_.device_api(), world.index() % devices_);
      ASSERT_TRUE(device.ok()) << device.status();
      std::vector<int> all(static_cast<size_t>(size_));
      std::iota(all.begin(), all.end(), 0);
      auto host = world.Split(all);
      ASSERT_TRUE(host.ok()) << host.status();
      body(world, *std::move(host), **device);
    });
  }
  // With a group that is connected.
  void RunConnected(const std::function<void(Communicator&)>& body) {
    Run([&](Communicator& world, std::unique_ptr<Communicator> host, Device& device) {
      auto group = ConnectNccl(std::move(host), device, nccl_.api());
      EXPECT_TRUE(group.ok()) << group.status();
      if (group.ok()) body(**group);
      if (group.ok()) group->reset();
      EXPECT_EQ(world.Barrier({}).Await(), absl::OkStatus());
    });
  }

 private:
  const int size_, devices_;
  FakeDevice device_;
  FakeNccl nccl_;
};

class NcclGroupTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, NcclGroupTest, ::testing::Values(1, 2, 3));

TEST_P(NcclGroupTest, OperationsEqualTheReference) {
  NcclJob(GetParam()).RunConnected([](Communicator& group) {
    for (const int64_t elements : {0, 1, 37, 9001}) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI32}) {
        CheckDenseOperations(group, Place::kShared, elements, dtype);
        if (dtype != DType::kI32) Checker(group, Place::kShared).Sparse(elements, dtype, 12);
      }
    }
  });
}

TEST(NcclGroup, AveragesAndProducts) {
  NcclJob(2).RunConnected([](Communicator& group) {
    const Tensor tensor = *group.Allocate({3}, DType::kF32);
    const auto fill = [&] { std::fill_n(tensor.data<float>(), 3, static_cast<float>(2 + group.index())); };
    fill();
    ASSERT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kAverage, {}).Await(), absl::OkStatus());
    EXPECT_THAT(tensor.span<float>(), ElementsAre(2.5f, 2.5f, 2.5f));
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    fill();
    ASSERT_EQ(group.AllReduce(tensor, tensor, ReduceOp::kProduct, {}).Await(), absl::OkStatus());
    EXPECT_THAT(tensor.span<float>(), ElementsAre(6, 6, 6));
  });
}

TEST(NcclGroup, RefusesWhatNcclDoesNotHaveAndGoesOn) {
  NcclJob(2).RunConnected([](Communicator& group) {
    const Tensor floats = *group.Allocate({4}, DType::kF32), ints = *group.Allocate({4}, DType::kI32);
    EXPECT_THAT(group.AllReduce(floats, floats, ReduceOp::kSum, {.wire = WireFormat::kBf16}).Await().ToString(),
                HasSubstr("INVALID_ARGUMENT: all_reduce: NCCL sends elements as they are"));
    EXPECT_THAT(group.AllReduce(floats, floats, ReduceOp::kSum, {.label = "loss", .algorithm = "ring"}).Await().ToString(),
                HasSubstr("all_reduce \"loss\": NCCL chooses algorithms itself: none is called ring"));
    EXPECT_THAT(std::string(group.AllReduce(floats, floats, ReduceOp::kSum, {.order = Order::kFixed}).Await().message()),
                HasSubstr("NCCL adds in an order of its own"));
    const std::vector<SparseMove> moves = {{.chunk = 0, .owner = 0, .holders = {1}}};
    EXPECT_THAT(group.SparseReduceScatter({ints}, moves, ReduceOp::kSum, {}).Await().ToString(), HasSubstr("sums f32 or bf16"));
    EXPECT_THAT(group.SparseReduceScatter({floats}, moves, ReduceOp::kMax, {}).Await().ToString(), HasSubstr("sums f32 or bf16"));
    EXPECT_TRUE(absl::IsInvalidArgument(group.AllGather(floats, {1, 1}, floats, {}).Await()));
    EXPECT_EQ(group.AllReduce(floats, floats, ReduceOp::kSum, {}).Await(), absl::OkStatus());
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  });
}

TEST(NcclGroup, ManyOperationsMayBeInFlight) {
  NcclJob(2).RunConnected([](Communicator& group) {
    Checker(group, Place::kShared).ManyInFlight(50);
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  });
}

// An operation that not all ranks have issued is ended by Abort, and NCCL's communicator once on each rank.
TEST(NcclGroup, AbortReachesAllRanks) {
  NcclJob job(3);
  job.RunConnected([](Communicator& group) {
    const Tensor tensor = *group.Allocate({64}, DType::kF32);
    ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
    Work work;
    if (group.index() != 2) {
      work = group.AllReduce(tensor, tensor, ReduceOp::kSum, {.label = "grads"});
    } else {
      group.Abort(absl::CancelledError("enough"));
      work = group.AllReduce(tensor, tensor, ReduceOp::kSum, {.label = "grads"});
    }
    const absl::Status end = work.Await();
    EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
    EXPECT_THAT(std::string(end.message()), AllOf(HasSubstr("all_reduce \"grads\""), HasSubstr("enough")));
    EXPECT_FALSE(group.status().ok());
    EXPECT_TRUE(absl::IsAborted(group.Broadcast(tensor, 0, {}).Await()));
  });
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(job.nccl().Calls("abort", rank), 1) << rank;
  EXPECT_EQ(job.nccl().Calls("destroy", 0), 0);
}

TEST(NcclGroup, ClosingDestroysPolitely) {
  NcclJob job(2);
  job.RunConnected([](Communicator& group) { EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus()); });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(job.nccl().Calls("destroy", rank), 1);
    EXPECT_EQ(job.nccl().Calls("abort", rank), 0);
  }
}

TEST(NcclGroup, ClosingEndsWhatIsPendingEverywhere) {
  NcclJob(3).RunConnected([](Communicator& group) { CheckClosingEndsWhatIsPending(group); });
}

// Rank 1's group ends with its connections while the others wait for it in an operation.
TEST(NcclGroup, AMemberThatIsGoneEndsTheGroup) {
  NcclJob job(3);
  const std::string rendezvous = UniqueRendezvous();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 3; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto device = Device::Create(job.nccl().device_api(), rank);
      ASSERT_TRUE(device.ok()) << device.status();
      auto world = ConnectWorld(RankOptions(rank, 3, "auto", rendezvous));
      ASSERT_TRUE(world.ok()) << world.status();
      auto group = ConnectNccl(*std::move(world), **device, job.nccl().api(), {.close_timeout = absl::Milliseconds(1)});
      ASSERT_TRUE(group.ok()) << group.status();
      const Tensor tensor = *(*group)->Allocate({64}, DType::kBF16);
      ASSERT_EQ((*group)->Barrier({}).Await(), absl::OkStatus());
      if (rank == 1) return;
      const absl::Status end = (*group)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await();
      EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
      EXPECT_THAT(std::string(end.message()), HasSubstr("rank 1"));
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(job.nccl().Calls("abort", rank), 1) << rank;
}

TEST(NcclGroup, DifferentOperationsEndTheGroup) {
  NcclJob(2).RunConnected([](Communicator& group) {
    const Tensor tensor = *group.Allocate({64}, DType::kF32), half = tensor.Elements(0, {32});
    const Tensor& own = group.index() == 0 ? tensor : half;
    const absl::Status end = group.AllReduce(own, own, ReduceOp::kSum, {}).Await(absl::Now() + absl::Seconds(10));
    EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
    EXPECT_THAT(std::string(end.message()), HasSubstr("have issued another operation"));
  });
}

TEST(NcclGroup, AMissedDeadlineEndsTheGroup) {
  NcclJob(2).RunConnected([](Communicator& group) {
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

TEST(NcclGroup, PartsOfAGroupLiveOnTheirOwn) {
  NcclJob(3).RunConnected([](Communicator& group) {
    const int me = group.index();
    const Tensor tensor = *group.Allocate({5}, DType::kI64);
    for (int64_t& value : tensor.span<int64_t>()) value = me + 1;
    if (me != 1) {
      auto part = group.Split({0, 2});
      ASSERT_TRUE(part.ok()) << part.status();
      EXPECT_EQ((*part)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
      EXPECT_EQ(tensor.data<int64_t>()[4], 4);
      EXPECT_EQ((*part)->Barrier({}).Await(), absl::OkStatus());
      if (me == 0) (*part)->Abort(absl::CancelledError("the part alone"));
      EXPECT_TRUE(absl::IsAborted((*part)->AllReduce(tensor, tensor, ReduceOp::kSum, {}).Await()));
    }
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  });
}

TEST(NcclGroup, RanksThatShareADeviceAreRefused) {
  NcclJob job(3, /*devices=*/2);
  job.Run([&](Communicator&, std::unique_ptr<Communicator> host, Device& device) {
    const absl::Status refused = ConnectNccl(std::move(host), device, job.nccl().api()).status();
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(refused.message()),
                AllOf(HasSubstr("ranks 0 and 2 share the device fake-0"), HasSubstr("StageThroughHost")));
  });
  EXPECT_EQ(job.nccl().Calls("connect", 0), 0);
}

TEST(NcclGroup, ADeviceWithoutPlugInHasNoNccl) {
  FakeDevice fake;
  const auto device = Device::Create(fake.api(), 0);
  ASSERT_TRUE(device.ok());
  EXPECT_EQ(LoadNccl(**device).status().code(), absl::StatusCode::kNotFound);
}

// An operation after the other, with all of the calls below; the first failure.
absl::Status UseAll(Communicator& group) {
  SHOAL_ASSIGN_OR_RETURN(const Tensor in, group.Allocate({10}, DType::kF32));
  SHOAL_ASSIGN_OR_RETURN(const Tensor part, group.Allocate({group.index() == 0 ? 3 : 7}, DType::kF32));
  SHOAL_RETURN_IF_ERROR(group.AllReduce(in, in, ReduceOp::kSum, {}).Await());
  SHOAL_RETURN_IF_ERROR(group.ReduceScatter(in, {3, 7}, part, ReduceOp::kSum, {}).Await());
  return group.AllGather(part, {3, 7}, in, {}).Await();
}

// Whatever call fails on whichever rank: all ranks learn of it, and nothing hangs or is left.
TEST(NcclGroup, FailuresOfAnyCallEndTheGroup) {
  for (const std::string function : {"unique_id", "connect", "progress", "broadcast", "reduce", "all_reduce", "group_end"}) {
    for (const int nth : {1, 2, 3}) {
      for (const int rank : {0, 1}) {
        if (function == "unique_id" && (rank == 1 || nth > 1)) continue;
        if (function == "connect" && nth > 1) continue;
        SCOPED_TRACE(absl::StrCat(function, " call ", nth, " of rank ", rank));
        NcclJob job(2);
        job.nccl().FailCall(function, rank, nth);
        job.Run([&](Communicator&, std::unique_ptr<Communicator> host, Device& device) {
          auto group = ConnectNccl(std::move(host), device, job.nccl().api());
          absl::Status end = group.status();
          for (int round = 0; end.ok() && round < 3; ++round) end = UseAll(**group);
          EXPECT_FALSE(end.ok());
          EXPECT_THAT(std::string(end.message()), HasSubstr("told to fail in"));
        });
      }
    }
  }
}

}  // namespace
}  // namespace shoal
