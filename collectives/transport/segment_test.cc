#include "collectives/transport/segment.h"

#include <gtest/gtest.h>

#include <cstring>

#include "collectives/transport/control_link.h"

namespace shoal {
namespace {

TEST(Segment, IsSeenByBothSides) {
  std::unique_ptr<Segment> own = *Segment::Create(/*id=*/1, 3 * 4096);
  std::unique_ptr<Segment> peer =
      *Segment::Map(1, own->bytes(), *own->Duplicate(), Segment::Access::kReadWrite);
  std::unique_ptr<Segment> reader = *Segment::Map(1, own->bytes(), *own->Duplicate(), Segment::Access::kRead);
  own->CloseDescriptor();
  own->base()[0] = std::byte{1};
  peer->base()[4096] = std::byte{2};
  EXPECT_EQ(peer->base()[0], std::byte{1});
  EXPECT_EQ(own->base()[4096], std::byte{2});
  EXPECT_EQ(reader->base()[4096], std::byte{2});
  EXPECT_FALSE(own->Duplicate().ok());
}

TEST(SegmentDeathTest, WhoOnlyReadsCannotWrite) {
  std::unique_ptr<Segment> own = *Segment::Create(1, 4096);
  std::unique_ptr<Segment> reader = *Segment::Map(1, 4096, *own->Duplicate(), Segment::Access::kRead);
  EXPECT_DEATH(*static_cast<volatile std::byte*>(reader->base()) = std::byte{1}, "");
}

TEST(Segment, AForeignDescriptorThatIsTooSmallIsRefused) {
  std::unique_ptr<Segment> own = *Segment::Create(1, 4096);
  EXPECT_FALSE(Segment::Map(1, 8192, *own->Duplicate(), Segment::Access::kRead).ok());
  EXPECT_FALSE(Segment::Map(1, -1, *own->Duplicate(), Segment::Access::kRead).ok());
  EXPECT_FALSE(Segment::Map(1, 4096, Fd(), Segment::Access::kRead).ok());
}

TEST(Segment, APartCanBecomePrivateWithWhatItHolds) {
  std::unique_ptr<Segment> own = *Segment::Create(1, 8 * 4096);
  std::unique_ptr<Segment> peer =
      *Segment::Map(1, own->bytes(), *own->Duplicate(), Segment::Access::kReadWrite);
  std::memset(own->base(), 1, own->bytes());
  ASSERT_TRUE(own->MakePrivate(4096 + 10, 4096).ok());  // Parts of two pages.
  std::memset(peer->base(), 2, peer->bytes());
  for (int page = 0; page < 8; ++page) {
    EXPECT_EQ(own->base()[page * 4096], std::byte(page == 1 || page == 2 ? 1 : 2)) << page;
    EXPECT_EQ(own->base()[page * 4096 + 4095], std::byte(page == 1 || page == 2 ? 1 : 2)) << page;
  }
}

TEST(Segment, ContainsKnowsItsBounds) {
  std::unique_ptr<Segment> segment = *Segment::Create(1, 4096);
  EXPECT_TRUE(segment->Contains(segment->base(), 4096));
  EXPECT_TRUE(segment->Contains(segment->base() + 4095, 1));
  EXPECT_FALSE(segment->Contains(segment->base() + 4095, 2));
  EXPECT_FALSE(segment->Contains(segment->base() - 1, 1));
}

class ControlLinks : public ::testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
    a_ = std::make_unique<ControlLink>(Fd(ends[0]));
    b_ = std::make_unique<ControlLink>(Fd(ends[1]));
  }

  std::unique_ptr<ControlLink> a_, b_;
};

TEST_F(ControlLinks, CarryMessagesAndDescriptorsInOrder) {
  std::unique_ptr<Segment> first = *Segment::Create(1, 4096), second = *Segment::Create(2, 4096);
  first->base()[0] = std::byte{1};
  second->base()[0] = std::byte{2};
  a_->Push({ControlType::kSegment, "first", *first->Duplicate()});
  a_->Push({ControlType::kHeartbeat, std::string(20'000, 'x'), Fd()});
  a_->Push({ControlType::kSegment, "second", *second->Duplicate()});
  std::vector<ControlMessage> messages;
  while (messages.size() < 3) {
    ASSERT_TRUE(a_->Flush().ok());
    ASSERT_TRUE(b_->Read(&messages).ok());
  }
  EXPECT_EQ(messages[1].body.size(), 20'000u);
  EXPECT_EQ((*Segment::Map(1, 4096, std::move(messages[0].fd), Segment::Access::kRead))->base()[0],
            std::byte{1});
  EXPECT_EQ((*Segment::Map(2, 4096, std::move(messages[2].fd), Segment::Access::kRead))->base()[0],
            std::byte{2});
}

TEST_F(ControlLinks, LastWordsArriveBeforeTheEnd) {
  a_->Push({ControlType::kBye, "", Fd()});
  ASSERT_TRUE(a_->Flush().ok());
  a_.reset();
  std::vector<ControlMessage> messages;
  EXPECT_TRUE(absl::IsUnavailable(b_->Read(&messages)));
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].type, ControlType::kBye);
}

TEST_F(ControlLinks, NonsenseIsDataLoss) {
  for (const std::string& bytes : {std::string("\0\0\0\0\0", 5), std::string("\0\0\0\0\77", 5),
                                   std::string("\377\377\377\177\1", 5), std::string("\0\0\0\0\4", 5)}) {
    SetUp();
    ASSERT_EQ(send(a_->fd(), bytes.data(), bytes.size(), 0), 5);
    std::vector<ControlMessage> messages;
    EXPECT_TRUE(absl::IsDataLoss(b_->Read(&messages))) << testing::PrintToString(bytes);
  }
}

}  // namespace
}  // namespace shoal
