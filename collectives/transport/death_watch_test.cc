#include "collectives/transport/death_watch.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "collectives/transport/clock.h"
#include "collectives/transport/control_link.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

// The peers that died, as a watch reports them.
class Deaths {
 public:
  std::function<void(int)> Callback() {
    return [this](int peer) {
      MutexLock lock(&mutex_);
      peers_.push_back(peer);
      changed_.NotifyAll();
    };
  }
  // Waits for so many; what came within a minute.
  std::vector<int> Await(size_t count) {
    const int64_t end_ns = NowNs() + 60'000'000'000;
    MutexLock lock(&mutex_);
    while (peers_.size() < count && NowNs() < end_ns) changed_.WaitUntil(&mutex_, SteadyTime(end_ns));
    std::vector<int> peers = peers_;
    std::sort(peers.begin(), peers.end());
    return peers;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::vector<int> peers_ ABSL_GUARDED_BY(mutex_);
};

// A process that holds a sign of life until it is told to end.
class Process {
 public:
  explicit Process(bool polite) {
    int ends[2];
    SHOAL_CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    pid_ = fork();
    SHOAL_CHECK(pid_ >= 0);
    if (pid_ == 0) {
      close(ends[0]);
      Run(Fd(ends[1]), polite);
    }
    close(ends[1]);
    socket_ = Fd(ends[0]);
  }
  ~Process() { Reap(); }

  Fd Sign() {
    SHOAL_CHECK(fcntl(socket_.get(), F_SETFL, O_NONBLOCK) == 0);
    ControlLink link(Fd(dup(socket_.get())));
    std::vector<ControlMessage> messages;
    while (messages.empty()) {
      PollOne(socket_.get(), POLLIN, kNeverNs);
      SHOAL_CHECK(link.Read(&messages).ok());
    }
    return std::move(messages[0].fd);
  }
  void Kill() { kill(pid_, SIGKILL); }
  // It ends; a polite one releases its sign before.
  void Dismiss() { SHOAL_CHECK(write(socket_.get(), "", 1) == 1); }
  void Reap() {
    if (pid_ == 0) return;
    Kill();
    (void)waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  void AwaitEnd() {
    (void)waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  [[noreturn]] static void Run(Fd socket, bool polite) {
    absl::StatusOr<std::unique_ptr<DeathWatch>> watch = DeathWatch::Create([](int) {});
    SHOAL_CHECK(watch.ok());
    ControlLink link(Fd(dup(socket.get())));
    link.Push({ControlType::kWatch, "", *(*watch)->Sign()});
    SHOAL_CHECK(link.Flush().ok());
    char byte = 0;
    (void)!read(socket.get(), &byte, 1);  // Until it is dismissed.
    if (polite) watch->reset();
    _exit(0);
  }

  pid_t pid_ = 0;
  Fd socket_;
};

TEST(DeathWatch, NoticesAKilledProcess) {
  Process process(/*polite=*/false), other(/*polite=*/false);
  Deaths deaths;
  std::unique_ptr<DeathWatch> watch = *DeathWatch::Create(deaths.Callback());
  ASSERT_TRUE(watch->Watch(3, process.Sign()).ok());
  ASSERT_TRUE(watch->Watch(4, other.Sign()).ok());
  process.Kill();
  EXPECT_THAT(deaths.Await(1), ::testing::ElementsAre(3));
  other.Kill();
  EXPECT_THAT(deaths.Await(2), ::testing::ElementsAre(3, 4));
}

TEST(DeathWatch, NoticesAnExitWithoutRelease) {
  Process process(/*polite=*/false);
  Deaths deaths;
  std::unique_ptr<DeathWatch> watch = *DeathWatch::Create(deaths.Callback());
  ASSERT_TRUE(watch->Watch(0, process.Sign()).ok());
  process.Dismiss();
  EXPECT_THAT(deaths.Await(1), ::testing::ElementsAre(0));
}

TEST(DeathWatch, EveryWatcherIsTold) {
  Process process(/*polite=*/false);
  constexpr int kWatchers = 20;
  std::vector<std::unique_ptr<Deaths>> deaths;
  std::vector<std::unique_ptr<DeathWatch>> watches;
  const Fd sign = process.Sign();
  for (int i = 0; i < kWatchers; ++i) {
    deaths.push_back(std::make_unique<Deaths>());
    watches.push_back(*DeathWatch::Create(deaths.back()->Callback()));
    ASSERT_TRUE(watches.back()->Watch(i, Fd(dup(sign.get()))).ok());
  }
  process.Kill();
  for (int i = 0; i < kWatchers; ++i) EXPECT_THAT(deaths[i]->Await(1), ::testing::ElementsAre(i));
}

TEST(DeathWatch, ADeathBeforeTheWatchIsNoticedToo) {
  Process process(/*polite=*/false);
  Fd sign = process.Sign();
  process.Reap();
  Deaths deaths;
  std::unique_ptr<DeathWatch> watch = *DeathWatch::Create(deaths.Callback());
  ASSERT_TRUE(watch->Watch(7, std::move(sign)).ok());
  EXPECT_THAT(deaths.Await(1), ::testing::ElementsAre(7));
}

TEST(DeathWatch, WhoReleasedDoesNotDie) {
  Process polite(/*polite=*/true), marker(/*polite=*/false);
  Deaths deaths;
  std::unique_ptr<DeathWatch> watch = *DeathWatch::Create(deaths.Callback());
  ASSERT_TRUE(watch->Watch(1, polite.Sign()).ok());
  ASSERT_TRUE(watch->Watch(2, marker.Sign()).ok());
  polite.Dismiss();
  polite.AwaitEnd();
  marker.Kill();  // What is reported of it comes after all that was before.
  EXPECT_THAT(deaths.Await(1), ::testing::ElementsAre(2));
}

TEST(DeathWatch, ThreadsOfOneProcessWatchEachOther) {
  Deaths deaths;
  std::unique_ptr<DeathWatch> a = *DeathWatch::Create(deaths.Callback());
  std::unique_ptr<DeathWatch> b = *DeathWatch::Create(deaths.Callback());
  ASSERT_TRUE(a->Watch(1, *b->Sign()).ok());
  ASSERT_TRUE(b->Watch(0, *a->Sign()).ok());
  a.reset();
  b.reset();
  EXPECT_THAT(deaths.Await(0), ::testing::IsEmpty());
}

TEST(DeathWatch, RefusesWhatIsNoSign) {
  Deaths deaths;
  std::unique_ptr<DeathWatch> watch = *DeathWatch::Create(deaths.Callback());
  EXPECT_EQ(watch->Watch(0, Fd(open("/dev/null", O_RDWR))).code(), absl::StatusCode::kInvalidArgument);
  Fd small(memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(fcntl(small.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_EQ(watch->Watch(0, std::move(small)).code(), absl::StatusCode::kInvalidArgument);
  Fd shrinkable(memfd_create("shrinkable", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(shrinkable.get(), 4096), 0);
  EXPECT_EQ(watch->Watch(0, std::move(shrinkable)).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace shoal
