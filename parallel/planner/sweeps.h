// The experiments of papers, simulated with Shoal's own scheduler and placements: what `shoal simulate sweep` prints.
#pragma once

#include <string>

namespace shoal {

// FSMoE (arXiv 2501.10714), section 6.3: 1,458 layers on two testbeds. Some seconds.
std::string FsmoeSweepReport();
// Hecate (arXiv 2502.02581), section 5: systems over skew of the experts' loads on two clusters. Half a minute.
std::string HecateSweepReport();
// On the same clusters: what its calibration gains where loads change from step to step. Some seconds.
std::string CalibrationSweepReport();
// What two-level dispatch would gain on clusters with many hosts (docs/experts.md). Some seconds.
std::string DispatchSweepReport();

}  // namespace shoal
