#include "launch/trainer/recorded_step.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

constexpr StepFacts kFixed{.wanted = true, .on_device = true, .ranks = 1, .routes_on_stream = true};

TEST(WayOfAStep, IsRunOnceThenRecordedThenReplayed) {
  StepFacts facts = kFixed;
  EXPECT_EQ(WayOf(facts), StepWay::kRun);
  facts.ran = true;
  EXPECT_EQ(WayOf(facts), StepWay::kRecord);
  facts.recorded = true;
  EXPECT_EQ(WayOf(facts), StepWay::kReplay);
}

TEST(WayOfAStep, IsRunWhereALaunchDependsOnTheHost) {
  for (int which = 0; which < 5; ++which) {
    for (const bool recorded : {false, true}) {
      StepFacts facts = kFixed;
      facts.ran = true;
      facts.recorded = recorded;
      if (which == 0) facts.wanted = false;
      if (which == 1) facts.on_device = false;
      if (which == 2) facts.ranks = 2;
      if (which == 3) facts.routes_on_stream = false;
      if (which == 4) facts.observed = true;
      EXPECT_EQ(WayOf(facts), StepWay::kRun) << which;
    }
  }
}

}  // namespace
}  // namespace shoal
