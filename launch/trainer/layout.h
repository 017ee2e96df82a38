// From a resolved configuration and the ranks of a job: the model's shape as the lower floors know it, where experts are at the
// start, and the shape of a step. Pure.
#pragma once

#include <optional>
#include <vector>

#include "launch/config/config.pb.h"
#include "models/model_config.h"
#include "parallel/placement/dispatch.h"
#include "parallel/placement/owners.h"
#include "parallel/placement/placement.h"
#include "parallel/schedule/step_graph.h"
#include "runtime/kernels/fp8.h"
#include "runtime/kernels/numerics.h"

namespace shoal {

ModelConfig ModelConfigOf(const Config& config);

// Expert groups on `ranks` ranks.
Layout LayoutFor(const Config& config, const ModelConfig& model, int ranks);
// Experts sharded over all ranks, with copies that change from step to step.
bool HasSparseExperts(const Config& config, const ModelConfig& model, int ranks);
// By layer, empty for dense layers. INVALID_ARGUMENT: parallel.expert does not fit.
absl::StatusOr<std::vector<ExpertPlacement>> InitialPlacement(const Config& config, const ModelConfig& model, int ranks);

StepShape StepShapeFor(const Config& config, const ModelConfig& model, const Topology& topology,
                       const std::vector<ExpertPlacement>& placement);
// Schedule::waves to choose from, ascending.
std::vector<int> WavesToChooseFrom(const Config& config, const ModelConfig& model, const StepShape& shape);
// Schedule::prefetch likewise.
std::vector<int> PrefetchToChooseFrom(const Config& config, const StepShape& shape);
DensePolicy DensePolicyFor(const Config& config);
ExpertPolicy ExpertPolicyFor(const Config& config);
Numerics NumericsFor(const Config& config);
kernels::Products ProductsFor(const Config& config);
// The token behind which attention does not look back; none: it sees whole sequences.
std::optional<int32_t> EndOfDocument(const Config& config);
DispatchRule DispatchRuleFor(const Config& config);
OwnerPolicy OwnerPolicyFor(const Config& config);

// "data parallel, optimizer sharded": for people.
std::string LayoutText(const Config& config, const ModelConfig& model, int ranks);

}  // namespace shoal
