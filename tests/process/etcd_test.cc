// Several coordinators, one of which a real etcd elects.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "collectives/membership/endpoint.h"
#include "collectives/membership/etcd.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/harness/elastic.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

int FreePort() {
  absl::StatusOr<Fd> fd = Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  SHOAL_CHECK(fd.ok()) << fd.status().ToString();
  return LocalAddressOf(fd->get()).port();
}

// An etcd on ports that were free a moment ago; others if somebody was faster.
class Etcd {
 public:
  Etcd() {
    for (int attempt = 0; attempt < 10; ++attempt) {
      const std::string peer_url = absl::StrCat("http://127.0.0.1:", FreePort());
      endpoint_ = absl::StrCat("127.0.0.1:", FreePort());
      folder_ = std::make_unique<testing::TempDir>();
      const std::string url = "http://" + endpoint_;
      process_ = std::make_unique<Child>([&](Child::Parent&) {
        const std::string data = absl::StrCat(folder_->path(), "/etcd"), cluster = "default=" + peer_url;
        const int log = open(absl::StrCat(folder_->path(), "/log").c_str(), O_CREAT | O_WRONLY, 0600);
        (void)dup2(log, 1);
        (void)dup2(log, 2);
        execlp("etcd", "etcd", "--data-dir", data.c_str(), "--listen-client-urls", url.c_str(),
               "--advertise-client-urls", url.c_str(), "--listen-peer-urls", peer_url.c_str(),
               "--initial-advertise-peer-urls", peer_url.c_str(), "--initial-cluster", cluster.c_str(), nullptr);
      });
      while (!process_->Ended()) {
        const absl::Status status = FindLeader({endpoint_}, "none", NowNs() + 1'000'000'000).status();
        if (absl::IsNotFound(status)) return;
        (void)poll(nullptr, 0, 20);
      }
    }
    SHOAL_CHECK(false) << "etcd (package etcd-server) does not start";
  }
  const std::string& endpoint() const { return endpoint_; }

 private:
  std::unique_ptr<testing::TempDir> folder_;
  std::unique_ptr<Child> process_;
  std::string endpoint_;
};

std::unique_ptr<Child> StartCandidate(const std::string& etcd) {
  return std::make_unique<Child>([etcd](Child::Parent& parent) {
    CoordinatorServerOptions options;
    options.core.size_min = 3;
    options.job_id = "test";
    options.secret = "s3cret";
    options.etcd = {etcd};
    absl::StatusOr<std::unique_ptr<CoordinatorServer>> server = CoordinatorServer::Start(options);
    SHOAL_CHECK(server.ok()) << server.status().ToString();
    parent.Say((*server)->address());
    while (parent.Hear(absl::Hours(1)).empty()) pause();
  });
}

std::string AwaitLeader(const std::string& etcd, const std::string& other_than) {
  const int64_t deadline_ns = NowNs() + 30'000'000'000;
  while (NowNs() < deadline_ns) {
    const absl::StatusOr<std::string> leader = FindLeader({etcd}, "test", deadline_ns);
    if (leader.ok() && *leader != other_than) return *leader;
    (void)poll(nullptr, 0, 20);
  }
  return "";
}

TEST(Etcd, AnotherCoordinatorTakesOverWhenTheLeaderDies) {
  const Etcd etcd;
  const std::string& endpoint = etcd.endpoint();
  std::vector<std::unique_ptr<Child>> candidates;
  std::vector<std::string> addresses;
  for (int i = 0; i < 3; ++i) {
    candidates.push_back(StartCandidate(endpoint));
    addresses.push_back(candidates.back()->Line());
  }
  const std::string first = AwaitLeader(endpoint, "");
  ASSERT_THAT(addresses, ::testing::Contains(first));
  ElasticJob job({.size_min = 3, .coordinator = absl::StrCat("etcd:", endpoint)});
  std::vector<std::unique_ptr<Child>> members;
  for (int i = 0; i < 3; ++i) members.push_back(job.StartMember(LiveAsMember));
  for (auto& member : members) EXPECT_THAT(member->LineWith("epoch"), ::testing::HasSubstr("size 3"));

  const int64_t killed_ns = NowNs();
  for (size_t i = 0; i < addresses.size(); ++i) {
    if (addresses[i] == first) candidates[i]->Signal(SIGKILL);
  }
  const std::string second = AwaitLeader(endpoint, first);
  std::printf("another leads after %.1f s\n", static_cast<double>(NowNs() - killed_ns) * 1e-9);
  ASSERT_THAT(addresses, ::testing::Contains(second));
  // Nobody was excluded, nothing was interrupted, and newcomers are admitted to the same job.
  members.push_back(job.StartMember(LiveAsMember));
  for (auto& member : members) EXPECT_THAT(member->LineWith("epoch"), ::testing::HasSubstr("size 4"));
}

// Members on other hosts cannot dial 0.0.0.0.
TEST(Etcd, WhoListensOnEveryInterfaceTellsTheOneThatReachesEtcd) {
  const Etcd etcd;
  for (const char* listen : {"0.0.0.0:0", "[::]:0", ""}) {
    CoordinatorServerOptions options;
    options.job_id = listen;
    options.listen = listen;
    options.etcd = {etcd.endpoint()};
    const auto server = CoordinatorServer::Start(options);
    if (!server.ok() && listen[0] == '[') continue;  // No IPv6 here.
    ASSERT_TRUE(server.ok()) << server.status();
    EXPECT_THAT((*server)->address(), ::testing::StartsWith("127.0.0.1:"));
  }
}

TEST(Etcd, NobodyLeadsIsSaid) {
  const Etcd etcd;
  const absl::Status none = FindLeader({etcd.endpoint()}, "nobody's job", NowNs() + 5'000'000'000).status();
  EXPECT_TRUE(absl::IsNotFound(none)) << none;
  const absl::Status dead =
      FindLeader({absl::StrCat("127.0.0.1:", FreePort())}, "job", NowNs() + 5'000'000'000).status();
  EXPECT_TRUE(absl::IsUnavailable(dead)) << dead;
}

}  // namespace
}  // namespace shoal
