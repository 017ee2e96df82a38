// Jobs whose members come and go, as real processes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "collectives/transport/clock.h"
#include "tests/harness/elastic.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Members = std::vector<std::unique_ptr<Child>>;

Members StartMembers(const ElasticJob& job, int count) {
  Members members;
  for (int i = 0; i < count; ++i) members.push_back(job.StartMember(LiveAsMember));
  return members;
}

// epoch N size M rank R at T
struct Entered {
  uint64_t epoch = 0;
  int size = 0;
  int rank = -1;
  int64_t at_ns = 0;
};

Entered Parse(const std::string& line) {
  const std::vector<std::string> words = absl::StrSplit(line, ' ');
  Entered entered;
  if (words.size() != 8 || words[0] != "epoch") return entered;
  (void)absl::SimpleAtoi(words[1], &entered.epoch);
  (void)absl::SimpleAtoi(words[3], &entered.size);
  (void)absl::SimpleAtoi(words[5], &entered.rank);
  (void)absl::SimpleAtoi(words[7], &entered.at_ns);
  return entered;
}

// Waits until every member is in an epoch of `size`, the same one; when the last of them got there.
Entered AwaitSize(Members& members, int size) {
  Entered last;
  for (auto& member : members) {
    while (true) {
      const std::string line = member->LineWith("epoch");
      const Entered entered = Parse(line);
      if (entered.size == 0) {
        ADD_FAILURE() << "pid " << member->pid() << " says \"" << line << "\", want an epoch of " << size;
        return last;
      }
      if (entered.size != size) continue;
      last.epoch = std::max(last.epoch, entered.epoch);
      last.at_ns = std::max(last.at_ns, entered.at_ns);
      last.size = size;
      break;
    }
  }
  return last;
}

void Report(const char* what, int64_t from_ns, int64_t to_ns) {
  std::printf("%s: %.1f ms\n", what, static_cast<double>(to_ns - from_ns) * 1e-6);
}

int64_t Steps(Child& member) {
  member.Tell("steps");
  const std::vector<std::string> words = absl::StrSplit(member.LineWith("step"), ' ');
  int64_t steps = -1;
  (void)absl::SimpleAtoi(words.back(), &steps);
  return steps;
}

TEST(Elastic, MembersJoinTogether) {
  for (const char* transport : {"auto", "tcp"}) {
    ElasticJob job({.size_min = 4, .transport = transport});
    job.StartCoordinator();
    const int64_t begun_ns = NowNs();
    Members members = StartMembers(job, 4);
    Report("four processes to their first collectives", begun_ns, AwaitSize(members, 4).at_ns);
  }
}

TEST(Elastic, ANewcomerIsAdmittedAtABoundaryThatTheMembersChoose) {
  ElasticJob job({.size_min = 3});
  job.StartCoordinator();
  Members members = StartMembers(job, 3);
  AwaitSize(members, 3);
  const int64_t begun_ns = NowNs();
  members.push_back(job.StartMember(LiveAsMember));
  Report("a newcomer to its first collectives", begun_ns, AwaitSize(members, 4).at_ns);
}

TEST(Elastic, WhoLeavesPolitelyIsMissedByNobody) {
  ElasticJob job({.size_min = 1});
  job.StartCoordinator();
  Members members = StartMembers(job, 4);
  AwaitSize(members, 4);
  const int64_t begun_ns = NowNs();
  members[1]->Tell("leave");
  EXPECT_EQ(members[1]->LineWith("left"), "left");
  EXPECT_EQ(members[1]->Wait(), 0);
  members.erase(members.begin() + 1);
  Report("after a polite leave", begun_ns, AwaitSize(members, 3).at_ns);
}

// Peers have heard the goodbye by then, and count on nothing more.
TEST(Elastic, WhatIsIssuedOnAnEpochThatThisProcessHasLeftEndsAtOnce) {
  for (const char* transport : {"auto", "tcp"}) {
    ElasticJob job({.size_min = 2, .transport = transport});
    job.StartCoordinator();
    Members members;
    for (int i = 0; i < 2; ++i) {
      members.push_back(job.StartMember([](Membership& membership, Child::Parent& parent) {
        const auto group = *membership.NextEpoch(absl::Now() + absl::Seconds(30));
        const auto say = [&](const Work& work) {
          parent.Say(absl::StrCat(work.Done() ? "at once: " : "later: ", work.Await().ToString()));
        };
        const Tensor data = Zeros({100'000}, DType::kF32), few = Zeros({2}, DType::kF32);
        parent.Say(absl::StrCat("index ", group->index(), ": ", group->Barrier({}).Await().ToString()));
        if (group->index() == 0) {
          parent.Say(membership.NextEpoch(absl::Now()).status().ToString());
          for (const Tensor& tensor : {data, few}) {
            say(group->AllReduce(tensor, tensor, ReduceOp::kSum, {}));
            say(group->Send(tensor, 1, 7, {}));
            say(group->Receive(tensor, 1, 7, {}));
          }
          parent.Say(absl::StrCat("at once: ", group->Split({0, 1}).status().ToString()));
        } else {
          parent.Say(absl::StrCat("survivor: ", group->AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString()));
          (void)parent.Hear(absl::Minutes(1));
        }
        LiveAsMember(membership, parent);
      }));
    }
    if (members[0]->LineWith("index") != "index 0: OK") std::swap(members[0], members[1]);
    EXPECT_THAT(members[0]->LineWith("DEADLINE_EXCEEDED"), HasSubstr("the next epoch"));
    for (int i = 0; i < 7; ++i) {
      EXPECT_THAT(members[0]->Line(), AllOf(StartsWith("at once: ABORTED: "), HasSubstr("rank 0 (pid "),
                                            HasSubstr("has left epoch 1")));
    }
    EXPECT_THAT(members[1]->LineWith("survivor"), AllOf(HasSubstr("ABORTED: "), HasSubstr("rank 0 (pid "), HasSubstr("left")));
    members[1]->Tell("go on");
    AwaitSize(members, 2);
  }
}

TEST(Elastic, SurvivorsOfAKillGoOn) {
  ElasticJob job({.size_min = 1});
  job.StartCoordinator();
  Members members = StartMembers(job, 4);
  AwaitSize(members, 4);
  for (int left = 3; left >= 1; --left) {
    const int64_t begun_ns = NowNs();
    members[left / 2]->Signal(SIGKILL);
    members.erase(members.begin() + left / 2);
    Report("after a kill", begun_ns, AwaitSize(members, left).at_ns);
  }
}

TEST(Elastic, AStoppedMemberIsExcludedAndComesBackAsANewOne) {
  ElasticJob job({.size_min = 1, .heartbeat_timeout = absl::Milliseconds(400)});
  job.StartCoordinator();
  Members members = StartMembers(job, 4);
  AwaitSize(members, 4);
  const int64_t stopped_ns = NowNs();
  members[2]->Signal(SIGSTOP);
  Members others;
  for (int i : {0, 1, 3}) others.push_back(std::move(members[i]));
  const Entered three = AwaitSize(others, 3);
  Report("after a stop, with a timeout of 400 ms", stopped_ns, three.at_ns);
  EXPECT_LT(three.at_ns - stopped_ns, 2'000'000'000);
  const int64_t continued_ns = NowNs();
  members[2]->Signal(SIGCONT);
  others.push_back(std::move(members[2]));
  Report("back after it was continued", continued_ns, AwaitSize(others, 4).at_ns);
}

TEST(Elastic, CollectivesOutliveTheCoordinator) {
  ElasticJob job({.size_min = 1});
  job.StartCoordinator();
  Members members = StartMembers(job, 3);
  AwaitSize(members, 3);
  job.coordinator().Signal(SIGKILL);
  EXPECT_EQ(WTERMSIG(job.coordinator().Wait()), SIGKILL);
  const int64_t before = Steps(*members[0]);
  while (Steps(*members[0]) < before + 50) EXPECT_FALSE(members[0]->Ended());
  job.StartCoordinator();
  // The members are known to the new one: the same job goes on, and admits as before.
  members.push_back(job.StartMember(LiveAsMember));
  const Entered four = AwaitSize(members, 4);
  members[0]->Signal(SIGKILL);
  members.erase(members.begin());
  EXPECT_GT(AwaitSize(members, 3).epoch, four.epoch);
}

TEST(Elastic, ADeathWhileThereIsNoCoordinatorWaitsForOne) {
  ElasticJob job({.size_min = 1});
  job.StartCoordinator();
  Members members = StartMembers(job, 3);
  AwaitSize(members, 3);
  job.coordinator().Signal(SIGKILL);
  (void)job.coordinator().Wait();
  members[0]->Signal(SIGKILL);
  members.erase(members.begin());
  for (auto& member : members) EXPECT_THAT(member->LineWith("aborted"), HasSubstr("rank "));
  job.StartCoordinator();
  AwaitSize(members, 2);
}

TEST(Elastic, ACutMemberIsExcludedAndComesBack) {
  ElasticJob job({.size_min = 1});
  job.StartCoordinator();
  Members members = StartMembers(job, 4);
  const Entered before = AwaitSize(members, 4);
  members[3]->Tell("cut");
  // Alone or one after the other, all come together again.
  const Entered after = AwaitSize(members, 4);
  EXPECT_GT(after.epoch, before.epoch);
}

TEST(Elastic, AWrongSecretIsRefusedAndCostsNothing) {
  ElasticJob job({.size_min = 2});
  job.StartCoordinator();
  Child stranger([&job](Child::Parent& parent) {
    MembershipOptions options = job.member_options();
    options.world.secret = "guess";
    parent.Say(Membership::Join(options).status().ToString());
  });
  EXPECT_THAT(stranger.Line(), StartsWith("PERMISSION_DENIED: joining job 'test'"));
  Child other([&job](Child::Parent& parent) {
    MembershipOptions options = job.member_options();
    options.world.job_id = "another";
    parent.Say(Membership::Join(options).status().ToString());
  });
  EXPECT_THAT(other.Line(), StartsWith("FAILED_PRECONDITION: joining job 'another'"));
  Members members = StartMembers(job, 2);
  AwaitSize(members, 2);
}

TEST(Elastic, NobodyAtTheCoordinatorsAddressIsUnavailable) {
  ElasticJob job({});
  Child member([&job](Child::Parent& parent) {
    MembershipOptions options = job.member_options();
    options.coordinator_timeout = absl::Milliseconds(100);
    parent.Say(Membership::Join(options).status().ToString());
  });
  EXPECT_THAT(member.Line(), StartsWith("UNAVAILABLE: joining job 'test'"));
}

TEST(Elastic, ATimeOutSaysWhomTheCoordinatorWaitsFor) {
  ElasticJob job({.size_min = 3});
  job.StartCoordinator();
  std::unique_ptr<Child> member = job.StartMember([](Membership& membership, Child::Parent& parent) {
    parent.Say(membership.NextEpoch(absl::Now() + absl::Milliseconds(700)).status().ToString());
  });
  EXPECT_THAT(member->LineWith("DEADLINE_EXCEEDED"), HasSubstr("the coordinator waits"));
}

}  // namespace
}  // namespace shoal
