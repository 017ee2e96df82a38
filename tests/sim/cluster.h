// A whole job on the simulated network: coordinators, members, faults, and the referee. First everything that
// can go wrong does; then faults stop, and all processes must come to work in one epoch within a bounded
// time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "collectives/membership/coordinator_core.h"
#include "tests/sim/member.h"
#include "tests/sim/network.h"
#include "tests/sim/referee.h"

namespace shoal::sim {

// Bugs planted into the coordinator's surroundings, to see that the simulation finds them.
enum class Sabotage {
  kNone,
  kEqualSeeds,        // All coordinators draw the same random numbers.
  kPresumeConfirmed,  // The coordinator takes every proposal as confirmed.
};

struct Options {
  uint64_t seed = 0;
  bool verbose = false;  // Prints what happens.
  Sabotage sabotage = Sabotage::kNone;
};

struct Outcome {
  std::vector<std::string> violations;
  uint64_t digest = 0;  // Equal for equal seeds.
  int64_t events = 0, views = 0, sums = 0;
  int64_t simulated_ns = 0;
};

Outcome Simulate(const Options& options);

}  // namespace shoal::sim
