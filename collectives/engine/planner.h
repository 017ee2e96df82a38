// Which program an operation runs: the choice of the algorithm, and the programs made so far, so that an operation that is
// repeated builds nothing. All ranks of a group choose alike: from what all of them know alike. Not thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "collectives/engine/op.h"
#include "collectives/engine/program_run.h"
#include "collectives/engine/tuner.h"
#include "collectives/program/algorithms.h"
#include "collectives/program/program.h"

namespace shoal {

// One rank's problem. Borrows `topology`.
Problem ProblemOf(const Operation& op, int index, int size, const Topology* topology);

// INVALID_ARGUMENT: the operation asks for an algorithm that does not exist, does not apply or does not fit its other
// options.
absl::Status CheckAlgorithm(const Operation& op, int index, int size, const Topology& topology);

class Planner {
 public:
  Planner(int index, int size, Topology topology, CostModel model);
  // Of a group on one host.
  Planner(int index, int size);

  struct Plan {
    Problem problem;
    DType dtype = DType::kF32;
    WireFormat wire = WireFormat::kAsIs;
    Order order = Order::kFast;
    std::string forced;
    const Algorithm* algorithm = nullptr;
    std::shared_ptr<const PreparedProgram> program;
    uint64_t hash = 0;
  };
  // Of an operation that passed CheckAlgorithm. The reference is right until the next call.
  const Plan& Find(const Operation& op);
  // Measured links, and the order of rings that fits them. Between operations.
  void SetModel(CostModel model);
  Tuner& tuner() { return tuner_; }
  const Tuner& tuner() const { return tuner_; }

 private:
  const Algorithm* Choose(const Operation& op, Problem* problem);

  const int index_, size_;
  Topology topology_;
  Tuner tuner_;
  std::list<Plan> plans_;  // The one used last in front.
};

}  // namespace shoal
