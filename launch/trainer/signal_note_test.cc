#include "launch/trainer/signal_note.h"

#include <signal.h>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(SignalNote, TellsOnceThatTheSignalCame) {
  SignalNote usr1(SIGUSR1, SignalNote::Again::kNoted), term(SIGTERM, SignalNote::Again::kNoted);
  EXPECT_FALSE(usr1.Take());
  raise(SIGUSR1);
  raise(SIGUSR1);
  EXPECT_FALSE(term.Take());
  EXPECT_TRUE(usr1.Take());
  EXPECT_FALSE(usr1.Take());
  raise(SIGUSR1);
  EXPECT_TRUE(usr1.Take());
}

TEST(SignalNoteDeathTest, TheSecondSignalDoesWhatItDidBefore) {
  EXPECT_EXIT(
      {
        SignalNote term(SIGTERM, SignalNote::Again::kAsBefore);
        raise(SIGTERM);
        if (term.Take()) raise(SIGTERM);
      },
      ::testing::KilledBySignal(SIGTERM), "");
}

TEST(SignalNoteDeathTest, WithoutItTheSignalDoesWhatItDidBefore) {
  EXPECT_EXIT(
      {
        { SignalNote term(SIGTERM, SignalNote::Again::kNoted); }
        raise(SIGTERM);
      },
      ::testing::KilledBySignal(SIGTERM), "");
}

}  // namespace
}  // namespace shoal
