#include "collectives/membership/messages.h"

#include <gtest/gtest.h>

#include <random>

namespace shoal {
namespace {

MemberInfo Member(uint64_t id) {
  return {.id = id,
          .pid = -1,
          .host_name = "host",
          .boot = "boot",
          .unix_name = "door",
          .addresses = {"10.0.0.1:1", "[::1]:2"},
          .wanted_rank = static_cast<int>(id) - 2};
}

View SomeView() { return {.lineage = 7, .epoch = Epoch{3}, .members = {Member(1), Member(2), Member(9)}}; }

std::vector<MemberMessage> MemberMessages() {
  std::vector<MemberMessage> all;
  for (int type = MemberMessage::kHello; type <= MemberMessage::kLeave; ++type) {
    MemberMessage& message = all.emplace_back();
    message.type = static_cast<MemberMessage::Type>(type);
    message.info = Member(4);
    message.committed = SomeView();
    message.promised = Epoch{5};
    message.epoch = Epoch{3};
    message.accusations = {{2, "connection closed"}, {9, "process died", true}};
  }
  return all;
}

std::vector<CoordinatorMessage> CoordinatorMessages() {
  std::vector<CoordinatorMessage> all;
  for (int type = CoordinatorMessage::kHeartbeat; type <= CoordinatorMessage::kJoiners; ++type) {
    CoordinatorMessage& message = all.emplace_back();
    message.type = static_cast<CoordinatorMessage::Type>(type);
    message.view = SomeView();
    message.cause = "cause";
    message.joiners = 12;
  }
  return all;
}

TEST(Messages, AMembersMessagesSurviveTheWire) {
  for (const MemberMessage& message : MemberMessages()) {
    const absl::StatusOr<MemberMessage> read = DecodeMemberMessage(Encode(message));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(Encode(*read), Encode(message));
    EXPECT_EQ(read->type, message.type);
  }
  const MemberMessage hello = *DecodeMemberMessage(Encode(MemberMessages()[0]));
  EXPECT_EQ(hello.info.id, 4u);
  EXPECT_EQ(hello.info.pid, -1);
  EXPECT_EQ(hello.info.host_name, "host");
  EXPECT_EQ(hello.info.boot, "boot");
  EXPECT_EQ(hello.info.unix_name, "door");
  EXPECT_EQ(hello.info.addresses, (std::vector<std::string>{"10.0.0.1:1", "[::1]:2"}));
  EXPECT_EQ(hello.info.wanted_rank, 2);
  EXPECT_EQ(hello.committed.lineage, 7u);
  EXPECT_EQ(hello.committed.epoch, Epoch{3});
  EXPECT_EQ(hello.committed.RankOf(9), 2);
  EXPECT_EQ(hello.committed.members[0].wanted_rank, -1);
  EXPECT_EQ(hello.promised, Epoch{5});
  const MemberMessage ready = *DecodeMemberMessage(Encode(MemberMessages()[2]));
  EXPECT_EQ(ready.epoch, Epoch{3});
  ASSERT_EQ(ready.accusations.size(), 2u);
  EXPECT_EQ(ready.accusations[1].id, 9u);
  EXPECT_EQ(ready.accusations[1].cause, "process died");
  EXPECT_TRUE(ready.accusations[1].died);
  EXPECT_FALSE(ready.accusations[0].died);
}

TEST(Messages, ACoordinatorsMessagesSurviveTheWire) {
  for (const CoordinatorMessage& message : CoordinatorMessages()) {
    const absl::StatusOr<CoordinatorMessage> read = DecodeCoordinatorMessage(Encode(message));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(Encode(*read), Encode(message));
    EXPECT_EQ(read->type, message.type);
  }
  EXPECT_EQ(DecodeCoordinatorMessage(Encode(CoordinatorMessages()[1]))->view.members.size(), 3u);
  const CoordinatorMessage commit = *DecodeCoordinatorMessage(Encode(CoordinatorMessages()[2]));
  EXPECT_EQ(commit.view.lineage, 7u);
  EXPECT_EQ(commit.view.epoch, Epoch{3});
  EXPECT_EQ(DecodeCoordinatorMessage(Encode(CoordinatorMessages()[3]))->cause, "cause");
  EXPECT_EQ(DecodeCoordinatorMessage(Encode(CoordinatorMessages()[6]))->joiners, 12u);
}

TEST(Messages, EveryCutAndEveryExtraByteIsDataLoss) {
  for (const MemberMessage& message : MemberMessages()) {
    const std::string bytes = Encode(message);
    for (size_t size = 0; size < bytes.size(); ++size)
      EXPECT_TRUE(absl::IsDataLoss(DecodeMemberMessage(bytes.substr(0, size)).status())) << size;
    EXPECT_TRUE(absl::IsDataLoss(DecodeMemberMessage(bytes + '\0').status()));
  }
  for (const CoordinatorMessage& message : CoordinatorMessages()) {
    const std::string bytes = Encode(message);
    for (size_t size = 0; size < bytes.size(); ++size)
      EXPECT_TRUE(absl::IsDataLoss(DecodeCoordinatorMessage(bytes.substr(0, size)).status())) << size;
    EXPECT_TRUE(absl::IsDataLoss(DecodeCoordinatorMessage(bytes + '\0').status()));
  }
}

TEST(Messages, OddViewsAreDataLoss) {
  View twice = SomeView(), headless = SomeView(), unnumbered = SomeView(), anonymous = SomeView();
  twice.members[2].id = 1;
  headless.lineage = 0;
  unnumbered.epoch = Epoch{0};
  anonymous.members[1].id = 0;
  for (const View& view : {twice, headless, unnumbered, anonymous})
    EXPECT_TRUE(absl::IsDataLoss(DecodeView(Encode(view)).status()));
  EXPECT_TRUE(DecodeView(Encode(View())).ok());
  View nobody;
  nobody.epoch = Epoch{2};
  EXPECT_TRUE(absl::IsDataLoss(DecodeView(Encode(nobody)).status()));

  CoordinatorMessage empty;
  empty.type = CoordinatorMessage::kPropose;
  EXPECT_TRUE(absl::IsDataLoss(DecodeCoordinatorMessage(Encode(empty)).status()));
  MemberMessage perjured = MemberMessages()[0];
  perjured.promised = Epoch{2};
  EXPECT_TRUE(absl::IsDataLoss(DecodeMemberMessage(Encode(perjured)).status()));
}

TEST(Messages, ALongCauseIsCutByTheSender) {
  CoordinatorMessage message;
  message.type = CoordinatorMessage::kExcluded;
  message.cause = std::string(1 << 20, 'x');
  EXPECT_EQ(DecodeCoordinatorMessage(Encode(message))->cause, std::string(4096, 'x'));
}

// Whatever arrives, decoding ends, and what it accepts has one spelling.
TEST(Messages, RandomBytesAreReadOrRefused) {
  const uint32_t seed = 20240611;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  std::vector<std::string> seeds;
  for (const MemberMessage& message : MemberMessages()) seeds.push_back(Encode(message));
  for (const CoordinatorMessage& message : CoordinatorMessages()) seeds.push_back(Encode(message));
  int accepted = 0, refused = 0;
  for (int round = 0; round < 50'000; ++round) {
    std::string bytes = seeds[random() % seeds.size()];
    if (round % 8 == 0) bytes.assign(random() % 64, '\0');
    for (int change = random() % 4; change >= 0 && !bytes.empty(); --change)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    const absl::StatusOr<MemberMessage> member = DecodeMemberMessage(bytes);
    const absl::StatusOr<CoordinatorMessage> coordinator = DecodeCoordinatorMessage(bytes);
    if (member.ok()) {
      EXPECT_EQ(Encode(*member), bytes);
    }
    if (coordinator.ok()) {
      EXPECT_EQ(Encode(*coordinator), bytes);
    }
    (member.ok() || coordinator.ok() ? accepted : refused)++;
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace shoal
