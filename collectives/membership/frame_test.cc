#include "collectives/membership/frame.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <set>
#include <thread>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

int64_t In(int64_t ms) { return NowNs() + ms * 1'000'000; }

class GreeterTest : public testing::Test {
 protected:
  GreeterTest() : greeter_({listener_.get()}, credentials_) {}

  // Dials, proves itself with `credentials` and says a frame.
  absl::Status Knock(const Credentials& credentials, const std::string& body) {
    SHOAL_ASSIGN_OR_RETURN(Fd socket, DialAuthenticated(address_, credentials, In(20'000)));
    SHOAL_RETURN_IF_ERROR(SendFrame(socket.get(), FrameType::kHello, body, In(20'000)));
    friends_.push_back(std::move(socket));
    return absl::OkStatus();
  }
  Fd Stranger(const std::string& bytes) {
    Fd socket = *Dial(address_, In(20'000));
    (void)SendAll(socket.get(), bytes.data(), bytes.size(), In(20'000));
    return socket;
  }
  // What the greeter yields while `knock` runs on another thread, and what it logs.
  absl::StatusOr<Greeter::Event> NextWhile(const std::function<void()>& knock) {
    testing::internal::CaptureStderr();
    std::thread other(knock);
    absl::StatusOr<Greeter::Event> event = greeter_.Next({}, In(20'000));
    other.join();
    log_ = testing::internal::GetCapturedStderr();
    return event;
  }

  const Credentials credentials_ = {"job", "secret", Purpose::kCoordinator};
  Fd listener_ = *Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  const SocketAddress address_ = LocalAddressOf(listener_.get());
  Greeter greeter_;
  std::vector<Fd> friends_;
  std::string log_;
};

TEST_F(GreeterTest, WhoProvesItselfComesInWithItsPurposeAndFrame) {
  absl::Status knocked;
  const auto event = NextWhile([&] { knocked = Knock(credentials_, std::string(100'000, 'b')); });
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_TRUE(knocked.ok()) << knocked;
  EXPECT_EQ(event->purpose, Purpose::kCoordinator);
  EXPECT_EQ(event->frame.body, std::string(100'000, 'b'));
  EXPECT_EQ(log_, "");
}

// As PCCL's defect: any client was trusted.
TEST_F(GreeterTest, WrongSecretJobGarbageAndSilenceAreRefusedWithALineAndCostNothingElse) {
  absl::Status wrong_secret, no_secret, other_job, right;
  std::vector<Fd> strangers;
  const auto event = NextWhile([&] {
    strangers.push_back(Stranger(""));
    strangers.push_back(Stranger("GET / HTTP/1.1\r\n\r\n"));
    strangers.push_back(Stranger("SHA"));
    strangers.push_back(Stranger(std::string("SHAK\2\0\0\0\1\0\0\0\377\377\377\377", 16)));
    Stranger("SHAK");
    wrong_secret = Knock({"job", "guess", Purpose::kCoordinator}, "");
    no_secret = Knock({"job", "", Purpose::kCoordinator}, "");
    other_job = Knock({"another", "secret", Purpose::kCoordinator}, "");
    right = Knock(credentials_, "me");
  });
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(event->frame.body, "me");
  EXPECT_TRUE(absl::IsPermissionDenied(wrong_secret)) << wrong_secret;
  EXPECT_TRUE(absl::IsPermissionDenied(no_secret)) << no_secret;
  EXPECT_TRUE(absl::IsFailedPrecondition(other_job)) << other_job;
  EXPECT_TRUE(right.ok()) << right;
  EXPECT_THAT(log_, HasSubstr("refused 127.0.0.1:"));
  EXPECT_THAT(log_, HasSubstr(": wrong secret"));
  EXPECT_THAT(log_, HasSubstr(": it has no secret, this job has one"));
  EXPECT_THAT(log_, HasSubstr(": job 'another', want 'job'"));
  EXPECT_THAT(log_, HasSubstr(": it does not speak Shoal's protocol"));
  EXPECT_THAT(log_, HasSubstr(": it left in the middle of a greeting"));
}

TEST_F(GreeterTest, AFloodOfStrangersLogsLittleAndLosesNoFriend) {
  absl::Status right;
  const auto event = NextWhile([&] {
    for (int i = 0; i < 1500; ++i) Stranger("x");
    right = Knock(credentials_, "me");
  });
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(event->frame.body, "me");
  EXPECT_LT(std::count(log_.begin(), log_.end(), '\n'), 60);
}

TEST_F(GreeterTest, WithoutDescriptorsTheOldestStrangerGoes) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  // Both ends of every stranger's connection live in this process.
  const Fd probe(dup(0));
  rlimit few = before;
  few.rlim_cur = probe.get() + 24;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<Fd> strangers;
  while (true) {
    absl::StatusOr<Fd> socket = Dial(address_, In(20'000));
    if (!socket.ok()) break;
    strangers.push_back(*std::move(socket));
  }
  strangers.pop_back();
  const Fd socket = *Dial(address_, In(20'000));
  strangers.resize(strangers.size() - 3);  // So many get in at a time.
  absl::Status right;
  std::thread knock([&] {
    right = Authenticate(socket.get(), credentials_, In(20'000));
    right.Update(SendFrame(socket.get(), FrameType::kHello, "me", In(20'000)));
  });
  const auto event = greeter_.Next({}, In(20'000));
  knock.join();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_TRUE(right.ok()) << right;
  EXPECT_EQ(event->frame.body, "me");
}

TEST_F(GreeterTest, WithoutAnyDescriptorItGoesOnWhenThereIsOneAgain) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const Fd socket = *Dial(address_, In(20'000));
  const Fd probe(dup(0));
  rlimit none = before;
  none.rlim_cur = probe.get() + 1;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  EXPECT_TRUE(absl::IsDeadlineExceeded(greeter_.Next({}, In(10)).status()));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  std::thread knock([&] {
    EXPECT_TRUE(Authenticate(socket.get(), credentials_, In(20'000)).ok());
    EXPECT_TRUE(SendFrame(socket.get(), FrameType::kHello, "me", In(20'000)).ok());
  });
  EXPECT_TRUE(greeter_.Next({}, In(20'000)).ok());
  knock.join();
}

TEST(Frame, ABodyBeyondTheLimitIsRefusedBeforeItIsRead) {
  FrameReader reader(100);
  const std::string header("SHOL\2\0\0\0\1\0\0\0\145\0\0\0", 16);
  EXPECT_TRUE(absl::IsDataLoss(reader.Take(header)));
}

// As PCCL's defect: processes that started together raced for the same port.
TEST(Listen, PortsChosenByTheSystemNeverCollideAndATakenOneIsAnErrorAtOnce) {
  const SocketAddress any = AnyAddress(AF_INET, /*loopback_only=*/true);
  std::vector<std::vector<Fd>> listeners(8);
  std::vector<std::thread> threads;
  for (auto& mine : listeners) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) mine.push_back(*Listen(any));
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<int> ports;
  for (const auto& mine : listeners) {
    for (const Fd& fd : mine) EXPECT_TRUE(ports.insert(LocalAddressOf(fd.get()).port()).second);
  }
  const absl::Status taken = Listen(LocalAddressOf(listeners[0][0].get())).status();
  EXPECT_FALSE(taken.ok());
  EXPECT_THAT(std::string(taken.message()), HasSubstr("listen on 127.0.0.1:"));
}

}  // namespace
}  // namespace shoal
