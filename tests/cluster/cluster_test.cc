// One thing at a time happens to a job across four hosts, and what follows is timed.
#include "tests/cluster/cluster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "tests/cluster/member.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using testing::NetworkHosts;

constexpr int kHosts = 4;
constexpr int64_t kTimeoutNs = 1'000'000'000;
constexpr absl::Duration kLong = absl::Seconds(30);

class ClusterTest : public ::testing::Test {
 protected:
  struct Member {
    std::unique_ptr<Child> child;
    int host = 0;
    int64_t began_ns = 0;
    MemberReport view, worked;
    std::string cause;       // Of the last ABORTED,
    int64_t aborted_ns = 0;  // and when.
  };

  // `per_host` members on each host.
  void Begin(int per_host, Cluster::Options options = {}) {
    options.heartbeat_timeout = absl::Nanoseconds(kTimeoutNs);
    options.size_min = 1;
    auto cluster = Cluster::Create(options);
    if (absl::IsFailedPrecondition(cluster.status())) GTEST_SKIP() << cluster.status().message();
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
    cluster_->StartCoordinator();
    for (int i = 0; i < kHosts * per_host; ++i) Start(i % kHosts);
    AwaitEpochOf(members_);
  }

  Member* Start(int host) {
    auto member = std::make_unique<Member>();
    member->host = host;
    member->child = cluster_->StartMember(host);
    owned_.push_back(std::move(member));
    members_.push_back(owned_.back().get());
    return members_.back();
  }

  // Reads what `member` says until it has worked in an epoch of exactly `pids`.
  void Await(Member& member, const std::set<int64_t>& pids) {
    const int64_t deadline_ns = NowNs() + absl::ToInt64Nanoseconds(kLong);
    while (NowNs() < deadline_ns) {
      const std::string line = member.child->Line(kLong);
      ASSERT_FALSE(line.empty() || absl::StartsWith(line, "wrong"))
          << "pid " << member.child->pid() << ": " << line;
      if (absl::StartsWith(line, "began ")) {
        ASSERT_TRUE(absl::SimpleAtoi(line.substr(6), &member.began_ns));
        continue;
      }
      const MemberReport report = ParseMemberReport(line);
      ASSERT_NE(report.type, MemberReport::kOther) << line;
      if (report.type == MemberReport::kView) member.view = report;
      if (report.type == MemberReport::kAborted) {
        member.cause = report.text;
        member.aborted_ns = report.at_ns;
      }
      if (report.type != MemberReport::kWorked) continue;
      member.worked = report;
      if (std::set<int64_t>(member.view.pids.begin(), member.view.pids.end()) == pids) return;
    }
    FAIL() << "pid " << member.child->pid() << " is in another epoch after " << kLong;
  }

  // When all of them have worked in one epoch of their own.
  void AwaitEpochOf(const std::vector<Member*>& members) {
    std::set<int64_t> pids;
    for (const Member* member : members) pids.insert(member->child->pid());
    for (Member* member : members) {
      Await(*member, pids);
      if (HasFatalFailure()) return;
    }
    for (const Member* member : members) {
      EXPECT_EQ(member->view.lineage, members[0]->view.lineage);
      EXPECT_EQ(member->view.epoch, members[0]->view.epoch);
      EXPECT_EQ(member->view.pids, members[0]->view.pids);
    }
  }

  std::vector<Member*> On(const std::set<int>& hosts) const {
    std::vector<Member*> found;
    for (Member* member : members_) {
      if (hosts.contains(member->host)) found.push_back(member);
    }
    return found;
  }

  // From `event_ns` to the members' ABORTED, which must come in time, and to their next epoch's first round.
  void ReportRecovery(const char* what, int64_t event_ns, const std::vector<Member*>& members,
                      int64_t abort_ns_max) {
    int64_t aborted_ns = 0, worked_ns = 0;
    for (const Member* member : members) {
      EXPECT_GT(member->aborted_ns, event_ns);
      aborted_ns = std::max(aborted_ns, member->aborted_ns);
      worked_ns = std::max(worked_ns, member->worked.at_ns);
    }
    std::printf("%s: ABORTED on all survivors after %.1f ms, next epoch's first round after %.1f ms\n", what,
                static_cast<double>(aborted_ns - event_ns) * 1e-6,
                static_cast<double>(worked_ns - event_ns) * 1e-6);
    EXPECT_LT(aborted_ns - event_ns, abort_ns_max);
    EXPECT_LT(worked_ns - event_ns, abort_ns_max + 2'000'000'000);
  }

  std::unique_ptr<Cluster> cluster_;
  std::vector<std::unique_ptr<Member>> owned_;
  std::vector<Member*> members_;  // That live.
};

// The network may be late where a core is.
constexpr int64_t kSilenceNsMax = kTimeoutNs + 500'000'000;

TEST_F(ClusterTest, MembersFindWhoIsOnTheirHostThoughAllShareAKernel) {
  for (const char* transport : {"auto", "tcp"}) {
    members_.clear();
    owned_.clear();
    cluster_.reset();
    Begin(/*per_host=*/2, {.transport = transport});
    if (IsSkipped() || HasFatalFailure()) return;
    // One connection of this kind to the other member of the host.
    for (const Member* member : members_) {
      EXPECT_EQ(member->worked.unix_connections, std::string(transport) == "auto" ? 1 : 0);
    }
  }
}

TEST_F(ClusterTest, AHostWhoseCableIsPulledIsExcludedAndComesBack) {
  Begin(/*per_host=*/2);
  if (IsSkipped() || HasFatalFailure()) return;
  for (const auto cable : {NetworkHosts::Cable::kPulled, NetworkHosts::Cable::kDown}) {
    ASSERT_TRUE(cluster_->network().SetCable(3, cable).ok());
    const int64_t event_ns = NowNs();
    AwaitEpochOf(On({0, 1, 2}));
    if (HasFatalFailure()) return;
    ReportRecovery("cable pulled", event_ns, On({0, 1, 2}), kSilenceNsMax);
    EXPECT_THAT(members_[0]->cause, HasSubstr("host-3"));
    ASSERT_TRUE(cluster_->network().SetCable(3, NetworkHosts::Cable::kUp).ok());
    const int64_t back_ns = NowNs();
    AwaitEpochOf(members_);
    if (HasFatalFailure()) return;
    std::printf("cable put back: all in one epoch after %.1f ms\n",
                static_cast<double>(members_[0]->worked.at_ns - back_ns) * 1e-6);
    for (const Member* member : On({3})) EXPECT_GT(member->aborted_ns, event_ns) << "cut off, and not told";
  }
}

TEST_F(ClusterTest, OfTwoHostsThatDoNotReachEachOtherOneStays) {
  Begin(/*per_host=*/1);
  if (IsSkipped() || HasFatalFailure()) return;
  NetworkHosts& network = cluster_->network();
  ASSERT_TRUE(network.SetPath(0, 1, NetworkHosts::Path::kCut).ok());
  ASSERT_TRUE(network.SetPath(1, 0, NetworkHosts::Path::kCut).ok());
  const int64_t event_ns = NowNs();
  // Whom of the two the coordinator drops is its own affair: the later rank.
  std::vector<Member*> stay = members_;
  const int64_t first = members_[0]->child->pid();
  const bool zero_is_earlier =
      std::find(members_[0]->view.pids.begin(), members_[0]->view.pids.end(), first) <
      std::find(members_[0]->view.pids.begin(), members_[0]->view.pids.end(), members_[1]->child->pid());
  stay.erase(stay.begin() + (zero_is_earlier ? 1 : 0));
  AwaitEpochOf(stay);
  if (HasFatalFailure()) return;
  // When one of the two hears the other's verdict before it gives its own, one alone accuses, and is not believed before they
  // have failed to connect for a second once more.
  ReportRecovery("two hosts parted", event_ns, stay, kSilenceNsMax);
  ASSERT_TRUE(network.SetPath(0, 1, NetworkHosts::Path::kOpen).ok());
  ASSERT_TRUE(network.SetPath(1, 0, NetworkHosts::Path::kOpen).ok());
  AwaitEpochOf(members_);
}

TEST_F(ClusterTest, AKillAndAStopAreNoticedAcrossHostsAndANewcomerIsAdmitted) {
  Begin(/*per_host=*/1);
  if (IsSkipped() || HasFatalFailure()) return;
  Member* const killed = members_.back();
  members_.pop_back();
  int64_t event_ns = NowNs();
  killed->child->Signal(SIGKILL);
  AwaitEpochOf(members_);
  if (HasFatalFailure()) return;
  ReportRecovery("kill -9", event_ns, members_, kTimeoutNs);

  Member* const newcomer = Start(killed->host);
  AwaitEpochOf(members_);
  if (HasFatalFailure()) return;
  std::printf("newcomer: first round %.1f ms after its process began\n",
              static_cast<double>(newcomer->worked.at_ns - newcomer->began_ns) * 1e-6);

  Member* const stopped = members_[1];
  const std::vector<Member*> others = {members_[0], members_[2], members_[3]};
  event_ns = NowNs();
  stopped->child->Signal(SIGSTOP);
  AwaitEpochOf(others);
  if (HasFatalFailure()) return;
  ReportRecovery("SIGSTOP", event_ns, others, kSilenceNsMax);
  stopped->child->Signal(SIGCONT);
  AwaitEpochOf(members_);
}

// Two ranks on hosts whose cables carry no more than a rate. `body` runs on both, some times, as others may want the cores; rank 0
// gives back its milliseconds of the shortest.
double MillisecondsAtRate(int64_t bits_per_second, const std::function<absl::Status(Communicator&)>& body) {
  const auto network = NetworkHosts::Create(2);
  SHOAL_CHECK(network.ok()) << network.status().ToString();
  for (int host = 0; host < 2; ++host) SHOAL_CHECK_OK((*network)->SetRate(host, bits_per_second));
  std::vector<std::unique_ptr<Child>> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.push_back(std::make_unique<Child>([&, rank](Child::Parent& parent) {
      SHOAL_CHECK_OK((*network)->Enter(rank));
      WorldOptions options;
      options.rank = rank;
      options.size = 2;
      options.master_host = (*network)->Address(0);
      options.master_port = 29500;
      const auto world = ConnectWorld(options);
      SHOAL_CHECK(world.ok()) << world.status().ToString();
      int64_t best_ns = std::numeric_limits<int64_t>::max();
      for (int i = 0; i < 8; ++i) {
        SHOAL_CHECK_OK((*world)->Barrier({}).Await());
        const int64_t begin_ns = NowNs();
        SHOAL_CHECK_OK(body(**world));
        best_ns = std::min(best_ns, NowNs() - begin_ns);
      }
      parent.Say(absl::StrCat(best_ns));
    }));
  }
  int64_t ns = 0;
  SHOAL_CHECK(absl::SimpleAtoi(ranks[0]->Line(kLong), &ns));
  return ns * 1e-6;
}

class RateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto network = NetworkHosts::Create(2);
    if (absl::IsFailedPrecondition(network.status())) GTEST_SKIP() << network.status().message();
    const absl::Status shaped = (*network)->SetRate(0, kRate);
    if (absl::IsFailedPrecondition(shaped)) GTEST_SKIP() << shaped.message();
  }
  static constexpr int64_t kRate = 400'000'000, kBytes = 8 << 20;
  static constexpr double kWholeMs = kBytes * 8e3 / kRate;
};

TEST_F(RateTest, AllReduceTakesTheTimeOfItsBytes) {
  const double ms = MillisecondsAtRate(kRate, [](Communicator& world) {
    const Tensor data = Zeros({kBytes / 4}, DType::kF32);
    return world.AllReduce(data, data, ReduceOp::kSum, {}).Await();
  });
  EXPECT_GT(ms, 0.85 * kWholeMs);  // Half of it is sent to be summed, half as a sum.
  EXPECT_LT(ms, 1.3 * kWholeMs);
}

TEST_F(RateTest, AllToAllSendsAndReceivesAtOnce) {
  const double ms = MillisecondsAtRate(kRate, [](Communicator& world) {
    const Tensor in = Zeros({kBytes / 4}, DType::kF32), out = Zeros({kBytes / 4}, DType::kF32);
    return world.AllToAll(in, {}, out, {}, {}).Await();
  });
  EXPECT_GT(ms, 0.85 * kWholeMs / 2);  // Half of it stays.
  EXPECT_LT(ms, 0.8 * kWholeMs);  // One after the other they would take all of it.
}

}  // namespace
}  // namespace shoal
