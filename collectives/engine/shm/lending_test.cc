// Memory that one rank lends to another: who may write to it when.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "collectives/engine/program_run.h"
#include "collectives/engine/shm/group_page.h"
#include "collectives/engine/shm/shm_channel.h"
#include "collectives/engine/shm/shm_ranks.h"
#include "collectives/program/algorithms.h"

namespace shoal {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kMinuteNs = 60'000'000'000;

bool AllAre(const std::byte* data, int64_t bytes, std::byte value) {
  return std::all_of(data, data + bytes, [value](std::byte b) { return b == value; });
}

class Lending : public ::testing::Test {
 protected:
  // From rank 0, in its group `group` of two.
  std::byte* LendAndBorrow(ShmChannel& from, ShmChannel& to, std::byte* data, int64_t bytes) {
    from.Lend(1, {1, 0}, data, bytes, 10);
    to.Borrow(0, {1, 0}, bytes, 20);
    std::vector<Channel::Event> views;
    while (views.empty()) {
      EXPECT_TRUE(from.Poll(&views).ok());
      EXPECT_TRUE(views.empty()) << "it is lent";
      EXPECT_TRUE(to.Poll(&views).ok());
    }
    return const_cast<std::byte*>(views[0].view);
  }

  ShmRanks ranks{2};
  ShmChannel a{ranks.groups[0]}, b{ranks.groups[1]};
  std::shared_ptr<void> memory = *ranks.memories[0]->Allocate(1 << 20);
  std::byte* const data = static_cast<std::byte*>(memory.get());
  std::vector<Channel::Event> events;
};

TEST_F(Lending, WhatABorrowerWritesIsTheOwnersWhenItComesBack) {
  std::byte* const view = LendAndBorrow(a, b, data, 1 << 20);
  EXPECT_EQ(a.Awaited(), std::vector<int>{1});
  ASSERT_TRUE(b.BeginWrite(0, 1 << 20));
  std::fill_n(view, 1 << 20, std::byte{7});
  ASSERT_TRUE(b.EndWrite());
  b.GiveBack(0, {1, 0}, view);
  ASSERT_TRUE(b.Poll(&events).ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].token, 20u);
  EXPECT_EQ(events[0].view, nullptr);
  events.clear();
  ASSERT_TRUE(a.Poll(&events).ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].token, 10u);
  EXPECT_TRUE(AllAre(data, 1 << 20, std::byte{7}));
}

TEST_F(Lending, OneSideAloneCannotLend) {
  a.Lend(1, {1, 0, 5}, data, 4096, 0);
  b.ReceiveView(0, {1, 0, 5}, 4096, 0);
  EXPECT_EQ(b.Poll(&events).code(), absl::StatusCode::kFailedPrecondition);
  ShmRanks others(2);
  ShmChannel from(others.groups[0]), to(others.groups[1]);
  from.Send(1, {1, 0, 5}, data, 64, 0);
  to.Borrow(0, {1, 0, 5}, 64, 0);
  EXPECT_EQ(to.Poll(&events).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(Lending, NobodyBeginsToWriteOnceTheGroupIsOver) {
  std::byte* const view = LendAndBorrow(a, b, data, 1 << 20);
  (void)ranks.lives[0]->End("enough");
  EXPECT_FALSE(b.BeginWrite(0, 4096));
  EXPECT_EQ(b.Poll(&events).message(), "enough");
  b.GiveBack(0, {1, 0}, view);
  EXPECT_TRUE(events.empty());
  EXPECT_NE(SharedMemory::Locate(data, 1 << 20).segment, 0u) << "nobody was writing: it is still shared";
}

TEST_F(Lending, WhoEndsTheGroupWaitsForAWriter) {
  std::byte* const view = LendAndBorrow(a, b, data, 1 << 20);
  ASSERT_TRUE(b.BeginWrite(0, kPage));
  std::atomic<bool> over{false};
  std::thread end([&] {
    (void)ranks.lives[0]->End("enough");
    over = true;
  });
  while (ranks.groups[0]->page(0).ended.load() == 0) std::this_thread::yield();
  const bool early = over;
  std::fill_n(view, kPage, std::byte{7});
  EXPECT_FALSE(b.EndWrite());
  end.join();
  const bool cut = SharedMemory::Locate(data, 1).segment == 0;  // On a machine that is too slow.
  EXPECT_TRUE(cut || (!early && AllAre(data, kPage, std::byte{7})));
}

TEST_F(Lending, AWriterThatStopsIsCutOff) {
  std::fill_n(data, 1 << 20, std::byte{1});
  std::byte* const view = LendAndBorrow(a, b, data, 1 << 20);
  ASSERT_TRUE(b.BeginWrite(5 * kPage + 100, 2 * kPage));
  (void)ranks.lives[0]->End("it does not answer");
  EXPECT_TRUE(absl::IsAborted(a.Poll(&events)));
  EXPECT_EQ(SharedMemory::Locate(data, 1 << 20).segment, 0u);
  EXPECT_TRUE(AllAre(data, 1 << 20, std::byte{1}));
  std::fill_n(view + 5 * kPage + 100, 2 * kPage, std::byte{7});  // It runs again.
  EXPECT_TRUE(AllAre(data, 1 << 20, std::byte{1}));
  EXPECT_FALSE(b.EndWrite());
  EXPECT_TRUE(absl::IsAborted(b.Poll(&events)));

  // The memory goes on being lent, by copies.
  std::vector<std::shared_ptr<TestLife>> lives;
  const auto groups = ranks.NewGroup(2, &lives);
  ShmChannel from(groups[0]), to(groups[1]);
  std::byte* const again = LendAndBorrow(from, to, data, 1 << 20);
  EXPECT_TRUE(AllAre(again, 1 << 20, std::byte{1}));
  ASSERT_TRUE(to.BeginWrite(0, 1 << 20));
  std::fill_n(again, 1 << 20, std::byte{9});
  ASSERT_TRUE(to.EndWrite());
  to.GiveBack(0, {1, 0}, again);
  bool lent = true, borrowed = true;
  while (lent || borrowed) {
    events.clear();
    ASSERT_TRUE(from.Poll(&events).ok());
    if (!events.empty()) lent = false;
    events.clear();
    ASSERT_TRUE(to.Poll(&events).ok());
    if (!events.empty()) borrowed = false;
  }
  EXPECT_TRUE(AllAre(data, 1 << 20, std::byte{9}));
}

TEST_F(Lending, ADeadWriterIsNoReasonToCutOff) {
  (void)LendAndBorrow(a, b, data, 1 << 20);
  ASSERT_TRUE(b.BeginWrite(0, kPage));
  ranks.lives[0]->dead_member = 1;
  (void)ranks.lives[0]->End("rank 1 died");
  const bool kernel_helps = ranks.groups[0]->page(1).registered != 0;
  EXPECT_EQ(SharedMemory::Locate(data, 1 << 20).segment != 0, kernel_helps);
}

TEST_F(Lending, WhatAnotherGroupLostByACutDoesNotCount) {
  std::vector<std::shared_ptr<TestLife>> lives;
  const auto groups = ranks.NewGroup(2, &lives);
  ShmChannel from(groups[0]), to(groups[1]);
  (void)LendAndBorrow(a, b, data, kPage + 64);
  std::byte* const same_page = LendAndBorrow(from, to, data + kPage + 64, 64);
  std::byte* const elsewhere = data + 4 * kPage;
  from.Lend(1, {1, 1}, elsewhere, kPage, 11);
  to.Borrow(0, {1, 1}, kPage, 21);
  ASSERT_TRUE(to.Poll(&events).ok());
  ASSERT_EQ(events.size(), 1u);
  std::byte* const other_page = const_cast<std::byte*>(events[0].view);
  ASSERT_TRUE(b.BeginWrite(kPage, 64));
  (void)ranks.lives[0]->End("it does not answer");
  for (std::byte* view : {other_page, same_page}) {
    ASSERT_TRUE(to.BeginWrite(0, 64));
    std::fill_n(view, 64, std::byte{3});
    ASSERT_TRUE(to.EndWrite());
  }
  to.GiveBack(0, {1, 1}, other_page);
  events.clear();
  ASSERT_TRUE(from.Poll(&events).ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].token, 11u);
  EXPECT_TRUE(AllAre(elsewhere, 64, std::byte{3}));
  to.GiveBack(0, {1, 0}, same_page);
  EXPECT_TRUE(absl::IsAborted(from.Poll(&events)));
}

// ---- Real processes that are killed and stopped in the middle of reductions.

// Shared by a round's processes.
struct Control {
  std::atomic<int> operations;   // That have completed anywhere.
  std::atomic<int> lost;         // 1: the victim is dead; 2: it is stopped.
  std::atomic<int> overwritten;  // Survivors that use their memory for something else.
  std::atomic<int64_t> check_until_ns;
};

struct Round {
  int size = 2;
  int victim = 0;
  int64_t bytes = 0;
  bool kill = false;
  int64_t delay_ns = 0;
  Control* control = nullptr;
};

absl::Status Reduce(ShmChannel& channel, std::shared_ptr<const PreparedProgram> program, const Operands& operands,
                    uint64_t op) {
  ProgramRun run;
  run.Start(std::move(program), operands, &channel, {op, 0, 1}, 0);
  std::vector<Channel::Event> events;
  while (!run.Done()) {
    const bool did = run.Step();
    events.clear();
    SHOAL_RETURN_IF_ERROR(channel.Poll(&events));
    for (const Channel::Event& event : events) run.OnEvent(event);
    if (!did && events.empty()) (void)channel.Wait(NowNs() + kMinuteNs);
  }
  return absl::OkStatus();
}

// The process of one rank: reduces in place until the group is over. Exits with what is wrong.
[[noreturn]] void RunRank(ShmRanks& ranks, int rank, const Round& round, std::byte* data) {
  Control& control = *round.control;
  const bool survives = rank != round.victim;
  std::thread monitor;
  if (survives) {
    monitor = std::thread([&] {
      while (control.lost.load() == 0) std::this_thread::yield();
      if (control.lost.load() == 1) ranks.lives[rank]->dead_member = round.victim;
      (void)ranks.lives[rank]->End("a rank is lost");
    });
  }
  Problem problem = {.kind = OpKind::kAllReduce, .rank = rank, .size = round.size, .elements = round.bytes / 4};
  problem.lending = problem.in_place = true;
  const auto program = std::make_shared<PreparedProgram>((*FindAlgorithm("fused", problem))->make(problem));
  Operands operands = {.in = data, .out = data, .dtype = DType::kI32, .reduce = ReduceOp::kMax, .group_size = round.size};
  ShmChannel channel(ranks.groups[rank]);
  uint64_t op = 1;
  while (Reduce(channel, program, operands, op).ok()) {
    channel.Finish({op++, 0, 1});
    control.operations.fetch_add(1);
  }
  if (!survives) _exit(0);
  const auto pattern = static_cast<std::byte>(100 + rank);
  std::fill_n(data, round.bytes, pattern);
  control.overwritten.fetch_add(1);
  while (control.check_until_ns.load() == 0 || NowNs() < control.check_until_ns.load()) std::this_thread::yield();
  monitor.join();
  _exit(AllAre(data, round.bytes, pattern) ? 0 : 1);
}

template <class Condition>
bool Await(const Condition& condition) {
  const int64_t until_ns = NowNs() + kMinuteNs / 3;
  while (!condition()) {
    if (NowNs() > until_ns) return false;
    std::this_thread::yield();
  }
  return true;
}

void RunRound(const Round& round) {
  ShmRanks ranks(round.size);
  std::vector<std::shared_ptr<void>> memory;
  for (int rank = 0; rank < round.size; ++rank) memory.push_back(*ranks.memories[rank]->Allocate(round.bytes));
  Control& control = *round.control;
  std::vector<pid_t> pids;
  for (int rank = 0; rank < round.size; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) RunRank(ranks, rank, round, static_cast<std::byte*>(memory[rank].get()));
    pids.push_back(pid);
  }
  EXPECT_TRUE(Await([&] { return control.operations.load() >= round.size; }));
  const int64_t strike_ns = NowNs() + round.delay_ns;
  while (NowNs() < strike_ns) {
  }
  const pid_t victim = pids[round.victim];
  kill(victim, round.kill ? SIGKILL : SIGSTOP);
  siginfo_t info = {};
  // Who is killed may still be running.
  if (!round.kill) (void)waitid(P_PID, victim, &info, WSTOPPED | WNOWAIT);
  control.lost = round.kill ? 1 : 2;
  EXPECT_TRUE(Await([&] { return control.overwritten.load() == round.size - 1; })) << "survivors hang";
  if (!round.kill) kill(victim, SIGCONT);
  control.check_until_ns = NowNs() + 4'000'000;
  for (int rank = 0; rank < round.size; ++rank) {
    int result = -1;
    if (!Await([&] { return waitpid(pids[rank], &result, WNOHANG) == pids[rank]; })) {
      ADD_FAILURE() << "rank " << rank << " hangs";
      kill(pids[rank], SIGKILL);
      waitpid(pids[rank], nullptr, 0);
    }
    const bool killed = round.kill && rank == round.victim;
    EXPECT_TRUE(killed || (WIFEXITED(result) && WEXITSTATUS(result) == 0))
        << "rank " << rank << ": somebody wrote to its memory after the end, or it died: " << result;
  }
}

TEST(LendingProcesses, NobodyWritesToMemoryThatIsUsedAgain) {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device()();
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  (void)std::fflush(stdout);  // Once, not by every process.
  std::mt19937_64 random(seed);
  void* const shared = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  const int64_t until_ns = NowNs() + 8'000'000'000;
  int rounds = 0;
  for (; rounds < 60 && NowNs() < until_ns && !HasFailure(); ++rounds) {
    Round round;
    round.control = new (shared) Control{};
    round.size = 2 + static_cast<int>(random() % 2);
    round.victim = static_cast<int>(random() % round.size);
    round.bytes = static_cast<int64_t>(1 + random() % 16) << 20;
    round.kill = random() % 2 == 0;
    round.delay_ns = static_cast<int64_t>(random() % 4'000'000);
    SCOPED_TRACE(testing::Message() << "round " << rounds << ": " << round.size << " ranks, " << (round.bytes >> 20)
                                    << " MiB, rank " << round.victim << (round.kill ? " killed" : " stopped"));
    RunRound(round);
  }
  std::printf("%d rounds\n", rounds);
  munmap(shared, kPage);
}

}  // namespace
}  // namespace shoal
