#include "collectives/membership/state_sync.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kLong = (3 << 20) + 5;  // Several blocks, the last one short.

// A state of several types, from a seed: equal seeds, equal bits.
std::vector<NamedTensor> State(uint64_t seed) {
  std::vector<NamedTensor> state = {{"weights", Empty({kLong}, DType::kBF16)},
                                    {"moments", Empty({1000, 3}, DType::kF32)},
                                    {"counts", Empty({17}, DType::kI64)},
                                    {"halves", Empty({2049}, DType::kF16)},
                                    {"nothing", Empty({0}, DType::kF32)}};
  std::mt19937_64 random(seed);
  for (const NamedTensor& named : state) {
    auto* bytes = static_cast<uint8_t*>(named.tensor.raw());
    for (int64_t i = 0; i < named.tensor.bytes(); ++i) bytes[i] = static_cast<uint8_t>(random());
  }
  return state;
}

bool Equal(const std::vector<NamedTensor>& a, const std::vector<NamedTensor>& b) {
  for (size_t t = 0; t < a.size(); ++t) {
    if (a[t].tensor.bytes() > 0 && std::memcmp(a[t].tensor.raw(), b[t].tensor.raw(), a[t].tensor.bytes()) != 0) {
      return false;
    }
  }
  return true;
}

int64_t Bytes(const std::vector<NamedTensor>& state) {
  int64_t bytes = 0;
  for (const NamedTensor& named : state) bytes += named.tensor.bytes();
  return bytes;
}

TEST(StateSync, EqualStatesMoveNothing) {
  RunRanks(3, "auto", [](Communicator& group) {
    const std::vector<NamedTensor> state = State(1);
    const absl::StatusOr<SyncReport> report = SyncState(group, state, 7, {});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->revision, 7);
    EXPECT_EQ(report->bytes_received + report->bytes_sent, 0);
    EXPECT_THAT(report->changed, IsEmpty());
  });
}

TEST(StateSync, ANewcomerGetsEverythingFromAllOthers) {
  for (const char* transport : {"auto", "tcp"}) {
    RunRanks(4, transport, [](Communicator& group) {
      const bool newcomer = group.index() == 2;
      const std::vector<NamedTensor> state = State(newcomer ? 99 : 1);
      const absl::StatusOr<SyncReport> report =
          SyncState(group, state, newcomer ? 1000 : 7,
                    {.role = newcomer ? SyncRole::kReceiveOnly : SyncRole::kEither});
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_EQ(report->revision, 7);
      EXPECT_TRUE(Equal(state, State(1)));
      if (newcomer) {
        EXPECT_EQ(report->bytes_received, Bytes(state));
        EXPECT_THAT(report->changed, ElementsAre("weights", "moments", "counts", "halves"));
      } else {
        EXPECT_GT(report->bytes_sent, 0) << "every holder is a source";
        EXPECT_LT(report->bytes_sent, Bytes(state) / 2);
      }
    });
  }
}

// Types of two bytes as well: their element size is easily forgotten.
TEST(StateSync, OnlyBlocksThatDifferTravel) {
  RunRanks(3, "auto", [](Communicator& group) {
    std::vector<NamedTensor> state = State(1);
    if (group.index() == 0) static_cast<uint8_t*>(state[0].tensor.raw())[(2 << 20) + 1] ^= 1;
    if (group.index() == 1) static_cast<uint8_t*>(state[3].tensor.raw())[5] ^= 1;
    const absl::StatusOr<SyncReport> report = SyncState(group, state, 7, {});
    ASSERT_TRUE(report.ok()) << report.status();
    // All three contents differ: that of rank 0 wins.
    EXPECT_FALSE(Equal(state, State(1)));
    EXPECT_EQ(report->bytes_received, group.index() == 0   ? 0
                                      : group.index() == 1 ? (1 << 20) + state[3].tensor.bytes()
                                                           : 1 << 20);
  });
}

TEST(StateSync, TheNewestRevisionWinsThenTheMostPopularContent) {
  RunRanks(4, "auto", [](Communicator& group) {
    const std::vector<NamedTensor> state = State(group.index() == 3 ? 5 : 1);
    absl::StatusOr<SyncReport> report = SyncState(group, state, group.index() == 3 ? 8 : 7, {});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->revision, 8);
    EXPECT_TRUE(Equal(state, State(5)));
    const std::vector<NamedTensor> other = State(group.index() == 0 ? 6 : 9);
    report = SyncState(group, other, 9, {});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(Equal(other, State(9)));
  });
}

TEST(StateSync, ASenderOverrulesAll) {
  RunRanks(3, "auto", [](Communicator& group) {
    const bool sender = group.index() == 2;
    const std::vector<NamedTensor> state = State(sender ? 5 : 1);
    const absl::StatusOr<SyncReport> report = SyncState(
        group, state, sender ? 3 : 7, {.role = sender ? SyncRole::kSendOnly : SyncRole::kEither});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->revision, 3);
    EXPECT_TRUE(Equal(state, State(5)));
  });
}

TEST(StateSync, SaysWhatCannotBe) {
  RunRanks(3, "auto", [](Communicator& group) {
    const std::vector<NamedTensor> state = State(group.index());
    absl::Status status = SyncState(group, state, 1, {.role = SyncRole::kReceiveOnly}).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status));
    EXPECT_THAT(status.ToString(), HasSubstr("nobody has the state"));
    status = SyncState(group, state, 1, {.role = group.index() == 0 ? SyncRole::kEither : SyncRole::kSendOnly}).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status));
    EXPECT_THAT(status.ToString(), HasSubstr("ranks 1, 2 only send, and their contents differ"));
    EXPECT_TRUE(Equal(state, State(group.index()))) << "nothing changed";
    std::vector<NamedTensor> renamed = State(1);
    if (group.index() == 1) renamed[1].name = "momenta";
    status = SyncState(group, renamed, 1, {}).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_THAT(status.ToString(), HasSubstr("names, shapes or types of the tensors on rank 1"));
    EXPECT_TRUE(group.Barrier({}).Await().ok()) << "the group lives";
  });
}

}  // namespace
}  // namespace shoal
