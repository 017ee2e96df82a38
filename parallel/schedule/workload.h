// What the tasks of a step have to do on each rank, in the units that cost models are fitted to (Op). Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/placement/dispatch.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/placement/topology.h"
#include "parallel/schedule/graph.h"
#include "parallel/schedule/step_graph.h"

namespace shoal {

// A layer's experts and the rows that they get.
struct ExpertWork {
  ExpertPlacement placement;
  // Rows of each source rank for each expert in one part, row-major [ranks, experts]. Empty: each token's choices spread evenly
  // over all experts.
  std::vector<int64_t> rows;
};

struct Workload {
  std::vector<int64_t> tokens;  // By rank, of one part; a single entry holds for every rank.
  int64_t sequence_tokens = 1;  // Waves (Schedule::waves) are made of whole sequences.
  int choices = 1;              // Experts of a token.
  int64_t row_bytes = 0;        // Of a token's vector on its way to an expert.
  DispatchRule dispatch = DispatchRule::kNearest;
  int64_t expert_elements = 0;
  int64_t expert_weight_bytes = 0, expert_gradient_bytes = 0;  // Of one expert, as they are sent.
  std::vector<int64_t> bucket_elements;                        // Of dense buckets (BucketIndex).
  std::vector<int64_t> bucket_bytes;                           // Of their weights, as they are sent.
  int64_t gradient_bytes = 4;                                  // Of an element of a dense gradient, as it is sent.
  int64_t summary_bytes = 0;                                   // What a rank tells all others about the routing of one layer.
  int64_t totals_bytes = 0;                                    // Routing sums of all layers.
  int64_t norm_bytes = 16;                                     // Sums of squares, and of the loss.
  // Layers whose experts and rows are alike share an entry.
  std::vector<ExpertWork> experts;
  std::vector<int> experts_of_layer;  // Index into `experts`; -1: a dense layer.

  int64_t TokensOf(int rank) const { return tokens.size() == 1 ? tokens[0] : tokens[static_cast<size_t>(rank)]; }
};

// The part of one rank in one expert layer, in one part of the batch. Rows may be fractions where loads are spread evenly.
struct ExpertShare {
  double rows = 0;              // Of its own tokens.
  double arrived = 0;           // That its experts compute, its own among them.
  double stay = 0;              // That do not leave the rank.
  double intra = 0, inter = 0;  // Sent or received, the larger, inside the host and across hosts.
  double copies = 0;            // Experts whose weights it sends or receives, the larger, when copies are gathered.
  double owned = 0;             // Experts.
  friend bool operator==(const ExpertShare&, const ExpertShare&) = default;
};

// Shares of every rank. O(ranks * experts + copies); with even rows O(ranks + copies). Copies are gathered by two-level trees,
// as Communicator::SparseAllGather does.
std::vector<ExpertShare> ShareExperts(const Workload& workload, const ExpertWork& experts, const Topology& topology);

// Units of tasks. Borrows its arguments for life.
class StepUnits {
 public:
  static constexpr int kEveryRank = -1;  // The largest units of any rank.

  StepUnits(const Workload& workload, const Topology& topology);

  // Of a task of the graph that `schedule` emits, on `rank` or kEveryRank.
  double Of(const Task& task, const Schedule& schedule, int rank) const;
  // What is not equal for ranks that differ in any task's units.
  std::vector<double> KeyOfRank(int rank) const;

 private:
  const ExpertShare& Share(int layer, int rank) const;
  int64_t Tokens(int rank) const;
  int64_t TokensOfWave(const Task& task, const Schedule& schedule, int rank) const;
  double ShareOfChunk(const Task& task, const Schedule& schedule, int rank) const;
  double ElementsOwned(int rank) const;

  const Workload& workload_;
  const int ranks_;
  int64_t tokens_max_ = 0;
  std::vector<std::vector<ExpertShare>> shares_;  // By entry of Workload::experts, by rank; last the largest of each field.
};

// Writes Task::units of `rank`.
void FillUnits(const Workload& workload, const Topology& topology, const Schedule& schedule, int rank, Graph* graph);

// What EmitStep must know of a placement: whether rows travel, whether some expert has copies, which links there are.
void DescribeTraffic(const Workload& workload, const Topology& topology, StepShape* shape);

}  // namespace shoal
