#include "launch/trainer/recorded_step.h"

namespace shoal {

StepWay WayOf(const StepFacts& facts) {
  const bool fixed = facts.wanted && facts.on_device && facts.ranks == 1 && facts.routes_on_stream && !facts.observed;
  if (!fixed || !facts.ran) return StepWay::kRun;
  return facts.recorded ? StepWay::kReplay : StepWay::kRecord;
}

}  // namespace shoal
