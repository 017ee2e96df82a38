// Collectives on device tensors between processes: on a GPU (SHOAL_TEST_DEVICE=cuda) that they share, or on those that there are by turns;
// otherwise each has an emulated one.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/device_mirror.h"
#include "collectives/backend/peer_group.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/backend/staged_group.h"
#include "collectives/operation_checker.h"
#include "runtime/base/status.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using kernels::testing::OnRealDevice;
using kernels::testing::TestDevice;

Device& DeviceOf(int rank) {
  if (!OnRealDevice()) return TestDevice();
  const absl::StatusOr<Device*> first = LoadDevice("cuda", 0);
  SHOAL_CHECK(first.ok()) << first.status().ToString();
  int32_t devices = 1;
  SHOAL_CHECK((*first)->StatusOf((*first)->api().count(&devices), "counting").ok());
  const absl::StatusOr<Device*> device = LoadDevice("cuda", rank % devices);
  SHOAL_CHECK(device.ok()) << device.status().ToString();
  return **device;
}

// A rank's part of a test.
using Body = std::function<void(std::unique_ptr<Communicator> host, Device& device)>;

std::unique_ptr<Communicator> All(Communicator& world) {
  std::vector<int> all(static_cast<size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  auto host = world.Split(all);
  SHOAL_CHECK(host.ok()) << host.status().ToString();
  return *std::move(host);
}

void OnRanks(int size, const Body& body) {
  RankProcesses ranks(RankOptions(0, size, "auto", UniqueRendezvous()), [&](Communicator& world, const RankProcesses::Say& say) {
    body(All(world), DeviceOf(world.index()));
    std::fflush(stdout);
    say(testing::Test::HasFailure() ? "failed" : "passed");
  });
  for (int rank = 0; rank < size; ++rank) EXPECT_EQ(ranks.Line(rank), "passed") << "rank " << rank;
}

enum class Way : uint8_t { kPeers, kStaged };

class Collectives : public testing::TestWithParam<std::tuple<Way, int>> {};
INSTANTIATE_TEST_SUITE_P(Gpu, Collectives, testing::Combine(testing::Values(Way::kPeers, Way::kStaged), testing::Values(1, 2, 4)),
                         [](const auto& info) {
                           const std::string way = std::get<0>(info.param) == Way::kPeers ? "Peers" : "Staged";
                           return absl::StrCat(way, std::get<1>(info.param));
                         });

TEST_P(Collectives, EqualTheReference) {
  const auto [way, size] = GetParam();
  OnRanks(size, [way = way](std::unique_ptr<Communicator> host, Device& device) {
    if (way == Way::kPeers) {
      const auto obstacle = FindPeerObstacle(*host, device, absl::Now() + absl::Seconds(60));
      ASSERT_TRUE(obstacle.ok()) << obstacle.status();
      ASSERT_EQ(*obstacle, "");
    }
    const auto group = way == Way::kPeers ? ConnectPeers(std::move(host), device) : StageThroughHost(std::move(host), device);
    ASSERT_TRUE(group.ok()) << group.status();
    const std::unique_ptr<Communicator> mirror = MirrorOnDevice(**group, device);
    for (const int64_t elements : {0, 37, 9001}) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI32}) {
        CheckDenseOperations(*mirror, Place::kShared, elements, dtype);
        Checker(*mirror, Place::kShared).Sparse(elements, dtype, 12);
      }
    }
    Checker(*mirror, Place::kShared).ManyInFlight(50);
    Checker(*mirror, Place::kShared).AllReduce(OnRealDevice() ? int64_t{5} << 20 : int64_t{5} << 14, DType::kF32, ReduceOp::kSum, 13);
    EXPECT_EQ((*group)->Barrier({}).Await(), absl::OkStatus());
  });
}

// Rank 1 is killed while the others use its memory again and again.
TEST(PeersOnGpu, AKilledProcessEndsTheGroupOfTheOthers) {
  constexpr int kSize = 3;
  RankProcesses ranks(RankOptions(0, kSize, "auto", UniqueRendezvous()), [](Communicator& world, const RankProcesses::Say& say) {
    Device& device = DeviceOf(world.index());
    auto group = ConnectPeers(All(world), device);
    const auto tensor = group.ok() ? (*group)->Allocate({int64_t{1} << 20}, DType::kF32) : group.status();
    absl::Status end = tensor.status();
    for (int round = 0; end.ok(); ++round) {
      end = (*group)->AllReduce(*tensor, *tensor, ReduceOp::kSum, {}).Await();
      if (round == 20) say("runs");
    }
    say(end.ToString());
  });
  for (int rank = 0; rank < kSize; ++rank) ASSERT_EQ(ranks.Line(rank), "runs");
  ranks.Signal(1, SIGKILL);
  for (const int rank : {0, 2}) {
    const std::string end = ranks.Line(rank);
    EXPECT_EQ(end.rfind("ABORTED", 0), 0u) << end;
    EXPECT_NE(end.find("rank 1"), std::string::npos) << end;
  }
}

}  // namespace
}  // namespace shoal
