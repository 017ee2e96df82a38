#include "collectives/membership/setbacks.h"

#include <gtest/gtest.h>

namespace shoal {
namespace {

// One epoch that ends by what this process lacks.
int Lack(Setbacks& setbacks) {
  setbacks.OnFormed();
  return setbacks.OnLack();
}

TEST(Setbacks, OneIsBadLuckAndMoreInARowAreCounted) {
  Setbacks setbacks;
  EXPECT_EQ(Lack(setbacks), 0);
  for (int times = 1; times < 100; ++times) EXPECT_EQ(Lack(setbacks), times);
}

TEST(Setbacks, AnEpochIsCountedOnce) {
  Setbacks setbacks;
  EXPECT_EQ(Lack(setbacks), 0);
  EXPECT_EQ(Lack(setbacks), 1);
  EXPECT_EQ(setbacks.OnLack(), 0);  // Noticed again, when the caller asks for the next one.
  setbacks.OnLeft();
  EXPECT_EQ(Lack(setbacks), 2);
}

TEST(Setbacks, AnEpochThatCouldBeWorkedInEndsTheRow) {
  Setbacks setbacks;
  EXPECT_EQ(Lack(setbacks), 0);
  EXPECT_EQ(Lack(setbacks), 1);
  setbacks.OnFormed();
  setbacks.OnEntered();
  setbacks.OnLeft();
  EXPECT_EQ(Lack(setbacks), 0);
}

TEST(Setbacks, AnEpochThatBrokeInAnotherWayBetweenThemDoesNotEndTheRow) {
  Setbacks setbacks;
  EXPECT_EQ(Lack(setbacks), 0);
  setbacks.OnFormed();
  setbacks.OnLeft();
  EXPECT_EQ(Lack(setbacks), 1);
}

TEST(Setbacks, ALackInAnEpochThatWasEnteredBelongsToTheRow) {
  Setbacks setbacks;
  for (int times = 0; times < 3; ++times) {
    setbacks.OnFormed();
    setbacks.OnEntered();
    EXPECT_EQ(setbacks.OnLack(), times);
    setbacks.OnLeft();
  }
}

TEST(Setbacks, DelaysDoubleUpToABound) {
  const absl::Duration timeout = absl::Milliseconds(500);
  EXPECT_EQ(RejoinDelay(timeout, 0), absl::ZeroDuration());
  EXPECT_EQ(RejoinDelay(timeout, 1), timeout);
  EXPECT_EQ(RejoinDelay(timeout, 2), 2 * timeout);
  EXPECT_EQ(RejoinDelay(timeout, 3), 4 * timeout);
  for (int times : {5, 6, 40, 1'000'000}) EXPECT_EQ(RejoinDelay(timeout, times), 16 * timeout);
}

}  // namespace
}  // namespace shoal
