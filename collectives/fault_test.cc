// What fails around the collectives: nobody there, bytes that come in pieces, no shared memory, no
// descriptors. The rank concerned says what it lacked, the others say who ended the group and why, nobody
// hangs, and whatever can go on does.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "collectives/membership/membership.h"
#include "collectives/membership/message_link.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/control_link.h"
#include "collectives/transport/segment.h"
#include "collectives/transport/socket.h"
#include "tests/harness/elastic.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Children = std::vector<std::unique_ptr<Child>>;

// ---- Nobody there

// A port of the loopback address where nobody listens.
int FreePort() { return LocalAddressOf(Listen(AnyAddress(AF_INET, /*loopback_only=*/true))->get()).port(); }

TEST(Refused, AMasterThatIsNotThereIsNamed) {
  WorldOptions options = RankOptions(1, 2, "auto", "127.0.0.1");
  options.master_port = FreePort();
  options.connect_timeout = absl::Milliseconds(100);
  EXPECT_THAT(ConnectWorld(options).status().ToString(),
              AllOf(StartsWith("UNAVAILABLE: "), HasSubstr(absl::StrCat("127.0.0.1:", options.master_port)),
                    HasSubstr("Connection refused")));
}

TEST(Refused, CoordinatorsThatAreNotThereAreNamed) {
  MembershipOptions options;
  options.coordinators = {absl::StrCat("127.0.0.1:", FreePort()), absl::StrCat("[::1]:", FreePort()),
                          UniqueRendezvous()};
  options.coordinator_timeout = absl::Milliseconds(100);
  const std::string status = Membership::Join(options).status().ToString();
  EXPECT_THAT(status, AllOf(StartsWith("UNAVAILABLE: joining job 'none'"), HasSubstr("refused")));
  for (const std::string& address : options.coordinators) EXPECT_THAT(status, HasSubstr(address));
}

// ---- Bytes in pieces

// A pair of connected sockets that take as little at once as the system allows.
std::pair<Fd, Fd> NarrowPair() {
  int ends[2] = {-1, -1};
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
  const int least = 1;
  for (int end : ends) {
    EXPECT_EQ(setsockopt(end, SOL_SOCKET, SO_SNDBUF, &least, sizeof least), 0);
    EXPECT_EQ(setsockopt(end, SOL_SOCKET, SO_RCVBUF, &least, sizeof least), 0);
  }
  return {Fd(ends[0]), Fd(ends[1])};
}

// Sends `bytes` in pieces of random sizes, mostly tiny, and calls `read` after each.
template <class Read>
void Trickle(int socket, const std::string& bytes, std::mt19937* random, const Read& read) {
  for (size_t at = 0; at < bytes.size();) {
    const size_t most = (*random)() % 4 == 0 ? 700 : 3;
    const size_t piece = std::min<size_t>(1 + (*random)() % most, bytes.size() - at);
    ASSERT_EQ(send(socket, bytes.data() + at, piece, MSG_NOSIGNAL), static_cast<ssize_t>(piece));
    at += piece;
    read();
  }
}

std::string RandomText(size_t most, std::mt19937* random) {
  std::string text((*random)() % (most + 1), ' ');
  for (char& letter : text) letter = static_cast<char>((*random)());
  return text;
}

class Pieces : public ::testing::Test {
 protected:
  const unsigned seed_ = static_cast<unsigned>(NowNs());
  testing::ScopedTrace trace_{__FILE__, __LINE__, absl::StrCat("seed ", seed_)};
  std::mt19937 random_{seed_};
};

TEST_F(Pieces, ControlMessagesAndTheirDescriptorsSurviveShortSends) {
  auto [left, right] = NarrowPair();
  ControlLink sender(std::move(left)), receiver(std::move(right));
  std::vector<std::unique_ptr<Segment>> segments;
  std::vector<std::string> bodies;
  std::vector<ControlMessage> messages;
  for (int i = 0; i < 300; ++i) {
    bodies.push_back(RandomText(i % 10 == 0 ? 40'000 : 60, &random_));
    const bool carries = i % 5 == 0;
    if (carries) {
      segments.push_back(*Segment::Create(i, 4096));
      std::fill_n(segments.back()->base(), 4, static_cast<std::byte>(i));
    }
    sender.Push({carries ? ControlType::kSegment : ControlType::kHeartbeat, bodies.back(),
                 carries ? *segments.back()->Duplicate() : Fd()});
    if (i % 3 != 0) continue;
    ASSERT_TRUE(sender.Flush().ok());
    ASSERT_TRUE(receiver.Read(&messages).ok());
  }
  EXPECT_TRUE(sender.HasUnsent());
  while (sender.HasUnsent()) {
    ASSERT_TRUE(sender.Flush().ok());
    ASSERT_TRUE(receiver.Read(&messages).ok());
  }
  ASSERT_EQ(messages.size(), bodies.size());
  for (int i = 0; i < 300; ++i) {
    ASSERT_EQ(messages[i].body, bodies[i]) << i;
    if (i % 5 != 0) continue;
    const auto segment = Segment::Map(i, 4096, std::move(messages[i].fd), Segment::Access::kRead);
    ASSERT_TRUE(segment.ok()) << segment.status();
    EXPECT_EQ((*segment)->base()[3], static_cast<std::byte>(i));
  }
}

TEST_F(Pieces, ControlMessagesSurviveShortReads) {
  auto [left, right] = NarrowPair();
  ControlLink receiver(std::move(right));
  std::string bytes;
  std::vector<std::string> bodies;
  for (int i = 0; i < 50; ++i) {
    bodies.push_back(RandomText(i == 7 ? 3000 : 100, &random_));
    const auto length = static_cast<uint32_t>(bodies.back().size());
    bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
    bytes.push_back(static_cast<char>(ControlType::kHeartbeat));
    bytes.append(bodies.back());
  }
  std::vector<ControlMessage> messages;
  Trickle(left.get(), bytes, &random_, [&] { ASSERT_TRUE(receiver.Read(&messages).ok()); });
  ASSERT_EQ(messages.size(), bodies.size());
  for (size_t i = 0; i < bodies.size(); ++i) EXPECT_EQ(messages[i].body, bodies[i]) << i;
}

TEST_F(Pieces, CoordinatorMessagesSurviveShortSendsAndReads) {
  auto [left, right] = NarrowPair();
  const Fd raw(dup(left.get()));
  MessageLink sender(std::move(left)), receiver(std::move(right));
  std::vector<std::string> sent, received;
  for (int i = 0; i < 100; ++i) {
    sent.push_back(RandomText(i % 10 == 0 ? 300'000 : 200, &random_));
    ASSERT_TRUE(sender.Send(sent.back()).ok());
  }
  EXPECT_TRUE(sender.HasUnsent());
  while (sender.HasUnsent()) {
    ASSERT_TRUE(sender.Flush().ok());
    ASSERT_TRUE(receiver.Read(&received).ok());
  }
  std::string bytes;
  for (int i = 0; i < 50; ++i) {
    sent.push_back(RandomText(100, &random_));
    const auto length = static_cast<uint32_t>(sent.back().size());
    bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
    bytes.append(sent.back());
  }
  Trickle(raw.get(), bytes, &random_, [&] { ASSERT_TRUE(receiver.Read(&received).ok()); });
  EXPECT_EQ(received, sent);
}

// ---- Ranks that lack something

// How a lack of descriptors is called.
auto Lack() { return AnyOf(HasSubstr("Too many open files"), HasSubstr("no descriptors are left")); }

std::string Sum(Communicator& group) {
  const Tensor data = Zeros({1000}, DType::kF32);
  std::fill_n(data.data<float>(), data.elements(), 1.0f);
  const absl::Status status = group.AllReduce(data, data, ReduceOp::kSum, {.label = "check"}).Await();
  if (!status.ok()) return status.ToString();
  for (float value : data.span<float>()) {
    if (value != group.size()) return "a wrong sum";
  }
  return "sum is right";
}

// Limits a resource of this process while it lives.
class Limit {
 public:
  Limit(decltype(RLIMIT_NOFILE) resource, rlim_t value) : resource_(resource) {
    EXPECT_EQ(getrlimit(resource, &before_), 0);
    rlimit now = before_;
    now.rlim_cur = value;
    EXPECT_EQ(setrlimit(resource, &now), 0);
  }
  ~Limit() { EXPECT_EQ(setrlimit(resource_, &before_), 0); }

 private:
  const decltype(RLIMIT_NOFILE) resource_;
  rlimit before_ = {};
};

// Memory files may not be larger than `bytes`.
class MemoryLimit : public Limit {
 public:
  explicit MemoryLimit(rlim_t bytes) : Limit(RLIMIT_FSIZE, bytes) { (void)signal(SIGXFSZ, SIG_IGN); }
};

// No more than `spare` descriptors beside those that are open.
class DescriptorLimit : public Limit {
 public:
  explicit DescriptorLimit(int spare) : Limit(RLIMIT_NOFILE, Next(spare)) {}

  // Takes all that are spare now.
  void Fill() {
    for (Fd fd(dup(STDIN_FILENO)); fd.valid(); fd = Fd(dup(STDIN_FILENO))) taken_.push_back(std::move(fd));
  }

 private:
  // One above the `spare`-th free number.
  static rlim_t Next(int spare) {
    std::vector<Fd> probes;
    for (int i = 0; i <= spare; ++i) probes.emplace_back(dup(STDIN_FILENO));
    return probes.back().get();
  }

  std::vector<Fd> taken_;
};

TEST(NoMemory, AllocateSaysHowMuchAndTheGroupGoesOn) {
  RankProcesses ranks(RankOptions(0, 3, "auto", UniqueRendezvous()),
                      [](Communicator& group, const RankProcesses::Say& say) {
                        (void)Sum(group);
                        if (group.index() == 1) {
                          const MemoryLimit limit(1 << 20);
                          const absl::StatusOr<Tensor> tensor = group.Allocate({1 << 20}, DType::kF32);
                          say(tensor.status().ToString());
                        }
                        say(Sum(group));
                      });
  EXPECT_THAT(ranks.Line(1),
              AllOf(StartsWith("RESOURCE_EXHAUSTED: allocate 4194304 bytes"), HasSubstr("File too large")));
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(ranks.Line(rank), "sum is right") << rank;
}

TEST(NoMemory, AGroupThatCannotFormEndsOnAllOfItsMembersAndItsParentGoesOn) {
  RankProcesses ranks(
      RankOptions(0, 3, "auto", UniqueRendezvous()), [](Communicator& group, const RankProcesses::Say& say) {
        (void)Sum(group);
        {
          const MemoryLimit limit(group.index() == 1 ? 4096 : RLIM_INFINITY);
          const auto split = group.Split({0, 1, 2});
          say(split.ok() ? (*split)->Barrier({}).Await().ToString() : split.status().ToString());
        }
        say(Sum(group));
      });
  EXPECT_THAT(ranks.Line(1),
              AllOf(StartsWith("ABORTED: "), HasSubstr("rank 1 (pid "), HasSubstr("File too large")));
  for (int rank : {0, 2}) {
    EXPECT_THAT(ranks.Line(rank),
                AllOf(StartsWith("ABORTED: "), HasSubstr("rank 1 (pid "), HasSubstr("File too large")));
  }
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(ranks.Line(rank), "sum is right") << rank;
}

// The sanitizer of undefined behaviour asks the kernel about objects through a pipe, and without descriptors takes sound
// ones for broken.
#if defined(__SANITIZE_ADDRESS__)
#define SKIP_IF_CHECKS_NEED_DESCRIPTORS() GTEST_SKIP() << "the sanitizer needs descriptors of its own"
#else
#define SKIP_IF_CHECKS_NEED_DESCRIPTORS() (void)0
#endif

class NoDescriptors : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, NoDescriptors, ::testing::Values("auto", "tcp"),
                         [](const auto& info) { return info.param; });

// What a rank says that could not connect: what it lacked itself, or whom it missed: a rank, or the place where all meet.
auto SaysWhy(const std::string& rendezvous) {
  return AllOf(AnyOf(StartsWith("RESOURCE_EXHAUSTED: "), StartsWith("DEADLINE_EXCEEDED: "), StartsWith("UNAVAILABLE: "),
                     StartsWith("ABORTED: ")),
               AnyOf(Lack(), ContainsRegex("ranks? [0-9]"), HasSubstr(rendezvous)));
}

// With any number of spare descriptors, too few or enough, one rank among three either connects or not; whatever the others
// have seen of it by then, none of them hangs, and each says why.
TEST_P(NoDescriptors, ConnectingEndsForAll) {
  SKIP_IF_CHECKS_NEED_DESCRIPTORS();
  constexpr absl::Duration kTimeout = absl::Seconds(3), kMargin = absl::Seconds(10);  // The machine may be loaded.
  struct Job {
    std::string rendezvous;
    int spare, limited;
    Children ranks;
  };
  std::vector<Job> jobs;
  for (int spare : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23}) {
    Job& job = jobs.emplace_back(Job{UniqueRendezvous(), spare, spare % 3, {}});
    for (int rank = 0; rank < 3; ++rank) {
      job.ranks.push_back(std::make_unique<Child>([&, rank](Child::Parent& parent) {
        WorldOptions options = RankOptions(rank, 3, GetParam(), job.rendezvous);
        options.connect_timeout = kTimeout;
        std::unique_ptr<DescriptorLimit> limit;
        if (rank == job.limited) limit = std::make_unique<DescriptorLimit>(job.spare);
        const absl::Time begin = absl::Now();
        const auto world = ConnectWorld(options);
        const absl::Duration took = absl::Now() - begin;
        if (took > kTimeout + kMargin) parent.Say(absl::StrCat("took ", absl::FormatDuration(took)));
        parent.Say(world.ok() ? Sum(**world) : world.status().ToString());
        (void)parent.Hear(absl::Minutes(1));
      }));
    }
  }
  int connected = 0;
  for (Job& job : jobs) {
    SCOPED_TRACE(absl::StrCat("rank ", job.limited, " has ", job.spare, " descriptors"));
    std::vector<std::string> lines;
    for (auto& rank : job.ranks) lines.push_back(rank->Line());
    const bool all = lines[job.limited] == "sum is right";
    connected += all;
    for (int rank = 0; rank < 3; ++rank) {
      SCOPED_TRACE(absl::StrCat("rank ", rank));
      if (all) {
        EXPECT_EQ(lines[rank], "sum is right");
      } else {
        EXPECT_THAT(lines[rank], SaysWhy(job.rendezvous));
      }
    }
    if (job.spare == 0) {
      EXPECT_THAT(lines[job.limited], Lack());
    }
  }
  EXPECT_GE(connected, 1);
  EXPECT_LT(connected, static_cast<int>(jobs.size()));
}

TEST_P(NoDescriptors, GroupsThatCannotFormEndOnAllOfTheirMembers) {
  SKIP_IF_CHECKS_NEED_DESCRIPTORS();
  RankProcesses ranks(RankOptions(0, 3, GetParam(), UniqueRendezvous()),
                      [](Communicator& group, const RankProcesses::Say& say) {
                        std::string world = Sum(group);
                        for (int spare = 0; spare < 8; ++spare) {
                          std::unique_ptr<DescriptorLimit> limit;
                          if (group.index() == 1) limit = std::make_unique<DescriptorLimit>(spare);
                          const auto split = group.Split({0, 1, 2});
                          say(split.ok() ? Sum(**split) : split.status().ToString());
                          limit.reset();
                          if (world == "sum is right") world = Sum(group);
                        }
                        say(world);
                      });
  for (int spare = 0; spare < 8; ++spare) {
    const std::string own = ranks.Line(1);
    for (int rank : {0, 2}) {
      const std::string line = ranks.Line(rank);
      if (own == "sum is right") {
        EXPECT_EQ(line, own) << spare;
      } else {
        EXPECT_THAT(own, Lack()) << spare;
        EXPECT_THAT(line, AllOf(StartsWith("ABORTED: "), HasSubstr("rank 1 (pid "), Lack())) << spare;
      }
    }
  }
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_THAT(ranks.Line(rank),
                AnyOf("sum is right", AllOf(StartsWith("ABORTED"), HasSubstr("rank 1"), Lack())));
  }
}

// Epoch after epoch, until one of `size` members has computed a sum, or the parent says something. Then the group, kept
// until the parent says something.
void Reach(Membership& membership, Child::Parent& parent, int size) {
  std::string heard;
  while (heard.empty()) {
    const auto epoch = membership.NextEpoch(absl::Now() + absl::Seconds(1));
    if (epoch.ok() && (*epoch)->size() == size && Sum(**epoch) == "sum is right") {
      parent.Say(absl::StrCat("reached ", size));
      (void)parent.Hear(absl::Minutes(1));
      return;
    }
    // Another epoch makes sense once somebody waits for it.
    do heard = parent.Hear(absl::Milliseconds(10));
    while (heard.empty() && epoch.ok() && (*epoch)->status().ok() && membership.JoinersWaiting() == 0);
  }
}

// A member without descriptors enters no epoch, not even one of its own, and the others go on without it, though it is
// the oldest. It need not leave: it is excluded, and back as soon as it has some.
TEST_P(NoDescriptors, AMemberThatCannotConnectHoldsNobodyUp) {
  SKIP_IF_CHECKS_NEED_DESCRIPTORS();
  const int size = GetParam() == "tcp" ? 2 : 3;
  ElasticJob job({.size_min = 1, .heartbeat_timeout = absl::Seconds(1), .transport = GetParam()});
  job.StartCoordinator();
  Children members;
  for (int i = 0; i < size; ++i) {
    members.push_back(job.StartMember([size](Membership& membership, Child::Parent& parent) {
      Reach(membership, parent, size);
      {
        std::unique_ptr<DescriptorLimit> limit;
        const bool limited = membership.view().members[0].pid == getpid();
        if (limited) limit = std::make_unique<DescriptorLimit>(0);
        parent.Say(limited ? "limited: yes" : "limited: no");
        Reach(membership, parent, size - 1);
      }
      Reach(membership, parent, size);
    }));
  }
  const std::string all = absl::StrCat("reached ", size), rest = absl::StrCat("reached ", size - 1);
  for (auto& member : members) EXPECT_EQ(member->LineWith("reached"), all);
  for (auto& member : members) member->Tell("go on");
  Child* limited = nullptr;
  for (auto& member : members) {
    if (member->LineWith("limited") == "limited: yes") limited = member.get();
  }
  ASSERT_NE(limited, nullptr);
  for (auto& member : members) {
    if (member.get() == limited) continue;
    EXPECT_EQ(member->LineWith("reached"), rest);
  }
  for (auto& member : members) member->Tell("go on");
  for (auto& member : members) EXPECT_EQ(member->LineWith("reached"), all);
}

// With enough to connect but not to work, a member breaks each epoch that has it: not again and again.
TEST(NoMemory, AMemberThatBreaksEpochsStandsBack) {
  constexpr absl::Duration kTimeout = absl::Milliseconds(400);
  ElasticJob job({.size_min = 2, .heartbeat_timeout = kTimeout});
  job.StartCoordinator();
  const auto other =
      job.StartMember([](Membership& membership, Child::Parent& parent) { Reach(membership, parent, 2); });
  const auto limited = job.StartMember([&](Membership& membership, Child::Parent& parent) {
    absl::Time begin;
    {
      const MemoryLimit limit(4096);
      for (int i = 0; i < 2; ++i) {
        begin = absl::Now();
        const auto epoch = membership.NextEpoch(absl::Now() + absl::Seconds(30));
        parent.Say(absl::StrCat("broken: ", epoch.status().ToString()));
      }
    }
    const auto epoch = membership.NextEpoch(absl::Now() + absl::Seconds(30));
    parent.Say(absl::Now() - begin >= kTimeout ? "stood back" : "came back at once");
    parent.Say(epoch.ok() ? Sum(**epoch) : epoch.status().ToString());
    Reach(membership, parent, 2);
  });
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(limited->LineWith("broken"),
                AllOf(StartsWith("broken: RESOURCE_EXHAUSTED: epoch "), HasSubstr("File too large")));
  }
  EXPECT_EQ(limited->Line(), "stood back");
  EXPECT_EQ(limited->Line(), "sum is right");
  EXPECT_EQ(other->LineWith("reached"), "reached 2");
}

// Its own lack is the allocating rank's alone; of a peer that cannot take what is shared with it all must
// hear.
TEST(NoDescriptorsToShare, AllocatingFailsHereAlone) {
  SKIP_IF_CHECKS_NEED_DESCRIPTORS();
  RankProcesses ranks(RankOptions(0, 2, "auto", UniqueRendezvous()),
                      [](Communicator& group, const RankProcesses::Say& say) {
                        (void)Sum(group);
                        if (group.index() == 1) {
                          for (int spare = 0; spare < 2; ++spare) {
                            const DescriptorLimit limit(spare);
                            say(group.Allocate({1 << 20}, DType::kF32).status().ToString());
                          }
                        }
                        say(Sum(group));
                      });
  for (int spare = 0; spare < 2; ++spare) {
    EXPECT_THAT(ranks.Line(1), AllOf(StartsWith("RESOURCE_EXHAUSTED: allocate 4194304 bytes"), Lack()));
  }
  for (int rank = 0; rank < 2; ++rank) EXPECT_EQ(ranks.Line(rank), "sum is right");
}

TEST(NoDescriptorsToShare, APeerThatCannotTakeSharedMemoryEndsTheGroupAndSaysSo) {
  SKIP_IF_CHECKS_NEED_DESCRIPTORS();
  RankProcesses ranks(RankOptions(0, 2, "auto", UniqueRendezvous()),
                      [](Communicator& group, const RankProcesses::Say& say) {
                        std::unique_ptr<DescriptorLimit> limit;
                        if (group.index() == 1) limit = std::make_unique<DescriptorLimit>(0);
                        absl::Status status;
                        std::vector<Tensor> tensors;
                        while (status.ok()) {
                          if (group.index() == 1) {
                            limit->Fill();
                          } else {
                            const absl::StatusOr<Tensor> tensor = group.Allocate({100'000}, DType::kF32);
                            status = tensor.status();
                            if (status.ok()) tensors.push_back(*tensor);
                          }
                          if (status.ok()) status = group.Barrier({}).Await();
                        }
                        say(status.ToString());
                      });
  for (int rank = 0; rank < 2; ++rank)
    EXPECT_THAT(ranks.Line(rank), AllOf(StartsWith("ABORTED"), HasSubstr("rank 1 (pid "), Lack()));
}

}  // namespace
}  // namespace shoal
