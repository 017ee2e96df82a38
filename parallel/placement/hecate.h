// Which experts to materialise beside their owners in the next step, layer by layer (Hecate, arXiv 2502.02581, Algorithm 1 and
// calibration; where the paper is silent, what was chosen stands here). Pure integers: ranks that know the same counts come to
// the same placement.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "parallel/placement/copies.h"
#include "parallel/placement/dispatch.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"

namespace shoal {

// The loads of recent steps, of which the next step's are predicted.
class LoadWindow {
 public:
  LoadWindow(int layers, int experts, int steps = 5);

  // counts_LE: rows of each expert of each layer over all ranks in one step.
  void Add(absl::Span<const int64_t> counts_LE);
  // The sum over the last `steps` steps, by expert; zeros before the first Add. A sum instead of a mean stays exact.
  absl::Span<const int64_t> Predicted(int layer) const;
  // What was added in each of the last `steps` steps, oldest first; zeros before the first Add.
  std::vector<absl::Span<const int64_t>> Recent() const;

 private:
  size_t experts_;
  std::vector<std::vector<int64_t>> ring_;  // [steps][layers * experts]
  size_t next_ = 0;
  std::vector<int64_t> sum_LE_;
};

// How many experts can travel behind a layer's other work.
struct OverlapInputs {
  int64_t other_work_ns = 0;   // A layer's work beside its experts, less the time in which the link carries something else.
  int64_t link_bytes_per_s = 0;  // Into a host if there are several, else into a rank.
  int64_t expert_bytes = 0;      // On the wire.
  // How often an expert enters a host with several ranks that receive it: once by way of one of them, or once for each.
  enum class Entry : uint8_t { kOncePerHost, kOncePerRank } entry = Entry::kOncePerHost;
};
int OverlapBudget(const Topology& topology, const OverlapInputs& inputs);

struct MaterialiseBudget {
  int overlap = 0;  // Experts of a layer that can be sent behind its other work ("t").
  int memory = 0;   // Copies that a rank can hold beside the experts it owns ("m").
};

// The `overlap` experts with the highest loads get copies: on all ranks if memory allows, else in proportion to their loads,
// spread over hosts (those with fewest copies first, then those with most free places) and then over ranks. Experts without
// load get none, unless overlap and memory suffice for all experts: then all are on all ranks. Without budget: OwnersOnly().
ExpertPlacement Materialise(absl::Span<const int> owners, absl::Span<const int64_t> loads, const Topology& topology,
                            const MaterialiseBudget& budget);

// The same with a choice per host instead of one for all: each host gets copies of the experts that its own tokens use most.
// Sending an expert costs the host that receives it, so at equal cost per host more tokens find a copy near. With several
// hosts, experts that the host has already do not count against `overlap`.
// loads_HE: rows of each host's tokens for each expert [hosts, experts]; see SumByHost().
ExpertPlacement MaterialisePerHost(absl::Span<const int> owners, absl::Span<const int64_t> loads_HE, const Topology& topology,
                                   const MaterialiseBudget& budget);

struct CalibrateOptions {
  MaterialiseBudget budget;  // overlap: the most experts to send in addition; memory: what planned copies occupy included.
  DispatchRule rule = DispatchRule::kNearest;
  CopyCosts costs;
};

struct Calibration {
  ExpertPlacement placement;  // What was planned and maybe more copies; never fewer.
  int64_t gain_ps = 0;        // Saved by the layer's forward and backward pass; 0 if nothing is worth sending.
  // What the additional copies cost: sending them, which nothing hides, and what is not hidden of their return.
  int64_t copies_ps = 0;
};

// Once the rows of a step are known, rows_SE [ranks, experts]: the hottest 1, 2, 4, ... experts by true loads get additional
// copies in the memory that is left; of these plans the one that saves most after its cost, if any saves at least 2% of the
// layer's time.
Calibration Calibrate(const ExpertPlacement& planned, absl::Span<const int64_t> rows, const Topology& topology,
                      const CalibrateOptions& options);

}  // namespace shoal
