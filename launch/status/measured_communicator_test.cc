#include "launch/status/measured_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <latch>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Member {
  int rank;
  MetricsServer& metrics;
  std::unique_ptr<Communicator> world;
};

// Two ranks as threads, each with metrics of its own; gives what a scrape of rank 1 says once its world has
// closed.
std::string TwoRanks(const std::function<void(Member&)>& body) {
  const std::string rendezvous = UniqueRendezvous();
  std::string text;
  std::vector<std::thread> threads;
  for (const int rank : {0, 1}) {
    threads.emplace_back([&, rank] {
      auto metrics = *MetricsServer::Create("127.0.0.1", MetricsServer::kNoPort);
      auto world = ConnectWorld(RankOptions(rank, 2, "auto", rendezvous));
      ASSERT_TRUE(world.ok()) << world.status();
      Member self = {rank, *metrics, Measure(std::move(world).value(), *metrics, "world", "shm")};
      body(self);
      self.world.reset();
      if (rank == 1) text = metrics->Text();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return text;
}

std::string Series(const std::string& name, const std::string& group, const std::string& op) {
  return absl::StrCat("\n", name, "{group=\"", group, "\",op=\"", op, "\",transport=\"shm\"} ");
}

std::string Bytes(const std::string& group, const std::string& op, int64_t value) {
  return absl::StrCat(Series("shoal_comm_bytes_total", group, op), value, "\n");
}

std::string Count(const std::string& group, const std::string& op, int64_t value) {
  return absl::StrCat(Series("shoal_comm_duration_seconds_count", group, op), value, "\n");
}

std::string OldestPending(const std::string& group) {
  return absl::StrCat("\nshoal_comm_oldest_pending_timestamp_seconds{group=\"", group, "\"} ");
}

double Wait(const std::string& text, const std::string& group) {
  const std::string name = absl::StrCat("\nshoal_comm_wait_seconds_total{group=\"", group, "\"} ");
  const size_t at = text.find(name);
  return at == std::string::npos ? -1 : std::atof(text.c_str() + at + name.size());
}

TEST(MeasuredCommunicator, CountsWhatEveryOperationGives) {
  const std::string text = TwoRanks([](Member& self) {
    Communicator& world = *self.world;
    EXPECT_EQ(world.index(), self.rank);
    EXPECT_EQ(world.size(), 2);
    const std::vector<int64_t> counts = {1, 2};
    const Tensor own = Zeros({self.rank + 1}, DType::kF32), all = *world.Allocate({3}, DType::kF32);
    const Tensor rows = Zeros({4}, DType::kI64), back = Zeros({4}, DType::kI64);
    const std::vector<int64_t> halves = {2, 2};
    for (int step = 0; step < 2; ++step) {
      EXPECT_TRUE(world.AllReduce(all, all, ReduceOp::kSum, {}).Await().ok());
      EXPECT_TRUE(world.ReduceScatter(all, counts, own, ReduceOp::kSum, {}).Await().ok());
      EXPECT_TRUE(world.AllGather(own, counts, all, {}).Await().ok());
      EXPECT_TRUE(world.AllToAll(rows, halves, back, halves, {}).Await().ok());
      EXPECT_TRUE(world.Broadcast(all, step, {}).Await().ok());
      EXPECT_TRUE(world.Barrier({}).Await().ok());
    }
  });
  EXPECT_THAT(text, AllOf(HasSubstr(Bytes("world", "all_reduce", 2 * 12)),
                          HasSubstr(Bytes("world", "reduce_scatter", 2 * 12)),
                          HasSubstr(Bytes("world", "all_gather", 2 * 8)),
                          HasSubstr(Bytes("world", "all_to_all", 2 * 32)),
                          HasSubstr(Bytes("world", "broadcast", 12)),  // Rank 1 was the root once.
                          HasSubstr(Bytes("world", "barrier", 0))));
  for (const char* op :
       {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "barrier"}) {
    EXPECT_THAT(text, HasSubstr(Count("world", op, 2)));
  }
  EXPECT_GT(Wait(text, "world"), 0);
  EXPECT_THAT(text, HasSubstr(OldestPending("world") + "0\n"));
}

TEST(MeasuredCommunicator, GroupsHaveTheirNames) {
  const std::string text = TwoRanks([](Member& self) {
    const std::vector<int> both = {0, 1}, alone = {self.rank};
    const auto experts = *SplitAs(*self.world, both, "ep");
    const auto same = *self.world->Split(both);
    const auto single = *SplitAs(*self.world, alone, "dp");
    EXPECT_EQ(experts->size(), 2);
    EXPECT_EQ(single->size(), 1);
    EXPECT_TRUE(experts->Barrier({}).Await().ok());
    EXPECT_TRUE(same->Barrier({}).Await().ok());
    EXPECT_TRUE(single->Barrier({}).Await().ok());
  });
  EXPECT_THAT(text, AllOf(HasSubstr(Count("ep", "barrier", 1)), HasSubstr(Count("world", "barrier", 1)),
                          Not(HasSubstr(Series("shoal_comm_duration_seconds_count", "dp", "barrier")))));
}

TEST(MeasuredCommunicator, ShowsWhatIsInFlight) {
  std::latch issued(1);
  std::string during;
  const std::string text = TwoRanks([&](Member& self) {
    if (self.rank == 1) {
      const Work first = self.world->Barrier({});
      const Work second = self.world->Barrier({});
      during = self.metrics.Text();
      issued.count_down();
      EXPECT_TRUE(first.Await().ok());
      EXPECT_TRUE(second.Await().ok());
    } else {
      issued.wait();
      for (int i = 0; i < 2; ++i) EXPECT_TRUE(self.world->Barrier({}).Await().ok());
    }
  });
  EXPECT_THAT(during,
              AllOf(HasSubstr(OldestPending("world")), Not(HasSubstr(OldestPending("world") + "0\n"))));
  EXPECT_EQ(Wait(during, "world"), 0);
  EXPECT_THAT(text, HasSubstr(OldestPending("world") + "0\n"));
  EXPECT_GT(Wait(text, "world"), 0);
}

TEST(MeasuredCommunicator, PassesOnFailures) {
  const std::string text = TwoRanks([](Member& self) {
    std::latch aborted(1);
    self.world->OnAbort([&](const absl::Status&) { aborted.count_down(); });
    const Tensor wrong = Zeros({3}, DType::kF32);
    const std::vector<int64_t> counts = {1, 1};
    EXPECT_TRUE(absl::IsInvalidArgument(self.world->AllGather(wrong, counts, wrong, {}).Await()));
    if (self.rank == 1) {
      const Work pending = self.world->Barrier({});
      self.world->Abort(absl::DataLossError("the disk is gone"));
      EXPECT_TRUE(absl::IsAborted(pending.Await()));
    }
    aborted.wait();
    EXPECT_TRUE(absl::IsAborted(self.world->Barrier({}).Await()));
    EXPECT_THAT(std::string(self.world->status().message()), HasSubstr("the disk is gone"));
  });
  EXPECT_THAT(text,
              AllOf(HasSubstr(Bytes("world", "all_gather", 0)), HasSubstr(Count("world", "all_gather", 0)),
                    HasSubstr(Count("world", "barrier", 0)), HasSubstr(OldestPending("world") + "0\n")));
}

TEST(MeasuredCommunicator, AGroupOfOneIsLeftAlone) {
  auto metrics = *MetricsServer::Create("127.0.0.1", MetricsServer::kNoPort);
  auto world = *ConnectWorld({});
  Communicator* const inner = world.get();
  const std::unique_ptr<Communicator> measured = Measure(std::move(world), *metrics, "world", "shm");
  EXPECT_EQ(measured.get(), inner);
  const std::vector<int> members = {0};
  EXPECT_TRUE(SplitAs(*measured, members, "ep").ok());
}

}  // namespace
}  // namespace shoal
