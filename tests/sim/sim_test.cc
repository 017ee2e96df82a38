// Blocks of seeds of the simulation; what fails is replayed with the command that is printed.
#include <gtest/gtest.h>

#include <string>

#include "tests/sim/cluster.h"

namespace shoal::sim {
namespace {

constexpr uint64_t kBlock = 100;

class Seeds : public ::testing::TestWithParam<int> {};

TEST_P(Seeds, KeepEveryInvariant) {
  const uint64_t first = kBlock * GetParam() + 1;
  int64_t sums = 0;
  for (uint64_t seed = first; seed < first + kBlock; ++seed) {
    const Outcome outcome = Simulate({.seed = seed});
    sums += outcome.sums;
    for (const std::string& violation : outcome.violations)
      ADD_FAILURE() << violation << "\n  replay: build/release/tests/sim/sim_cluster --seed " << seed
                    << " --verbose";
  }
  EXPECT_GT(sums, static_cast<int64_t>(kBlock) * 50) << "hardly anything happened";
}

INSTANTIATE_TEST_SUITE_P(Block, Seeds, ::testing::Range(0, 20));

TEST(Simulation, OneSeedIsOneHistory) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const Outcome once = Simulate({.seed = seed}), again = Simulate({.seed = seed});
    EXPECT_EQ(once.digest, again.digest) << "seed " << seed;
    EXPECT_EQ(once.events, again.events) << "seed " << seed;
    EXPECT_NE(once.digest, Simulate({.seed = seed + 1}).digest) << "seed " << seed;
  }
}

bool Finds(Sabotage sabotage, const std::string& violation) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    for (const std::string& found : Simulate({.seed = seed, .sabotage = sabotage}).violations) {
      if (found.find(violation) != std::string::npos) return true;
    }
  }
  return false;
}

TEST(Simulation, FindsTwoViewsInOneEpochWhenCoordinatorsDrawTheSameNumbers) {
  EXPECT_TRUE(Finds(Sabotage::kEqualSeeds, "two views in epoch"));
}

TEST(Simulation, FindsRanksThatAreStuckWhenEpochsAreCommittedUnconfirmed) {
  EXPECT_TRUE(Finds(Sabotage::kPresumeConfirmed, "stuck although"));
}

}  // namespace
}  // namespace shoal::sim
