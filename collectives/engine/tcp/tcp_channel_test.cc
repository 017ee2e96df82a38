#include "collectives/engine/tcp/tcp_channel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "collectives/transport/clock.h"
#include "collectives/transport/data_frame.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kEpoch = 7;

int64_t Soon() { return NowNs() + 30'000'000'000; }

// A group whose end the test decides.
class TestLife final : public GroupLife {
 public:
  TestLife(uint64_t key, std::vector<int> ranks, int index) : GroupLife(key, std::move(ranks), index) {}
  absl::Status status() const override {
    return Ended() ? absl::AbortedError("the test ended it") : absl::OkStatus();
  }
  absl::Status End(const std::string&) override {
    ended_.store(true);
    return status();
  }
};

struct Network {
  int flows = 1;
  int family = AF_INET;
  int buffer_bytes = 0;  // Of every socket; 0: as the system has it.
};

// Connects `flows` TCP connections over the loopback interface; both ends.
std::pair<std::vector<Fd>, std::vector<Fd>> ConnectPair(const Network& network) {
  std::pair<std::vector<Fd>, std::vector<Fd>> ends;
  Fd listener = *Listen(AnyAddress(network.family, /*loopback_only=*/true));
  for (int flow = 0; flow < network.flows; ++flow) {
    Fd dialled = *Dial(LocalAddressOf(listener.get()), Soon());
    EXPECT_TRUE(PollOne(listener.get(), /*POLLIN*/ 1, Soon()));
    Fd accepted = *Accept(listener.get());
    for (const int fd : {dialled.get(), accepted.get()}) {
      if (network.buffer_bytes == 0) continue;
      (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &network.buffer_bytes, sizeof(int));
      (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &network.buffer_bytes, sizeof(int));
    }
    ends.first.push_back(std::move(dialled));
    ends.second.push_back(std::move(accepted));
  }
  return ends;
}

// Connections between `size` ranks: result[rank][peer].
std::vector<std::vector<DataPeer>> ConnectRanks(int size, const Network& network) {
  std::vector<std::vector<DataPeer>> ranks(size);
  for (auto& peers : ranks) {
    for (int peer = 0; peer < size; ++peer) peers.push_back({absl::StrCat("rank ", peer), {}});
  }
  for (int low = 0; low < size; ++low) {
    for (int high = low + 1; high < size; ++high) {
      auto [a, b] = ConnectPair(network);
      ranks[low][high].flows = std::move(a);
      ranks[high][low].flows = std::move(b);
    }
  }
  return ranks;
}

std::vector<std::unique_ptr<DataMesh>> Meshes(int size, const Network& network) {
  std::vector<std::unique_ptr<DataMesh>> meshes;
  for (auto& peers : ConnectRanks(size, network))
    meshes.push_back(*DataMesh::Create(kEpoch, std::move(peers)));
  return meshes;
}

std::vector<int> All(int size) {
  std::vector<int> ranks(size);
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// Polls until `count` events are there or the channel fails.
absl::Status Await(Channel& channel, size_t count, std::vector<Channel::Event>* events) {
  const int64_t deadline_ns = Soon();
  while (true) {
    if (absl::Status status = channel.Poll(events); !status.ok()) return status;
    if (events->size() >= count) return absl::OkStatus();
    if (NowNs() > deadline_ns)
      return absl::DeadlineExceededError(absl::StrCat(events->size(), " of ", count, " events"));
    (void)channel.Wait(deadline_ns);
  }
}

std::vector<std::byte> Pattern(uint64_t seed, int64_t bytes) {
  std::vector<std::byte> result(bytes);
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (int64_t i = 0; i < bytes; ++i) {
    if (i % 8 == 0) state = state * 6364136223846793005u + 1442695040888963407u;
    result[i] = static_cast<std::byte>(state >> (8 * (i % 8)));
  }
  return result;
}

// What both sides of a random exchange know.
struct Plan {
  struct Message {
    int from, to;
    MessageId id;
    int64_t bytes;
    bool view;
    uint64_t seed;
  };
  std::vector<Message> messages;

  Plan(uint32_t seed, int ranks, int count) {
    std::mt19937 random(seed);
    for (int i = 0; i < count; ++i) {
      Message message = {};
      message.from = static_cast<int>(random() % ranks);
      message.to = (message.from + 1 + static_cast<int>(random() % (ranks - 1))) % ranks;
      message.id = {1 + random() % 3, static_cast<uint32_t>(i), 5};
      const int64_t sizes[] = {0, 8, 1000, 5000, kEagerBytesMax, kEagerBytesMax + 1, 100'000, 3'000'000};
      message.bytes = sizes[random() % 8];
      message.view = random() % 2 == 0;
      message.seed = random();
      messages.push_back(message);
    }
  }
};

// One rank's part of the plan, in an order of its own.
void RunPlan(Channel& channel, int rank, const Plan& plan, uint32_t order_seed) {
  std::map<uint64_t, std::vector<std::byte>> memory;
  std::vector<int> mine;
  for (int i = 0; i < static_cast<int>(plan.messages.size()); ++i) {
    if (plan.messages[i].from == rank || plan.messages[i].to == rank) mine.push_back(i);
  }
  std::mt19937 random(order_seed);
  std::shuffle(mine.begin(), mine.end(), random);
  std::vector<Channel::Event> events;
  for (int i : mine) {
    const Plan::Message& message = plan.messages[i];
    if (message.from == rank) {
      memory[i] = Pattern(message.seed, message.bytes);
      channel.Send(message.to, message.id, memory[i].data(), message.bytes, i);
    } else if (message.view) {
      channel.ReceiveView(message.from, message.id, message.bytes, i);
    } else {
      memory[i].resize(message.bytes);
      channel.Receive(message.from, message.id, memory[i].data(), message.bytes, i);
    }
    if (random() % 4 == 0) {
      ASSERT_TRUE(channel.Poll(&events).ok());
    }
  }
  ASSERT_EQ(Await(channel, mine.size(), &events).ToString(), "OK");
  std::set<uint64_t> seen;
  for (const Channel::Event& event : events) {
    EXPECT_TRUE(seen.insert(event.token).second) << "twice";
    const Plan::Message& message = plan.messages[event.token];
    if (message.to != rank) continue;
    const std::vector<std::byte> wanted = Pattern(message.seed, message.bytes);
    const std::byte* got = message.view ? event.view : memory[event.token].data();
    EXPECT_TRUE(message.bytes == 0 || std::memcmp(got, wanted.data(), message.bytes) == 0)
        << message.bytes << " bytes";
    if (message.view) channel.Release(message.from, message.id, event.view);
  }
}

struct Case {
  const char* name;
  int ranks;
  Network network;
  int messages;
};

class RandomExchange : public testing::TestWithParam<Case> {};

TEST_P(RandomExchange, EveryMessageArrivesWholeInAnyOrder) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  const int ranks = GetParam().ranks;
  const auto meshes = Meshes(ranks, GetParam().network);
  const Plan plan(seed, ranks, GetParam().messages);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      TestLife life(/*key=*/1, All(ranks), rank);
      TcpChannel channel(meshes[rank].get(), &life);
      RunPlan(channel, rank, plan, seed + rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

INSTANTIATE_TEST_SUITE_P(Networks, RandomExchange,
                         testing::Values(Case{"OneFlow", 2, {}, 120}, Case{"FourFlows", 2, {.flows = 4}, 120},
                                         Case{"FiveRanks", 5, {.flows = 2}, 150},
                                         Case{"Ipv6", 2, {.family = AF_INET6}, 60},
                                         Case{"TinyBuffers", 3, {.flows = 2, .buffer_bytes = 16 << 10}, 40}),
                         [](const auto& info) { return info.param.name; });

TEST(TcpChannel, GroupsOnManyThreadsShareTheConnections) {
  constexpr int kRanks = 2, kGroups = 4;
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  const auto meshes = Meshes(kRanks, {.flows = 2});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    for (int group = 0; group < kGroups; ++group) {
      threads.emplace_back([&, rank, group] {
        const Plan plan(seed + group, kRanks, 60);
        TestLife life(group, All(kRanks), rank);
        TcpChannel channel(meshes[rank].get(), &life);
        RunPlan(channel, rank, plan, seed + 31 * rank + group);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

// Two ranks in one thread: who waits for whom is decided line by line.
class TwoRanks : public testing::Test {
 protected:
  explicit TwoRanks(Network network = {}) : meshes_(Meshes(2, network)) {}
  // Until nothing more moves between the two.
  void Settle() {
    std::vector<Channel::Event> unused;
    for (int i = 0; i < 50; ++i) {
      for (auto& [key, pair] : channels_) {
        for (int rank = 0; rank < 2; ++rank) (void)pair[rank]->Poll(&events_[key][rank]);
      }
    }
  }
  TcpChannel& At(int rank, uint64_t group = 1) {
    if (!channels_.contains(group)) {
      for (int r = 0; r < 2; ++r) {
        lives_[group].push_back(std::make_unique<TestLife>(group, All(2), r));
        channels_[group].push_back(std::make_unique<TcpChannel>(meshes_[r].get(), lives_[group][r].get()));
      }
      events_[group].resize(2);
    }
    return *channels_[group][rank];
  }
  std::vector<Channel::Event>& Events(int rank, uint64_t group = 1) { return events_[group][rank]; }

  std::vector<std::unique_ptr<DataMesh>> meshes_;
  std::map<uint64_t, std::vector<std::unique_ptr<TestLife>>> lives_;
  std::map<uint64_t, std::vector<std::unique_ptr<TcpChannel>>> channels_;
  std::map<uint64_t, std::vector<std::vector<Channel::Event>>> events_;
  std::vector<std::byte> memory_ = std::vector<std::byte>(8 << 20);
};

TEST_F(TwoRanks, AnotherSignatureIsAPreconditionThatNamesThePeer) {
  At(0).Send(1, {3, 9, /*signature=*/111}, memory_.data(), 8, 1);
  At(1).Receive(0, {3, 9, /*signature=*/222}, memory_.data() + 8, 8, 2);
  Settle();
  std::vector<Channel::Event> events;
  const absl::Status status = At(1).Poll(&events);
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
  EXPECT_EQ(At(1).mismatch().member, 0);
  EXPECT_EQ(At(1).mismatch().ours.signature, 222u);
  EXPECT_EQ(At(1).mismatch().theirs.signature, 111u);
}

TEST_F(TwoRanks, AnotherSignatureOfTheSameOperationIsFoundWhateverTheTag) {
  At(1).Receive(0, {3, 1, 222}, memory_.data(), 100'000, 2);
  At(0).Receive(1, {3, 2, 111}, memory_.data(), 100'000, 2);
  Settle();
  std::vector<Channel::Event> events;
  EXPECT_TRUE(absl::IsFailedPrecondition(At(1).Poll(&events)));
  EXPECT_TRUE(absl::IsFailedPrecondition(At(0).Poll(&events)));
}

TEST_F(TwoRanks, AnotherSizeIsAPrecondition) {
  for (const int64_t bytes : {int64_t{8}, int64_t{200'000}}) {
    const uint64_t group = bytes;
    At(0, group).Send(1, {1, 1, 1}, memory_.data(), bytes, 1);
    At(1, group).Receive(0, {1, 1, 1}, memory_.data() + (4 << 20), bytes + 4, 2);
    Settle();
    std::vector<Channel::Event> events;
    const absl::Status status = At(1, group).Poll(&events);
    // With a large message the sender hears first what the receiver wants.
    const absl::Status other = At(0, group).Poll(&events);
    EXPECT_TRUE(absl::IsFailedPrecondition(status) || absl::IsFailedPrecondition(other)) << status << other;
  }
}

TEST_F(TwoRanks, AMessageOfAFinishedOperationIsAnError) {
  At(0).Send(1, {3, 1, 5}, memory_.data(), 8, 1);
  At(1).Finish({3, 0, 5});
  Settle();
  std::vector<Channel::Event> events;
  EXPECT_TRUE(absl::IsFailedPrecondition(At(1).Poll(&events)));
}

TEST_F(TwoRanks, AGroupThatDoesNotReceiveHoldsUpNoOtherGroup) {
  // Far more than any socket and window holds, small and large.
  constexpr int kSmall = 2000;
  At(0, 1).Send(1, {1, 0, 1}, memory_.data(), memory_.size(), 0);
  for (int i = 1; i <= kSmall; ++i)
    At(0, 1).Send(1, {1, static_cast<uint32_t>(i), 1}, memory_.data(), 20'000, i);
  Settle();
  std::vector<std::byte> to(8);
  At(0, 2).Send(1, {1, 1, 1}, memory_.data(), 8, 7);
  At(1, 2).Receive(0, {1, 1, 1}, to.data(), 8, 8);
  Settle();
  EXPECT_EQ(Events(1, 2).size(), 1u);
  EXPECT_LT(Events(0, 1).size(), 300u);  // The window: 4 MiB.
  // And when it does receive, all of it comes.
  std::vector<std::byte> large(memory_.size()), small(20'000);
  At(1, 1).Receive(0, {1, 0, 1}, large.data(), large.size(), 0);
  for (int i = 1; i <= kSmall; ++i)
    At(1, 1).Receive(0, {1, static_cast<uint32_t>(i), 1}, small.data(), 20'000, i);
  const int64_t deadline_ns = Soon();
  while (Events(1, 1).size() < kSmall + 1 && NowNs() < deadline_ns) Settle();
  EXPECT_EQ(Events(1, 1).size(), kSmall + 1u);
  EXPECT_EQ(Events(0, 1).size(), kSmall + 1u);
}

TEST_F(TwoRanks, AnEndedGroupTouchesNoMemoryAndOthersGoOn) {
  auto borrowed = std::make_unique<std::vector<std::byte>>(8 << 20),
       into = std::make_unique<std::vector<std::byte>>(8 << 20);
  At(0, 1).Send(1, {1, 1, 1}, borrowed->data(), borrowed->size(), 1);
  At(1, 1).Receive(0, {1, 1, 1}, into->data(), into->size(), 1);
  std::vector<Channel::Event> events, received;
  ASSERT_TRUE(At(1, 1).Poll(&received).ok());
  ASSERT_TRUE(At(0, 1).Poll(&events).ok());
  ASSERT_TRUE(At(1, 1).Poll(&received).ok());
  ASSERT_TRUE(received.empty()) << "It was to be ended in the middle.";
  for (int rank = 0; rank < 2; ++rank) {
    (void)lives_[1][rank]->End("");
    EXPECT_TRUE(absl::IsAborted(At(rank, 1).Poll(&events)));
  }
  borrowed.reset();  // AddressSanitizer watches.
  into.reset();
  std::vector<std::byte> to(1 << 20);
  At(0, 2).Send(1, {1, 1, 1}, memory_.data(), to.size(), 7);
  At(1, 2).Receive(0, {1, 1, 1}, to.data(), to.size(), 8);
  Settle();
  EXPECT_EQ(Events(1, 2).size(), 1u);
}

TEST_F(TwoRanks, WhatCameForAGroupBeforeItWasOpenedIsThere) {
  TestLife life_0(5, All(2), 0), life_1(5, All(2), 1);
  TcpChannel sender(meshes_[0].get(), &life_0);
  sender.Send(1, {1, 1, 1}, memory_.data(), 8, 1);
  (void)At(0);  // Some group, so that both meshes are polled.
  std::vector<Channel::Event> events;
  ASSERT_EQ(Await(sender, 1, &events).ToString(), "OK");
  Settle();
  TcpChannel receiver(meshes_[1].get(), &life_1);
  receiver.ReceiveView(0, {1, 1, 1}, 8, 2);
  events.clear();
  ASSERT_EQ(Await(receiver, 1, &events).ToString(), "OK");
  EXPECT_NE(events[0].view, nullptr);
}

TEST_F(TwoRanks, AwaitedNamesTheMembers) {
  EXPECT_TRUE(At(0).Awaited().empty());
  At(0).Receive(1, {1, 1, 1}, memory_.data(), 8, 1);
  EXPECT_THAT(At(0).Awaited(), ElementsAre(1));
}

TEST_F(TwoRanks, WakeEndsAWaitAlsoTheNextOne) {
  At(0).Wake();
  const int64_t begin_ns = NowNs();
  EXPECT_TRUE(At(0).Wait(Soon()).ok());
  std::thread waker([&] { At(0).Wake(); });
  EXPECT_TRUE(At(0).Wait(Soon()).ok());
  waker.join();
  EXPECT_LT(NowNs() - begin_ns, 10'000'000'000);
}

TEST_F(TwoRanks, WaitEndsAtItsTime) {
  const int64_t until_ns = NowNs() + 20'000'000;
  EXPECT_TRUE(At(0).Wait(until_ns).ok());
  EXPECT_GE(NowNs(), until_ns);
}

TEST_F(TwoRanks, AWaitForAClosedPeerFailsAndNamesIt) {
  At(0).Receive(1, {1, 1, 1}, memory_.data(), 8, 1);
  channels_[1][1].reset();
  meshes_[1].reset();
  std::vector<Channel::Event> events;
  const absl::Status status = Await(At(0), 1, &events);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1: data connection"));
}

// Also when the end of it is still in the kernels when the peer leaves, and the peer is told something meanwhile.
TEST(TcpChannel, WhatAPeerSentBeforeItLeftIsStillReceived) {
  auto meshes = Meshes(2, {.flows = 3});
  const std::vector<std::byte> sent = Pattern(1, 2 << 20);
  std::vector<std::byte> got(sent.size());
  std::atomic<bool> leaving = false;
  std::thread leaver([&] {
    TestLife life(1, All(2), 0);
    {
      TcpChannel channel(meshes[0].get(), &life);
      channel.Send(1, {1, 1, 1}, sent.data(), sent.size(), 1);
      std::vector<Channel::Event> events;
      EXPECT_EQ(Await(channel, 1, &events).ToString(), "OK");
    }
    leaving = true;
    const int64_t begin_ns = NowNs();
    meshes[0]->AwaitDelivery({}, /*patience_ns=*/30'000'000'000);
    EXPECT_LT(NowNs() - begin_ns, 20'000'000'000) << "what had arrived was waited for";
    meshes[0].reset();
  });
  TestLife life(1, All(2), 1);
  TcpChannel channel(meshes[1].get(), &life);
  channel.Receive(0, {1, 1, 1}, got.data(), got.size(), 1);
  std::vector<Channel::Event> events;
  while (!leaving) ASSERT_TRUE(channel.Poll(&events).ok());
  channel.Probe(0, {1, 1, 1});  // Goes out before more is read.
  EXPECT_EQ(Await(channel, 1, &events).ToString(), "OK");
  EXPECT_TRUE(got == sent);
  leaver.join();
}

TEST(TcpChannel, WhatIsSentAfterLeavingFailsAndBlamesNoPeer) {
  auto meshes = Meshes(2, {.flows = 2});
  TestLife life(1, All(2), 0);
  TcpChannel channel(meshes[0].get(), &life);
  meshes[0]->Leave();
  const std::byte data{};
  channel.Send(1, {1, 1, 1}, &data, 1, 1);
  std::vector<Channel::Event> events;
  const absl::Status status = Await(channel, 1, &events);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("this process has left the epoch"));
}

TEST(TcpChannel, ALeavingRankWaitsForNobodyWhoTakesNothing) {
  // While nobody reads the sender's kernel keeps some of it.
  auto meshes = Meshes(3, {.flows = 1, .buffer_bytes = 64 << 10});
  const std::vector<std::byte> sent(130'000);
  std::vector<std::byte> got(sent.size());
  {
    std::vector<Channel::Event> events;
    std::vector<std::unique_ptr<TestLife>> lives;
    std::vector<std::unique_ptr<TcpChannel>> channels;
    for (int rank = 0; rank < 3; ++rank) {
      lives.push_back(std::make_unique<TestLife>(1, All(3), rank));
      channels.push_back(std::make_unique<TcpChannel>(meshes[rank].get(), lives.back().get()));
    }
    for (int rank = 1; rank < 3; ++rank) {
      channels[rank]->Receive(0, {1, 1, 1}, got.data(), got.size(), 1);
      ASSERT_TRUE(channels[rank]->Poll(&events).ok());
      channels[0]->Send(rank, {1, 1, 1}, sent.data(), sent.size(), 1);
    }
    ASSERT_EQ(Await(*channels[0], 2, &events).ToString(), "OK");
  }
  const int64_t begin_ns = NowNs();
  meshes[0]->AwaitDelivery({1, 2}, /*patience_ns=*/30'000'000'000);  // They are dead.
  EXPECT_LT(NowNs() - begin_ns, 10'000'000'000);
  meshes[0]->AwaitDelivery({1}, /*patience_ns=*/50'000'000);
  EXPECT_GT(NowNs() - begin_ns, 50'000'000);
  EXPECT_LT(NowNs() - begin_ns, 20'000'000'000);
}

TEST(TcpChannel, AKilledProcessEndsTheWaitForIt) {
  auto ranks = ConnectRanks(2, {.flows = 2});
  const pid_t child = fork();
  if (child == 0) {
    ranks[0].clear();
    auto mesh = *DataMesh::Create(kEpoch, std::move(ranks[1]));
    TestLife life(1, All(2), 1);
    TcpChannel channel(mesh.get(), &life);
    std::vector<std::byte> bytes(64 << 20);
    channel.Send(0, {1, 1, 1}, bytes.data(), bytes.size(), 1);
    std::vector<Channel::Event> events;
    (void)Await(channel, 2, &events);
    _exit(0);
  }
  ranks[1].clear();
  auto mesh = *DataMesh::Create(kEpoch, std::move(ranks[0]));
  TestLife life(1, All(2), 0);
  TcpChannel channel(mesh.get(), &life);
  std::vector<std::byte> into(64 << 20);
  channel.Receive(1, {1, 1, 1}, into.data(), into.size(), 1);
  std::vector<Channel::Event> events;
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(channel.Poll(&events).ok());
  kill(child, SIGKILL);
  (void)waitpid(child, nullptr, 0);
  const absl::Status status = Await(channel, 1, &events);
  EXPECT_TRUE(status.ok() || absl::IsUnavailable(status)) << status;
}

// One end of a connection in the test's hands, the other one in a mesh.
class Nonsense : public testing::Test {
 protected:
  Nonsense() {
    auto [ours, theirs] = ConnectPair({});
    wire_ = std::move(ours[0]);
    std::vector<DataPeer> peers(2);
    peers[0].name = "rank 0";
    peers[1].name = "rank 1";
    peers[1].flows = std::move(theirs);
    mesh_ = *DataMesh::Create(kEpoch, std::move(peers));
  }
  absl::Status ResultOf(const std::string& bytes) {
    TestLife life(1, All(2), 0);
    TcpChannel channel(mesh_.get(), &life);
    std::byte into[8];
    channel.Receive(1, {1, 1, 1}, into, sizeof into, 1);
    (void)SendAll(wire_.get(), bytes.data(), bytes.size(), Soon());
    std::vector<Channel::Event> events;
    return Await(channel, 1, &events);
  }
  static DataHeader Header(DataType type) {
    DataHeader header = {};
    header.magic = kDataMagic;
    header.type = type;
    header.signature = header.tag = header.op = header.group = 1;
    header.epoch = kEpoch;
    return header;
  }
  static std::string Bytes(const DataHeader& header) {
    return std::string(reinterpret_cast<const char*>(&header), sizeof header);
  }

  Fd wire_;
  std::unique_ptr<DataMesh> mesh_;
};

TEST_F(Nonsense, Garbage) {
  const absl::Status status = ResultOf(std::string(1000, 'x'));
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1: sends bytes that are no frame"));
}

TEST_F(Nonsense, AnotherEpoch) {
  DataHeader header = Header(DataType::kEager);
  header.epoch = 6;
  EXPECT_THAT(std::string(ResultOf(Bytes(header)).message()),
              HasSubstr("rank 1: is in epoch 6, this rank in 7"));
}

TEST_F(Nonsense, ASliceThatNobodyAskedFor) {
  DataHeader header = Header(DataType::kSlice);
  header.tag = 2;
  header.bytes = header.total = 100;
  EXPECT_THAT(std::string(ResultOf(Bytes(header)).message()), HasSubstr("sends data that nobody asked for"));
}

TEST_F(Nonsense, ASliceBeyondItsMessage) {
  DataHeader header = Header(DataType::kSlice);
  header.bytes = 8;
  header.offset = 1;
  header.total = 8;
  EXPECT_TRUE(absl::IsDataLoss(ResultOf(Bytes(header))));
}

TEST_F(Nonsense, TheSameMessageTwice) {
  DataHeader header = Header(DataType::kEager);
  header.tag = 2;
  EXPECT_THAT(std::string(ResultOf(Bytes(header) + Bytes(header)).message()), HasSubstr("one message twice"));
}

TEST(DataMesh, WithoutDescriptorsItSaysSo) {
  auto ranks = ConnectRanks(2, {});
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit none = before;
  none.rlim_cur = 3;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const absl::Status status = DataMesh::Create(kEpoch, std::move(ranks[0])).status();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
}

}  // namespace
}  // namespace shoal
