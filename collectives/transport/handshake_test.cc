#include "collectives/transport/handshake.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

constexpr size_t kHeaderBytes = 16, kProofBytes = 32;

Credentials Of(const std::string& job, const std::string& secret) { return {job, secret, Purpose::kData}; }

struct Outcome {
  absl::Status dialler, acceptor;
  bool both_done = false;
  Purpose seen = Purpose::kBootstrap;
};

// Gives `to` all that `from` says, `step` bytes at a time.
absl::Status Pass(const std::string& bytes, Handshake* to, size_t step) {
  for (size_t at = 0; at < bytes.size() && to->Wanted() > 0;) {
    const size_t take = std::min({step, to->Wanted(), bytes.size() - at});
    SHOAL_RETURN_IF_ERROR(to->Take(std::string_view(bytes).substr(at, take)));
    at += take;
  }
  return absl::OkStatus();
}

Outcome Meet(Handshake dialler, Handshake acceptor, size_t step = 1000) {
  Outcome outcome;
  for (int turn = 0; turn < 3; ++turn) {
    outcome.acceptor.Update(Pass(dialler.TakeOutput(), &acceptor, step));
    outcome.dialler.Update(Pass(acceptor.TakeOutput(), &dialler, step));
  }
  outcome.both_done = dialler.Done() && acceptor.Done();
  outcome.seen = acceptor.purpose();
  return outcome;
}

Outcome Meet(const Credentials& dialler, const Credentials& acceptor) {
  return Meet(Handshake::Dialler(dialler, FreshNonce()), Handshake::Acceptor(acceptor, FreshNonce()));
}

TEST(Handshake, EqualCredentialsMeetWhateverThePiecesAndTheAcceptorLearnsThePurpose) {
  for (const std::string& secret : {std::string(), std::string("s3cret"), std::string(1000, 'x')}) {
    for (const size_t step : {1, 7, 1000}) {
      Credentials dialler = Of("job", secret);
      dialler.purpose = Purpose::kControl;
      const Outcome outcome = Meet(Handshake::Dialler(dialler, FreshNonce()),
                                   Handshake::Acceptor(Of("job", secret), FreshNonce()), step);
      EXPECT_TRUE(outcome.both_done) << outcome.dialler << outcome.acceptor;
      EXPECT_EQ(outcome.seen, Purpose::kControl);
    }
  }
}

TEST(Handshake, AWrongOrMissingSecretIsDeniedOnBothSides) {
  for (const auto& [dialler, acceptor] :
       std::vector<std::pair<std::string, std::string>>{{"wrong", "right"}, {"", "right"}, {"right", ""}}) {
    const Outcome outcome = Meet(Of("job", dialler), Of("job", acceptor));
    EXPECT_FALSE(outcome.both_done);
    EXPECT_TRUE(absl::IsPermissionDenied(outcome.acceptor)) << outcome.acceptor;
    EXPECT_TRUE(absl::IsPermissionDenied(outcome.dialler)) << outcome.dialler;
    EXPECT_THAT(std::string(outcome.dialler.message()), HasSubstr("refused: "));
  }
}

TEST(Handshake, AnotherJobIsRefusedOnBothSides) {
  const Outcome outcome = Meet(Of("theirs", "s"), Of("ours", "s"));
  EXPECT_TRUE(absl::IsFailedPrecondition(outcome.acceptor)) << outcome.acceptor;
  EXPECT_TRUE(absl::IsFailedPrecondition(outcome.dialler)) << outcome.dialler;
  EXPECT_THAT(std::string(outcome.dialler.message()), HasSubstr("job 'theirs', want 'ours'"));
}

TEST(Handshake, AnotherVersionIsRefusedAndToldSo) {
  Handshake dialler = Handshake::Dialler(Of("job", "s"), FreshNonce());
  Handshake acceptor = Handshake::Acceptor(Of("job", "s"), FreshNonce());
  std::string hello = dialler.TakeOutput();
  hello[4] = 99;
  const absl::Status status = Pass(hello, &acceptor, 1000);
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  std::string refusal = acceptor.TakeOutput();
  refusal[4] = 99;  // As an acceptor of that version says it.
  const absl::Status told = Pass(refusal, &dialler, 1000);
  EXPECT_TRUE(absl::IsFailedPrecondition(told)) << told;
  EXPECT_THAT(std::string(told.message()), HasSubstr("protocol version 99"));
}

// What a listener in the middle has heard of an earlier connection is of no use.
TEST(Handshake, AReplayedDiallerIsDenied) {
  const Credentials credentials = Of("job", "s");
  Handshake dialler = Handshake::Dialler(credentials, FreshNonce());
  Handshake acceptor = Handshake::Acceptor(credentials, FreshNonce());
  const std::string hello = dialler.TakeOutput();
  ASSERT_TRUE(Pass(hello, &acceptor, 1000).ok());
  ASSERT_TRUE(Pass(acceptor.TakeOutput(), &dialler, 1000).ok());
  const std::string proof = dialler.TakeOutput();
  ASSERT_TRUE(Pass(proof, &acceptor, 1000).ok());
  ASSERT_TRUE(acceptor.Done());
  Handshake next = Handshake::Acceptor(credentials, FreshNonce());
  ASSERT_TRUE(Pass(hello, &next, 1000).ok());
  EXPECT_TRUE(absl::IsPermissionDenied(Pass(proof, &next, 1000)));
}

TEST(Handshake, AReplayedAcceptorIsDenied) {
  const Credentials credentials = Of("job", "s");
  Handshake dialler = Handshake::Dialler(credentials, FreshNonce());
  Handshake acceptor = Handshake::Acceptor(credentials, FreshNonce());
  ASSERT_TRUE(Pass(dialler.TakeOutput(), &acceptor, 1000).ok());
  const std::string challenge = acceptor.TakeOutput();
  ASSERT_TRUE(Pass(challenge, &dialler, 1000).ok());
  ASSERT_TRUE(Pass(dialler.TakeOutput(), &acceptor, 1000).ok());
  const std::string welcome = acceptor.TakeOutput();
  Handshake next = Handshake::Dialler(credentials, FreshNonce());
  ASSERT_TRUE(Pass(challenge, &next, 1000).ok());
  EXPECT_TRUE(absl::IsPermissionDenied(Pass(welcome, &next, 1000)));
  EXPECT_FALSE(next.Done());
}

// Who does not know the secret cannot let one of ours answer for it: not with our own proof sent back, and
// not with that of an acceptor that we dial at the same time.
TEST(Handshake, AReflectedProofIsDenied) {
  const Credentials credentials = Of("job", "s");
  Handshake dialler = Handshake::Dialler(credentials, FreshNonce());
  const std::string hello = dialler.TakeOutput();
  // The thief challenges with the dialler's own nonce and sends its proof back as a welcome.
  std::string challenge = hello.substr(0, kHeaderBytes) + hello.substr(kHeaderBytes + 8, 32);
  challenge[8] = 2;
  challenge[12] = 32;
  ASSERT_TRUE(Pass(challenge, &dialler, 1000).ok());
  std::string welcome = dialler.TakeOutput();
  ASSERT_EQ(welcome.size(), kHeaderBytes + kProofBytes);
  welcome[8] = 4;
  EXPECT_TRUE(absl::IsPermissionDenied(Pass(welcome, &dialler, 1000)));
}

TEST(Handshake, AProofForOnePurposeIsNoneForAnother) {
  const Credentials credentials = Of("job", "s");
  Handshake dialler = Handshake::Dialler(credentials, FreshNonce());
  Handshake acceptor = Handshake::Acceptor(credentials, FreshNonce());
  std::string hello = dialler.TakeOutput();
  hello[kHeaderBytes] = static_cast<char>(Purpose::kCoordinator);
  ASSERT_TRUE(Pass(hello, &acceptor, 1000).ok());
  ASSERT_TRUE(Pass(acceptor.TakeOutput(), &dialler, 1000).ok());
  EXPECT_TRUE(absl::IsPermissionDenied(Pass(dialler.TakeOutput(), &acceptor, 1000)));
}

TEST(Handshake, GarbageIsRefusedAtItsFirstByteAndGetsNoAnswer) {
  const std::string huge("SHAK\2\0\0\0\1\0\0\0\377\377\377\377", 16);
  for (const std::string& bytes : {std::string("G"), std::string("SHAx"), huge}) {
    Handshake acceptor = Handshake::Acceptor(Of("job", "s"), FreshNonce());
    EXPECT_TRUE(absl::IsDataLoss(Pass(bytes, &acceptor, 1000)));
    EXPECT_EQ(acceptor.TakeOutput(), "");
    EXPECT_EQ(acceptor.Wanted(), 0u);
  }
}

// Who listens at an address of ours, and the dialler.
class DialTest : public testing::Test {
 protected:
  static int64_t In(int64_t ms) { return NowNs() + ms * 1'000'000; }
  Fd listener_ = *Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  SocketAddress address_ = LocalAddressOf(listener_.get());
};

TEST_F(DialTest, AServerThatSpeaksSomethingElseIsNamed) {
  std::thread server([&] {
    (void)PollOne(listener_.get(), /*POLLIN*/ 1, In(10'000));
    Fd socket = *Accept(listener_.get());
    const std::string text = "HTTP/1.1 400 Bad Request\r\n\r\n";
    (void)SendAll(socket.get(), text.data(), text.size(), In(10'000));
    char unused[4096];
    while (PollOne(socket.get(), /*POLLIN*/ 1, In(10'000)) &&
           recv(socket.get(), unused, sizeof unused, 0) > 0) {
    }
  });
  const absl::Status status = DialAuthenticated(address_, Of("job", "s"), In(10'000)).status();
  server.join();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(address_.ToString()));
}

TEST_F(DialTest, ASilentServerEndsAtTheDeadline) {
  const absl::Status status = DialAuthenticated(address_, Of("job", "s"), In(30)).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(address_.ToString()));
}

TEST_F(DialTest, NobodyThereIsUnavailable) {
  listener_.Reset();
  EXPECT_TRUE(absl::IsUnavailable(DialAuthenticated(address_, Of("job", "s"), In(10'000)).status()));
}

}  // namespace
}  // namespace shoal
