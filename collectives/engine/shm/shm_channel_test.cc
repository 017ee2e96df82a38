#include "collectives/engine/shm/shm_channel.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "collectives/engine/shm/group_page.h"
#include "collectives/engine/shm/shm_ranks.h"
#include "collectives/engine/shm/shm_ring.h"

namespace shoal {
namespace {

constexpr int64_t kMinuteNs = 60'000'000'000;

// Memory of one rank: shared or its own.
struct Buffer {
  Buffer(SharedMemory& memory, int64_t bytes, bool shared) : size(bytes) {
    if (shared) {
      holder = *memory.Allocate(bytes);
      data = static_cast<std::byte*>(holder.get());
    } else {
      own.resize(bytes + 1);
      data = own.data();
    }
  }
  int64_t size;
  std::shared_ptr<void> holder;
  std::vector<std::byte> own;
  std::byte* data = nullptr;
};

std::byte Pattern(uint64_t seed, int64_t i) {
  return static_cast<std::byte>((seed * 131 + i * 7 + (i >> 8)) & 0xff);
}

void Fill(std::byte* data, int64_t bytes, uint64_t seed) {
  for (int64_t i = 0; i < bytes; ++i) data[i] = Pattern(seed, i);
}

bool Matches(const std::byte* data, int64_t bytes, uint64_t seed) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (data[i] != Pattern(seed, i)) return false;
  }
  return true;
}

// Polls and waits until `count` more events came.
std::vector<Channel::Event> Events(Channel& channel, size_t count) {
  std::vector<Channel::Event> events;
  while (true) {
    const absl::Status status = channel.Poll(&events);
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok() || events.size() >= count) return events;
    EXPECT_TRUE(channel.Wait(NowNs() + kMinuteNs).ok());
  }
}

absl::Status UntilError(Channel& channel) {
  std::vector<Channel::Event> events;
  while (true) {
    absl::Status status = channel.Poll(&events);
    if (status.ok()) status = channel.Wait(NowNs() + kMinuteNs);
    if (!status.ok()) return status;
  }
}

struct Message {
  int from, to;
  MessageId id;
  int64_t bytes;
  bool shared, view, lent;
};

std::vector<Message> RandomMessages(int ranks, int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto up_to = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  std::vector<Message> messages;
  for (int i = 0; i < count; ++i) {
    Message m;
    m.from = up_to(ranks);
    m.to = (m.from + 1 + up_to(ranks - 1)) % ranks;
    m.id = {i % 3 == 0 ? (uint64_t{1} << 63) + i : 1 + static_cast<uint64_t>(i / 20),
            static_cast<uint32_t>(i), 7};
    const int64_t kinds[] = {up_to(60), up_to(700), up_to(100'000), up_to(700'000)};
    m.bytes = kinds[up_to(i % 10 == 0 ? 4 : 3)];
    m.shared = up_to(2) == 0;
    m.view = up_to(2) == 0;
    m.lent = i % 3 != 0 && up_to(3) == 0;
    messages.push_back(m);
  }
  return messages;
}

// One rank's part of the messages, posted in an order of its own, some at a time.
absl::Status RunMessages(std::shared_ptr<HostGroup> group, const std::vector<Message>& messages,
                         uint64_t seed) {
  const int rank = group->own_seat();
  ShmChannel channel(group);
  std::mt19937_64 random(seed + 1 + rank);
  std::vector<size_t> order;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].from == rank || messages[i].to == rank) order.push_back(i);
  }
  std::shuffle(order.begin(), order.end(), random);
  std::map<size_t, Buffer> buffers;
  size_t posted = 0, ended = 0, expected = order.size();
  for (size_t i : order) expected += messages[i].lent && messages[i].to == rank ? 1 : 0;  // Given back.
  while (ended < expected) {
    for (size_t n = random() % 50; n > 0 && posted < order.size(); --n, ++posted) {
      const size_t i = order[posted];
      const Message& m = messages[i];
      if (m.from == rank) {
        Buffer& buffer = buffers.try_emplace(i, group->memory(), m.bytes, m.shared).first->second;
        Fill(buffer.data, m.bytes, seed + i);
        if (m.lent) {
          channel.Lend(m.to, m.id, buffer.data, m.bytes, i);
        } else {
          channel.Send(m.to, m.id, buffer.data, m.bytes, i);
        }
      } else if (m.lent) {
        channel.Borrow(m.from, m.id, m.bytes, i);
      } else if (m.view) {
        channel.ReceiveView(m.from, m.id, m.bytes, i);
      } else {
        Buffer& buffer = buffers.try_emplace(i, group->memory(), m.bytes, m.shared).first->second;
        channel.Receive(m.from, m.id, buffer.data, m.bytes, i);
      }
    }
    std::vector<Channel::Event> events;
    SHOAL_RETURN_IF_ERROR(channel.Poll(&events));
    for (const Channel::Event& event : events) {
      const Message& m = messages[event.token];
      ++ended;
      if (m.from == rank) {
        // The buffer is this rank's again.
        Buffer& buffer = buffers.at(event.token);
        EXPECT_TRUE(Matches(buffer.data, m.bytes, seed + event.token + (m.lent ? 1000 : 0))) << "message " << event.token;
        std::fill_n(buffer.data, m.bytes, std::byte{0xee});
      } else if (m.lent) {
        if (event.view == nullptr) continue;
        EXPECT_TRUE(Matches(event.view, m.bytes, seed + event.token)) << "message " << event.token;
        EXPECT_TRUE(channel.BeginWrite(0, m.bytes));
        Fill(const_cast<std::byte*>(event.view), m.bytes, seed + event.token + 1000);
        EXPECT_TRUE(channel.EndWrite());
        channel.GiveBack(m.from, m.id, event.view);
      } else if (m.view) {
        EXPECT_TRUE(Matches(event.view, m.bytes, seed + event.token)) << "message " << event.token;
        channel.Release(m.from, m.id, event.view);
      } else {
        EXPECT_TRUE(Matches(buffers.at(event.token).data, m.bytes, seed + event.token))
            << "message " << event.token;
      }
      buffers.erase(event.token);
    }
    if (events.empty() && posted == order.size()) SHOAL_RETURN_IF_ERROR(channel.Wait(NowNs() + kMinuteNs));
  }
  EXPECT_TRUE(channel.Awaited().empty());
  // The last answers are written by a poll.
  std::vector<Channel::Event> none;
  return channel.Poll(&none);
}

class Ranks : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, Ranks, ::testing::Values(2, 3, 5, 17));

TEST_P(Ranks, RandomMessagesArriveWhateverTheOrderOfPosting) {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device()();
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  ShmRanks ranks(GetParam());
  const std::vector<Message> messages = RandomMessages(GetParam(), 200 * std::min(GetParam(), 6), seed);
  OnThreads(GetParam(), [&](int rank) {
    const absl::Status status = RunMessages(ranks.groups[rank], messages, seed);
    EXPECT_TRUE(status.ok()) << status;
  });
}

TEST_P(Ranks, ProcessesExchangeMessages) {
  ShmRanks ranks(GetParam());
  std::vector<Message> messages = RandomMessages(GetParam(), 100 * std::min(GetParam(), 6), /*seed=*/5);
  // A process forked cannot announce new memory here.
  for (Message& m : messages) {
    m.bytes = std::min<int64_t>(m.bytes, 512);
    m.shared = m.shared && !m.lent;
  }
  std::vector<pid_t> children;
  for (int rank = 0; rank < GetParam(); ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      const absl::Status status = RunMessages(ranks.groups[rank], messages, 5);
      _exit(status.ok() && !::testing::Test::HasFailure() ? 0 : 1);
    }
    children.push_back(pid);
  }
  for (const pid_t pid : children) {
    int result = -1;
    waitpid(pid, &result, 0);
    EXPECT_EQ(result, 0);
  }
}

class Pair : public ::testing::Test {
 protected:
  ShmRanks ranks{2};
  ShmChannel a{ranks.groups[0]}, b{ranks.groups[1]};
  std::vector<Channel::Event> events;
};

TEST_F(Pair, AViewOfSharedMemoryIsTheSendersMemory) {
  Buffer buffer(*ranks.memories[0], 1 << 20, true);
  Fill(buffer.data, buffer.size, 1);
  a.Send(1, {1, 0}, buffer.data, buffer.size, 10);
  b.ReceiveView(0, {1, 0}, buffer.size, 20);
  const std::vector<Channel::Event> views = Events(b, 1);
  ASSERT_EQ(views[0].token, 20u);
  EXPECT_TRUE(Matches(views[0].view, buffer.size, 1));
  buffer.data[5] = std::byte{77};
  EXPECT_EQ(views[0].view[5], std::byte{77});
  ASSERT_TRUE(a.Poll(&events).ok());
  EXPECT_TRUE(events.empty()) << "borrowed until it is released";
  EXPECT_EQ(a.Awaited(), std::vector<int>{1});
  b.Release(0, {1, 0}, views[0].view);
  ASSERT_TRUE(b.Poll(&events).ok());
  EXPECT_EQ(Events(a, 1)[0].token, 10u);
  EXPECT_TRUE(a.Awaited().empty());
}

TEST_F(Pair, ThousandsOfMessagesThatNobodyAskedForYetWait) {
  constexpr int kCount = 5000;
  std::thread sender([&] {
    for (int i = 0; i < kCount; ++i) {
      const std::string text(i % 100, static_cast<char>('a' + i % 26));
      a.Send(1, {1, static_cast<uint32_t>(i)}, reinterpret_cast<const std::byte*>(text.data()), text.size(),
             i);
      Events(a, 1);
    }
  });
  for (int i = kCount - 1; i >= 0; --i) {
    char text[100] = {};
    b.Receive(0, {1, static_cast<uint32_t>(i)}, reinterpret_cast<std::byte*>(text), i % 100, i);
    ASSERT_EQ(Events(b, 1)[0].token, static_cast<uint64_t>(i));
    ASSERT_EQ(std::string(text, i % 100), std::string(i % 100, static_cast<char>('a' + i % 26)));
  }
  sender.join();
}

constexpr int kMoreThanARing = 60;

void SendMoreThanARing(ShmChannel& channel, int to, uint64_t op) {
  static const std::byte bytes[Record::kInlineMax] = {};
  for (uint32_t i = 0; i < kMoreThanARing; ++i) channel.Send(to, {op, i}, bytes, sizeof bytes, 0);
}

void PollUntil(ShmChannel& channel, uint64_t token) {
  std::vector<Channel::Event> events;
  const auto is_it = [token](const Channel::Event& event) { return event.token == token; };
  while (std::none_of(events.begin(), events.end(), is_it)) ASSERT_TRUE(channel.Poll(&events).ok());
}

TEST_F(Pair, AReaderWakesWhoSleepsForRoom) {
  SendMoreThanARing(a, 1, 1);
  ASSERT_TRUE(a.Poll(&events).ok());
  ASSERT_LT(events.size(), static_cast<size_t>(kMoreThanARing));
  const uint32_t seen = ranks.groups[0]->PrepareSleep();
  std::byte into[Record::kInlineMax];
  for (uint32_t i = 0; i < kMoreThanARing; ++i) b.Receive(0, {1, i}, into, sizeof into, i);
  ASSERT_TRUE(b.Poll(&events).ok());
  EXPECT_NE(ranks.groups[0]->page(0).doorbell, seen);
  ranks.groups[0]->CancelSleep();
}

TEST(ShmChannel, AFullRingIsNoNewsAndBlocksNoOther) {
  ShmRanks ranks(3);
  ShmChannel a(ranks.groups[0]), b(ranks.groups[1]), c(ranks.groups[2]);
  std::vector<Channel::Event> none;
  const std::vector<std::byte> large(1 << 20, std::byte{5});
  std::vector<std::byte> to_b(large.size()), to_c(large.size());
  a.Send(1, {1, 0}, large.data(), large.size(), 10);
  a.Send(2, {1, 0}, large.data(), large.size(), 11);
  b.Receive(0, {1, 0}, to_b.data(), to_b.size(), 20);
  c.Receive(0, {1, 0}, to_c.data(), to_c.size(), 30);
  ASSERT_TRUE(b.Poll(&none).ok() && c.Poll(&none).ok());  // Both ask for it.
  SendMoreThanARing(a, 1, 2);
  std::thread other([&] { Events(c, 1); });
  PollUntil(a, 11);
  other.join();
  EXPECT_EQ(to_c, large);
  const int64_t until_ns = NowNs() + 5'000'000;
  ASSERT_TRUE(a.Wait(until_ns).ok());
  EXPECT_GE(NowNs(), until_ns) << "nothing can be done";

  std::thread reader([&] { Events(b, 1); });
  PollUntil(a, 10);
  reader.join();
  EXPECT_EQ(to_b, large);
}

TEST_F(Pair, PrivateMemoryThatNobodyWantsBlocksNoOther) {
  // Far more than there are staging slots.
  std::vector<std::vector<std::byte>> unwanted(40, std::vector<std::byte>(100'000));
  for (size_t i = 0; i < unwanted.size(); ++i) {
    Fill(unwanted[i].data(), unwanted[i].size(), i);
    a.Send(1, {2, static_cast<uint32_t>(i)}, unwanted[i].data(), unwanted[i].size(), i);
  }
  std::vector<std::byte> wanted(1'000'000), got(wanted.size());
  Fill(wanted.data(), wanted.size(), 99);
  a.Send(1, {1, 0}, wanted.data(), wanted.size(), 99);
  std::thread sender([&] { Events(a, unwanted.size() + 1); });
  b.Receive(0, {1, 0}, got.data(), got.size(), 1);
  Events(b, 1);
  EXPECT_TRUE(Matches(got.data(), got.size(), 99));
  for (size_t i = 0; i < unwanted.size(); ++i) {
    b.Receive(0, {2, static_cast<uint32_t>(i)}, got.data(), 100'000, 2);
    Events(b, 1);
    EXPECT_TRUE(Matches(got.data(), 100'000, i));
  }
  sender.join();
}

TEST_F(Pair, WhatWasReadFromAnEndedRankDoesNotCount) {
  Buffer buffer(*ranks.memories[0], 1 << 16, true);
  a.Send(1, {1, 0}, buffer.data, buffer.size, 10);
  b.ReceiveView(0, {1, 0}, buffer.size, 20);
  const std::vector<Channel::Event> views = Events(b, 1);
  (void)ranks.lives[0]->End("rank 7 stumbled");
  EXPECT_TRUE(a.Poll(&events).code() == absl::StatusCode::kAborted);
  b.Release(0, {1, 0}, views[0].view);
  const absl::Status status = b.Poll(&events);
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  EXPECT_EQ(status.message(), "rank 7 stumbled");
  EXPECT_TRUE(events.empty());
  EXPECT_TRUE(ranks.lives[1]->Ended());
}

// As a peer does whose group has ended, before this rank has heard of it.
TEST_F(Pair, WhatIsBeingReadStaysMappedWhenItsOwnerFreesIt) {
  constexpr int64_t kBytes = 4 << 20;  // Takes several polls.
  const auto viewed = std::make_unique<Buffer>(*ranks.memories[0], kBytes, true);
  const auto copied = std::make_unique<Buffer>(*ranks.memories[0], kBytes, true);
  Buffer other(*ranks.memories[0], 1 << 16, true);
  Fill(viewed->data, kBytes, 1);
  Fill(copied->data, kBytes, 2);
  std::vector<std::byte> got(kBytes), more(other.size);
  a.Send(1, {1, 0}, viewed->data, kBytes, 10);
  a.Send(1, {1, 1}, copied->data, kBytes, 11);
  b.ReceiveView(0, {1, 0}, kBytes, 20);
  b.Receive(0, {1, 1}, got.data(), kBytes, 21);
  ASSERT_TRUE(b.Poll(&events).ok());
  ASSERT_EQ(events.size(), 1u);
  viewed->holder.reset();
  copied->holder.reset();
  a.Send(1, {1, 2}, other.data, other.size, 12);  // Has the receiver look for memory again.
  b.Receive(0, {1, 2}, more.data(), other.size, 22);
  Events(b, 2);
  EXPECT_TRUE(Matches(got.data(), kBytes, 2));
  EXPECT_TRUE(Matches(events[0].view, kBytes, 1));
  b.Release(0, {1, 0}, events[0].view);
}

TEST_F(Pair, ACopyFromAnEndedRankIsNotReceived) {
  Buffer buffer(*ranks.memories[0], 1 << 16, true);
  a.Send(1, {1, 0}, buffer.data, buffer.size, 10);
  (void)ranks.lives[0]->End("it is over");
  std::vector<std::byte> got(buffer.size);
  b.Receive(0, {1, 0}, got.data(), got.size(), 20);
  EXPECT_TRUE(absl::IsAborted(b.Poll(&events)));
  EXPECT_TRUE(events.empty());
}

TEST_F(Pair, AWaitEndsWithTheGroupHereAndThere) {
  for (const int who : {0, 1}) {
    ShmRanks two(2);
    ShmChannel waiting(two.groups[0]);
    std::byte into[8];
    waiting.Receive(1, {1, 0}, into, 8, 0);
    std::thread end([&] { (void)two.lives[who]->End("enough"); });
    EXPECT_TRUE(absl::IsAborted(UntilError(waiting)));
    end.join();
  }
}

TEST_F(Pair, AWaitEndsByWakeAndByItsTime) {
  const int64_t begin = NowNs();
  EXPECT_TRUE(a.Wait(begin + 5'000'000).ok());
  EXPECT_GE(NowNs() - begin, 5'000'000);
  a.Wake();
  EXPECT_TRUE(a.Wait(NowNs() + kMinuteNs).ok());
  std::thread waker([&] { a.Wake(); });
  EXPECT_TRUE(a.Poll(&events).ok());
  waker.join();
}

TEST_F(Pair, OtherSignaturesAndSizesAreFoundWhoeverIsFirst) {
  const auto expect = [](ShmChannel& channel, MessageId ours, MessageId theirs, int64_t our_bytes,
                         int64_t their_bytes) {
    std::vector<Channel::Event> none;
    ASSERT_EQ(channel.Poll(&none).code(), absl::StatusCode::kFailedPrecondition);
    const Mismatch found = channel.mismatch();
    EXPECT_EQ(found.member, 0);
    EXPECT_EQ(found.ours.signature, ours.signature);
    EXPECT_EQ(found.theirs.signature, theirs.signature);
    EXPECT_EQ(found.our_bytes, our_bytes);
    EXPECT_EQ(found.their_bytes, their_bytes);
  };
  std::byte bytes[16] = {};
  for (const bool posted_first : {true, false}) {
    for (const bool same_tag : {true, false}) {
      ShmRanks two(2);
      ShmChannel from(two.groups[0]), to(two.groups[1]);
      const auto send = [&] { from.Send(1, {3, 1, 55}, bytes, 8, 0); };
      const auto receive = [&] { to.Receive(0, {3, same_tag ? 1u : 2u, 66}, bytes, 8, 0); };
      posted_first ? receive() : send();
      ASSERT_TRUE(to.Poll(&events).ok());
      posted_first ? send() : receive();
      expect(to, {3, 1, 66}, {3, 1, 55}, same_tag && !posted_first ? 0 : 0, 8);
    }
    ShmRanks two(2);
    ShmChannel from(two.groups[0]), to(two.groups[1]);
    const auto send = [&] { from.Send(1, {3, 1, 55}, bytes, 8, 0); };
    const auto receive = [&] { to.Receive(0, {3, 1, 55}, bytes, 16, 0); };
    posted_first ? receive() : send();
    ASSERT_TRUE(to.Poll(&events).ok());
    posted_first ? send() : receive();
    expect(to, {3, 1, 55}, {3, 1, 55}, 16, 8);
  }
}

TEST_F(Pair, AMessageOfAFinishedOperationIsAMismatch) {
  std::byte bytes[8] = {};
  a.Send(1, {4, 0, 1}, bytes, 8, 0);
  b.Finish({3, 0, 1});
  EXPECT_TRUE(b.Poll(&events).ok());
  b.Finish({4, 0, 2});
  EXPECT_EQ(b.Poll(&events).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(b.mismatch().theirs.op, 4u);
}

TEST(ShmChannel, ASenderThatDiesMidWayIsEndedByTheGroup) {
  ShmRanks ranks(2);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  std::vector<std::byte> data(4 << 20);
  const pid_t sender = fork();
  if (sender == 0) {
    close(ends[0]);
    ShmChannel channel(ranks.groups[0]);
    std::byte word[8] = {};
    channel.Send(1, {1, 0}, word, 8, 0);
    std::vector<Channel::Event> events;
    (void)channel.Poll(&events);
    raise(SIGKILL);
  }
  close(ends[1]);
  // What a world does: it notices the death by the end of a connection.
  std::thread monitor([&] {
    char byte;
    EXPECT_EQ(read(ends[0], &byte, 1), 0);
    (void)ranks.lives[1]->End("rank 0 died");
  });
  ShmChannel channel(ranks.groups[1]);
  std::byte word[8];
  channel.Receive(0, {1, 0}, word, 8, 0);
  channel.Receive(0, {1, 1}, data.data(), data.size(), 1);
  const absl::Status status = UntilError(channel);
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  EXPECT_EQ(status.message(), "rank 0 died");
  monitor.join();
  waitpid(sender, nullptr, 0);
  close(ends[0]);
}

TEST(HostGroup, MissingMembersAreNamedWhenTheDeadlinePasses) {
  auto memory = std::make_shared<SharedMemory>(
      3, SharedMemory::Announcer{[](const Segment&) { return absl::OkStatus(); }, [](uint64_t) {}});
  auto life = std::make_shared<TestLife>(9, std::vector<int>{0, 1, 2}, 1);
  const auto group = HostGroup::Create(memory, life, {0, 1, 2}, NowNs() + 1'000'000);
  EXPECT_TRUE(absl::IsDeadlineExceeded(group.status())) << group.status();
  EXPECT_NE(group.status().message().find("rank 0, 2 had not arrived"), std::string::npos) << group.status();
}

TEST(HostGroup, WhoLeftBeforeItCameIsNotWaitedFor) {
  auto memory = std::make_shared<SharedMemory>(
      8, SharedMemory::Announcer{[](const Segment&) { return absl::OkStatus(); }, [](uint64_t) {}});
  auto life = std::make_shared<TestLife>(9, std::vector<int>{0, 4, 7}, 1);
  const auto group = HostGroup::Create(memory, life, {0, 1, 2}, NowNs() + 60'000'000'000,
                                       [](int member) { return member == 2; });
  EXPECT_TRUE(absl::IsAborted(group.status())) << group.status();
  EXPECT_EQ(group.status().message(), "forming a group: rank 7 left");
}

TEST(HostGroup, GroupsMayComeAndGoByTheHundred) {
  ShmRanks ranks(2);
  std::vector<std::vector<std::shared_ptr<HostGroup>>> alive;
  for (int i = 0; i < 300; ++i) {
    std::vector<std::shared_ptr<TestLife>> lives;
    alive.push_back(ranks.NewGroup(100 + i, &lives));
    if (i % 3 == 0) alive.erase(alive.begin());
  }
  ShmChannel a(alive.back()[0]), b(alive.back()[1]);
  std::byte word[8] = {std::byte{3}}, got[8] = {};
  a.Send(1, {1, 0}, word, 8, 0);
  b.Receive(0, {1, 0}, got, 8, 0);
  Events(b, 1);
  EXPECT_EQ(got[0], std::byte{3});
}

}  // namespace
}  // namespace shoal
