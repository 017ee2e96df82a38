#include "launch/bench/peers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_join.h"

namespace shoal {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pair;

const BenchCase kShm = {"all_reduce", "shm", 4, 0.5, true};

std::string Line(const PeerCommand& command) { return absl::StrJoin(command.argv, " "); }

TEST(PeerContenders, EachMpiRunsTwiceAndGlooWithEachAlgorithm) {
  std::vector<std::string> names;
  for (const Contender& peer : PeerContenders({"mpich", "gloo"}, "broadcast")) {
    names.push_back(peer.library + " " + peer.algorithm);
  }
  EXPECT_THAT(names, ::testing::ElementsAre("mpich ", "mpich_warm ", "gloo default", "gloo c_one_to_all"));
}

TEST(CommandOf, GivesThePeerOperationTimeAndSizes) {
  EXPECT_EQ(Line(CommandOf({"mpich", ""}, kShm, {8, 64}, "/p")),
            "mpirun.mpich -n 4 /p/mpi_bench_mpich all_reduce default 0.5 1 8 64");
  EXPECT_EQ(Line(CommandOf({"gloo", "ring"}, kShm, {8}, "/p")), "/p/gloo_bench 4 all_reduce ring 0.5 8");
}

TEST(CommandOf, LimitsLieBesideThePeers) {
  EXPECT_EQ(Line(CommandOf({"limit", ""}, kShm, {8}, "/p/q")), "/p/q/../bench_limits shm all_reduce 4 0.5 8");
}

TEST(CommandOf, WarmKeepsTheAllocatorsMemory) {
  const PeerCommand warm = CommandOf({"openmpi_warm", ""}, kShm, {8}, "/p");
  EXPECT_THAT(Line(warm), HasSubstr("mpi_bench_openmpi all_reduce warm"));
  EXPECT_THAT(warm.environment, Contains(Pair("MALLOC_MMAP_MAX_", "0")));
  EXPECT_THAT(CommandOf({"openmpi", ""}, kShm, {8}, "/p").environment,
              Not(Contains(Pair("MALLOC_MMAP_MAX_", "0"))));
}

TEST(CommandOf, TcpKeepsMpiFromSharedMemory) {
  BenchCase tcp = kShm;
  tcp.transport = "tcp";
  EXPECT_THAT(Line(CommandOf({"openmpi", ""}, tcp, {8}, "/p")), HasSubstr("--mca btl tcp,self"));
  EXPECT_THAT(CommandOf({"mpich", ""}, tcp, {8}, "/p").environment, Contains(Pair("UCX_TLS", "tcp,self")));
}

TEST(CheckPeers, SaysWhatToInstall) {
  const absl::Status missing = CheckPeers({"gloo"}, "/nowhere");
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("apt-get install libgloo-dev"));
  EXPECT_THAT(std::string(missing.message()), HasSubstr("tests/bench/peers/build /nowhere"));
  EXPECT_EQ(CheckPeers({"nccl"}, "/nowhere").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(CheckPeers({}, "/nowhere").ok());
}

}  // namespace
}  // namespace shoal
