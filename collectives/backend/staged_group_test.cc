#include "collectives/backend/staged_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "absl/strings/str_cat.h"
#include "collectives/operation_checker.h"
#include "runtime/base/mutex.h"
#include "runtime/device/fake_device.h"
#include "runtime/device/stream.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// Ranks that share a device; each has a group of all of them that is staged.
void RunStaged(int size, const FakeDeviceOptions& options, const std::function<void(Communicator&, Device&)>& body,
               const std::function<void(FakeDevice&)>& before = nullptr) {
  FakeDevice fake(options);
  auto device = Device::Create(fake.api(), 0);
  ASSERT_TRUE(device.ok()) << device.status();
  if (before != nullptr) before(fake);
  RunRanks(size, "auto", [&](Communicator& world) {
    std::vector<int> all(static_cast<size_t>(size));
    std::iota(all.begin(), all.end(), 0);
    auto host = world.Split(all);
    ASSERT_TRUE(host.ok()) << host.status();
    auto staged = StageThroughHost(std::move(*host), **device);
    ASSERT_TRUE(staged.ok()) << staged.status();
    body(**staged, **device);
  });
}

class StagedGroupTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, StagedGroupTest, ::testing::Values(1, 2, 3));

// The checker reads and writes tensors itself, so this device's memory is open to the host.
TEST_P(StagedGroupTest, OperationsEqualTheReference) {
  RunStaged(GetParam(), {.progress = FakeDeviceOptions::Progress::kByWaits, .protect = false}, [](Communicator& group, Device&) {
    for (const Place place : {Place::kShared, Place::kPrivate, Place::kMixed}) {
      for (const int64_t elements : {0, 1, 37, 9001}) {
        for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI32}) {
          CheckDenseOperations(group, place, elements, dtype);
          Checker(group, place).Sparse(elements, dtype, 12);
        }
      }
    }
  });
}

TEST_P(StagedGroupTest, TensorsStayOnTheDevice) {
  RunStaged(GetParam(), {.progress = FakeDeviceOptions::Progress::kByWaits}, [](Communicator& group, Device& device) {
    auto stream = device.NewStream();
    ASSERT_TRUE(stream.ok());
    const auto buffer = group.Allocate({4}, DType::kF32);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    const Tensor host = EmptyHost({4}, DType::kF32, **stream);
    for (int round = 0; round < 3; ++round) {
      for (int i = 0; i < 4; ++i) host.data<float>()[i] = static_cast<float>(100 * group.index() + 10 * round + i);
      Copy(host, *buffer, **stream);
      ASSERT_TRUE((*stream)->Wait().ok());
      EXPECT_EQ(group.AllReduce(*buffer, *buffer, ReduceOp::kSum, {}).Await(), absl::OkStatus());
      const auto result = Download(*buffer, **stream);
      ASSERT_TRUE(result.ok()) << result.status();
      const int n = group.size();
      for (int i = 0; i < 4; ++i) {
        EXPECT_EQ(result->data<float>()[i], static_cast<float>(100 * n * (n - 1) / 2 + n * (10 * round + i))) << round << " " << i;
      }
    }
  });
}

TEST(StagedGroup, ManyOperationsMayBeInFlight) {
  RunStaged(2, {.progress = FakeDeviceOptions::Progress::kByWaits, .protect = false}, [](Communicator& group, Device&) {
    Checker(group, Place::kShared).ManyInFlight(50);
  });
}

TEST(StagedGroup, ADeviceThatFailsEndsTheGroupOnAllRanks) {
  FakeDevice* fake = nullptr;
  RunStaged(
      2, {.protect = false},
      [&](Communicator& group, Device&) {
        const Tensor tensor = *group.Allocate({64}, DType::kF32);
        ASSERT_EQ(group.Barrier({}).Await(), absl::OkStatus());
        if (group.index() == 1) fake->FailCall("copy", 1, DeviceResult::Code::kFailed, "the bus is gone");
        // Rank 0 takes part only after the failure, so the failing copy is rank 1's.
        if (group.index() == 0) {
          const absl::Status end = group.Receive(tensor, 1, 7, {}).Await();
          EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
          EXPECT_THAT(std::string(end.message()), HasSubstr("the bus is gone"));
        } else {
          const absl::Status end = group.Send(tensor, 0, 7, {}).Await();
          EXPECT_EQ(end.code(), absl::StatusCode::kAborted) << end;
          EXPECT_THAT(std::string(end.message()), HasSubstr("the bus is gone"));
        }
        EXPECT_FALSE(group.status().ok());
      },
      [&](FakeDevice& device) { fake = &device; });
}

TEST(StagedGroup, ClosingEndsWhatIsPending) {
  RunStaged(2, {.protect = false}, [](Communicator& group, Device&) {
    auto inner = group.Split({0, 1});
    ASSERT_TRUE(inner.ok()) << inner.status();
    Work work;
    const Tensor tensor = *(*inner)->Allocate({8}, DType::kF32);
    ASSERT_EQ((*inner)->Barrier({}).Await(), absl::OkStatus());
    if (group.index() == 0) work = (*inner)->Receive(tensor, 1, 1, {});
    inner->reset();
    EXPECT_EQ(work.Await().code(), group.index() == 0 ? absl::StatusCode::kAborted : absl::StatusCode::kOk);
    EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  });
}

}  // namespace
}  // namespace shoal
