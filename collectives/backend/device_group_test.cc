#include "collectives/backend/device_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>

#include "collectives/backend/fake_nccl.h"
#include "collectives/backend/fake_sum.h"
#include "collectives/operation_checker.h"
#include "runtime/device/fake_device.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

// What is wanted, for the life of one of these.
class Wanted {
 public:
  explicit Wanted(const std::string& kind) { setenv("SHOAL_DEVICE_GROUP", kind.c_str(), 1); }
  ~Wanted() { unsetenv("SHOAL_DEVICE_GROUP"); }
};

struct Case {
  std::string wanted;
  int devices = 2;
  bool library_missing = false;  // NCCL's, on rank 1.
  bool closed = false;           // Device memory cannot be opened by others.
  std::string kind;              // Of the group; "": there is none.
  std::string why;
};

std::string KindOf(Communicator& group, FakeDevice& device, FakeNccl& nccl) {
  const int64_t calls = nccl.Calls("all_reduce", group.index()), pinned = device.Calls("allocate_host");
  const absl::StatusOr<Tensor> tensor = group.Allocate({100}, DType::kF32);
  EXPECT_TRUE(tensor.ok()) << tensor.status();
  EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  const int64_t pins = device.Calls("pin");
  EXPECT_EQ(group.AllReduce(*tensor, *tensor, ReduceOp::kSum, {}).Await(), absl::OkStatus());
  EXPECT_EQ(group.Barrier({}).Await(), absl::OkStatus());
  if (nccl.Calls("all_reduce", group.index()) > calls) return "nccl";
  return pins > 0 || device.Calls("allocate_host") > pinned ? "staged" : "peers";
}

void Check(const Case& c) {
  SCOPED_TRACE(c.wanted + " of " + c.kind);
  const Wanted wanted(c.wanted);
  FakeDevice fake({.devices = c.devices, .protect = false, .kernels = &SumKernels()});
  FakeNccl nccl(fake);
  if (c.closed) fake.FailCall("open_memory", 1, DeviceResult::Code::kFailed, "no peer access");
  RunRanks(2, "auto", [&](Communicator& world) {
    auto device = Device::Create(nccl.device_api(), world.index() % c.devices);
    ASSERT_TRUE(device.ok()) << device.status();
    auto host = world.Split({0, 1});
    ASSERT_TRUE(host.ok()) << host.status();
    absl::StatusOr<const NcclApi*> api = &nccl.api();
    if (c.library_missing && world.index() == 1) api = absl::UnavailableError("NCCL is missing");
    auto group = DeviceGroup(*std::move(host), **device, api);
    if (c.kind.empty()) {
      EXPECT_THAT(group.status().ToString(), HasSubstr(c.why));
    } else {
      ASSERT_TRUE(group.ok()) << group.status();
      EXPECT_EQ(KindOf(**group, fake, nccl), c.kind);
    }
    EXPECT_EQ(world.Barrier({}).Await(), absl::OkStatus());
  });
}

TEST(DeviceGroup, IsTheFirstThatRanksCanHave) {
  Check({.kind = "nccl"});
  Check({.devices = 1, .kind = "peers"});
  Check({.library_missing = true, .kind = "peers"});
  Check({.devices = 1, .closed = true, .kind = "staged"});
}

TEST(DeviceGroup, IsWhatTheEnvironmentSays) {
  Check({.wanted = "nccl", .kind = "nccl"});
  Check({.wanted = "peers", .kind = "peers"});
  Check({.wanted = "staged", .kind = "staged"});
}

TEST(DeviceGroup, SaysWhyTheEnvironmentCannotHaveItsWay) {
  Check({.wanted = "nccl", .devices = 1, .why = "FAILED_PRECONDITION: SHOAL_DEVICE_GROUP is 'nccl': ranks 0 and 1 share the device"});
  Check({.wanted = "peers", .closed = true, .why = "no peer access"});
  Check({.wanted = "pears", .why = "INVALID_ARGUMENT: SHOAL_DEVICE_GROUP is 'pears', want nccl, peers or staged"});
}

}  // namespace
}  // namespace shoal
