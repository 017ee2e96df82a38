// How a job forms, and whom it refuses meanwhile.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "collectives/membership/doors.h"
#include "collectives/membership/frame.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/socket.h"
#include "runtime/base/check.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

int64_t Soon() { return NowNs() + 30'000'000'000; }

// A port of the loopback address that was free a moment ago.
int FreePort(int family) {
  absl::StatusOr<Fd> fd = Listen(AnyAddress(family, /*loopback_only=*/true));
  SHOAL_CHECK(fd.ok()) << fd.status().ToString();
  return LocalAddressOf(fd->get()).port();
}

// Connects all ranks, each on a thread; the statuses by entry.
std::vector<absl::Status> ConnectAll(const std::vector<WorldOptions>& options) {
  std::vector<absl::Status> statuses(options.size());
  std::vector<std::unique_ptr<Communicator>> worlds(options.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < options.size(); ++i) {
    threads.emplace_back([&, i] {
      absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[i]);
      statuses[i] = world.status();
      if (world.ok()) {
        statuses[i] = (*world)->Barrier({}).Await();
        worlds[i] = *std::move(world);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  threads.clear();
  for (auto& world : worlds) threads.emplace_back([&world] { world.reset(); });
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

std::vector<WorldOptions> AllRanks(int size, const std::string& transport = "auto") {
  const std::string rendezvous = UniqueRendezvous();
  std::vector<WorldOptions> options;
  for (int rank = 0; rank < size; ++rank) options.push_back(RankOptions(rank, size, transport, rendezvous));
  return options;
}

TEST(Bootstrap, MeetsOverIpv4AndIpv6) {
  for (const auto& [host, family] :
       {std::pair("127.0.0.1", AF_INET), std::pair("::1", AF_INET6), std::pair("localhost", AF_INET)}) {
    if (family == AF_INET6 && !Listen(AnyAddress(AF_INET6, true)).ok()) continue;  // No IPv6 on this machine.
    for (const char* transport : {"auto", "tcp"}) {
      std::vector<WorldOptions> options = AllRanks(3, transport);
      const int port = FreePort(family);
      for (WorldOptions& rank : options) {
        rank.master_host = host;
        rank.master_port = port;
      }
      for (const absl::Status& status : ConnectAll(options)) EXPECT_EQ(status.ToString(), "OK") << host;
    }
  }
}

TEST(Bootstrap, MissingRanksAreNamedEverywhere) {
  std::vector<WorldOptions> options = AllRanks(5);
  options.erase(options.begin() + 3);
  options.erase(options.begin() + 1);
  for (WorldOptions& rank : options) rank.connect_timeout = absl::Milliseconds(300);
  options[0].connect_timeout = absl::Milliseconds(200);
  for (const absl::Status& status : ConnectAll(options)) {
    EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("ranks 1, 3 of 5 did not come"));
  }
}

TEST(Bootstrap, AMemberWhoseOwnTimeIsShorterNamesThemToo) {
  std::vector<WorldOptions> options = AllRanks(3);
  options.pop_back();
  options[0].connect_timeout = absl::Seconds(2);
  options[1].connect_timeout = absl::Milliseconds(500);
  const std::vector<absl::Status> statuses = ConnectAll(options);
  EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[1])) << statuses[1];
  EXPECT_THAT(std::string(statuses[1].message()), HasSubstr("rank 2 of 3 did not come"));
  // Rank 1 gave up before rank 0 did.
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("ranks 1, 2 of 3 did not come"));
}

TEST(Bootstrap, NobodyAtTheMasterAddressIsUnavailable) {
  WorldOptions options = RankOptions(1, 2, "auto", UniqueRendezvous());
  options.connect_timeout = absl::Milliseconds(100);
  const absl::Status status = ConnectWorld(options).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(options.master_host), HasSubstr("refused")));
}

TEST(Bootstrap, APortInUseIsUnavailable) {
  absl::StatusOr<Fd> taken = Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  ASSERT_TRUE(taken.ok());
  WorldOptions options = RankOptions(0, 2, "auto", "127.0.0.1");
  options.master_port = LocalAddressOf(taken->get()).port();
  const absl::Status status = ConnectWorld(options).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(absl::StrCat("cannot listen on 127.0.0.1:", options.master_port)));
}

TEST(Bootstrap, TwoClaimsOfOneRankEndTheAttemptForAll) {
  std::vector<WorldOptions> options = AllRanks(3);
  options[2].rank = 1;
  for (const absl::Status& status : ConnectAll(options)) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("two processes claim one rank: rank 1 (pid "));
  }
}

TEST(Bootstrap, DifferentSizesEndTheAttemptForAll) {
  std::vector<WorldOptions> options = AllRanks(2);
  options[1].size = 3;
  for (const absl::Status& status : ConnectAll(options)) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("says that the job has 3 ranks, rank 0 says 2"));
  }
}

TEST(Bootstrap, OtherJobsAndEpochsAreRefusedAndTheJobForms) {
  std::vector<WorldOptions> options = AllRanks(2);
  WorldOptions stranger = options[1];
  stranger.job_id = "another";
  stranger.connect_timeout = absl::Milliseconds(200);
  WorldOptions stale = options[1];
  stale.epoch = Epoch{9};
  stale.connect_timeout = absl::Milliseconds(200);
  absl::Status rank_0, stranger_status, stale_status, rank_1;
  testing::internal::CaptureStderr();
  std::thread master([&] {
    absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[0]);
    rank_0 = world.ok() ? (*world)->Barrier({}).Await() : world.status();
  });
  stranger_status = ConnectWorld(stranger).status();
  stale_status = ConnectWorld(stale).status();
  {
    absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[1]);
    rank_1 = world.ok() ? (*world)->Barrier({}).Await() : world.status();
  }
  master.join();
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_EQ(rank_0.ToString(), "OK");
  EXPECT_EQ(rank_1.ToString(), "OK");
  EXPECT_TRUE(absl::IsUnavailable(stranger_status)) << stranger_status;
  EXPECT_THAT(std::string(stranger_status.message()),
              HasSubstr("refused: job 'another', want 'test'"));
  EXPECT_THAT(std::string(stale_status.message()), HasSubstr("refused this process: epoch 9, want 1"));
  EXPECT_THAT(log, AllOf(HasSubstr("job 'another', want 'test'"), HasSubstr("epoch 9, want 1")));
}

TEST(Bootstrap, GarbageAndPortScannersCostNothing) {
  std::vector<WorldOptions> options = AllRanks(2);
  const int port = FreePort(AF_INET);
  for (WorldOptions& rank : options) {
    rank.master_host = "127.0.0.1";
    rank.master_port = port;
  }
  absl::Status rank_0, rank_1;
  testing::internal::CaptureStderr();
  std::thread master([&] {
    absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[0]);
    rank_0 = world.ok() ? (*world)->Barrier({}).Await() : world.status();
  });
  const SocketAddress address = *ResolveAddress("127.0.0.1", port);
  const std::string huge_frame("SHOL\1\0\0\0\1\0\0\0\377\377\377\377", 16);
  const std::string other_version("SHOL\377\0\0\0\1\0\0\0\0\0\0\0", 16);
  const std::string empty_hello("SHOL\1\0\0\0\1\0\0\0\0\0\0\0", 16);
  std::vector<Fd> open;
  for (const std::string& bytes :
       {std::string(), std::string("GET / HTTP/1.1\r\n\r\n"), std::string(100'000, '\xff'),
        std::string("SHO"), huge_frame, other_version, empty_hello}) {
    absl::StatusOr<Fd> fd = Dial(address, Soon());
    while (!fd.ok()) fd = Dial(address, Soon());                   // Rank 0 is still on its way.
    (void)SendAll(fd->get(), bytes.data(), bytes.size(), Soon());  // It may be closed in the middle.
    open.push_back(*std::move(fd));
    if (open.size() % 2 == 0) open.pop_back();
  }
  {
    absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[1]);
    rank_1 = world.ok() ? (*world)->Barrier({}).Await() : world.status();
  }
  master.join();
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_EQ(rank_0.ToString(), "OK");
  EXPECT_EQ(rank_1.ToString(), "OK");
  EXPECT_THAT(log, HasSubstr("it does not speak Shoal's protocol"));
}

TEST(Bootstrap, ARankThatDiesWhileTheJobFormsMayComeBack) {
  std::vector<WorldOptions> options = AllRanks(3);
  WorldOptions impatient = options[1];
  impatient.connect_timeout = absl::Milliseconds(50);
  absl::Status first;
  std::thread early([&] { first = ConnectWorld(impatient).status(); });
  std::thread master([&] {
    absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options[0]);
    ASSERT_TRUE(world.ok()) << world.status();
    EXPECT_EQ((*world)->Barrier({}).Await().ToString(), "OK");
  });
  early.join();
  EXPECT_FALSE(first.ok());
  for (const absl::Status& status : ConnectAll({options[1], options[2]})) EXPECT_EQ(status.ToString(), "OK");
  master.join();
}

// Who has formed may be gone before others have.
TEST(Bootstrap, RanksThatLeaveAtOnceHoldNobodyUp) {
  for (int round = 0; round < 10; ++round) {
    for (const char* transport : {"auto", "tcp"}) {
      RunRanks(4, transport, [](Communicator&) {});
      std::vector<std::thread> threads;
      for (const WorldOptions& options : AllRanks(3, transport)) {
        threads.emplace_back([options] {
          // The first one's abort may come before another's communicator is made.
          absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options);
          if (world.ok()) (*world)->Abort(absl::CancelledError("enough"));
          EXPECT_TRUE(world.ok() || absl::IsAborted(world.status())) << world.status();
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
}

TEST(Bootstrap, PeersAreToldTheAddressesOfTheChosenInterface) {
  const SocketAddress towards = AnyAddress(AF_INET, /*loopback_only=*/true);
  for (const char* interface : {"lo", "127.0.0.1"}) {
    const Doors doors = *OpenDoors("tcp", interface, towards);
    EXPECT_THAT(*OwnEndpoints(doors, interface, towards), Contains(absl::StrCat("127.0.0.1:", doors.port)));
    std::vector<WorldOptions> options = AllRanks(3, "tcp");
    for (WorldOptions& rank : options) rank.interface = interface;
    for (const absl::Status& status : ConnectAll(options)) EXPECT_EQ(status.ToString(), "OK");
  }
}

TEST(Bootstrap, BadOptionsAreNamed) {
  WorldOptions options = RankOptions(2, 2, "auto", UniqueRendezvous());
  EXPECT_TRUE(absl::IsInvalidArgument(ConnectWorld(options).status()));
  options = RankOptions(0, 2, "pigeon", UniqueRendezvous());
  EXPECT_THAT(std::string(ConnectWorld(options).status().message()), HasSubstr("pigeon"));
  options = RankOptions(0, 2, "tcp", UniqueRendezvous());
  options.interface = "nowhere0";
  EXPECT_THAT(ConnectWorld(options).status().ToString(), AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("nowhere0")));
}

}  // namespace
}  // namespace shoal
