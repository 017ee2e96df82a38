// A step as a graph of tasks: one description that is executed, simulated, planned with and traced (docs/design.md). A task
// waits for earlier tasks of the list and for those before it in its own lane, so the list order is a valid order on any
// number of lanes, and every rank issues the collectives of a lane in the same order: a graph cannot deadlock. (Graph::waves_apart
// has the one exception.) Plain values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/inlined_vector.h"

namespace shoal {

// A lane runs one task at a time, in list order: a thread on CPU, a stream on a GPU.
enum class Lane : uint8_t {
  kCompute,
  kCopy,     // Copies between buffers of this rank.
  kIntra,    // Communication between the ranks of a host.
  kInter,    // Communication across hosts. On one host whatever involves all ranks is on kIntra.
  kControl,  // Small agreed numbers (counts, sums): never behind bulk data.
};
inline constexpr int kLanes = 5;
// No other rank takes part in its tasks.
inline constexpr bool IsLocal(Lane lane) { return lane == Lane::kCompute || lane == Lane::kCopy; }

// What a task does. In brackets: what Task::units counts, which cost models are fitted to.
enum class Op : uint8_t {
  kGather,         // All-gather of the weights of dense bucket `chunk` [bytes of the bucket].
  kRelease,        // The weights of dense bucket `chunk`, or the copies of a layer's experts, are not needed before their next
                   // gather [0].
  kMaterialise,    // Sparse all-gather of a layer's expert weights [bytes that this rank sends or receives, the larger].
  kCalibrate,      // Sparse all-gather of the copies that a layer's true rows justify beyond those planned [bytes, as above].
  kEmbed,          // [tokens]
  kAttention,      // Norm, projections, attention [tokens].
  kDense,          // Dense feed-forward layer [tokens].
  kRoute,          // Norm and router scores; backward also the sum over slots [tokens].
  kExchange,       // All-gather of routing summaries [bytes].
  kArrange,        // Choices, who sends what to whom, the order of rows [tokens].
  kPack,           // Rows into send order [rows]. Backward: gradients of the combine, by token.
  kStay,           // Rows whose expert is on this rank: copied. kDispatch's and, with Task::back, kReturn's [bytes].
  kDispatch,       // All-to-all of rows to the ranks of their experts [bytes sent or received, the larger].
  kExperts,        // Grouped products of one chunk; backward: gradients by the input [rows].
  kExpertsWeight,  // Backward: gradients by the weights [rows].
  kReturn,         // All-to-all back home [bytes, as kDispatch].
  kShared,         // Shared expert [tokens].
  kCombine,        // Weighted sum of a token's rows, of one chunk [rows].
  kHead,           // Final norm, logits, loss and their gradients; backward: the final norm's [tokens].
  kTotals,         // All-reduce of routing sums [bytes].
  kBalance,        // Auxiliary losses and their gradients from the totals [0].
  kReduce,         // Reduce-scatter of a slice of a dense bucket's gradients (Task::slice) [bytes of the slice].
  kReduceExperts,  // Sparse reduce-scatter of a layer's expert gradients [bytes that this rank sends or receives, the larger].
  kNorm,           // Sums of squares of owned gradients [elements].
  kNormSum,        // All-reduce of those sums and of the loss [bytes].
  kUpdate,         // AdamW of dense bucket `chunk`, or of a layer's owned experts [elements].
};
inline constexpr int kOps = static_cast<int>(Op::kUpdate) + 1;

enum class Phase : uint8_t { kForward, kRecompute, kBackward, kUpdate };

struct Task {
  Op op = Op::kEmbed;
  Phase phase = Phase::kForward;
  Lane lane = Lane::kCompute;
  bool back = false;   // kStay: of the way home.
  int part = -1;       // Part of the batch (gradient accumulation); -1: none.
  int wave = -1;       // Of the part (Schedule::waves); -1: of all.
  int layer = -1;
  int chunk = -1;      // Chunk of the pipeline, or a dense bucket.
  int slice = -1;      // kReduce: index in Schedule::gradients.
  absl::InlinedVector<int, 4> after;  // Indices of tasks, all smaller than this one's.
  double units = 0;    // Expected; 0 until somebody fills it in (simulator, planner).
};

struct Graph {
  std::vector<Task> tasks;
  // A local lane keeps to the order of a wave's tasks alone, and of those of no wave; among waves it takes the first of the list that
  // may begin, so that nothing waits for a wave whose rows are late. What else must come before a task is in its `after`.
  bool waves_apart = false;
};

// Tasks with equal keys follow one cost model: time = fixed + per_unit * units.
struct CostKey {
  Op op = Op::kEmbed;
  Phase phase = Phase::kForward;  // kRecompute counts as kForward.
  Lane lane = Lane::kCompute;
  bool operator==(const CostKey&) const = default;
  template <typename H> friend H AbslHashValue(H h, const CostKey& key) {
    return H::combine(std::move(h), key.op, key.phase, key.lane);
  }
};
CostKey KeyOf(const Task& task);

std::string_view Name(Lane lane);    // compute, copy, intra, inter, control
std::string_view Name(Op op);        // attention, dispatch, ...
std::string_view Name(Phase phase);  // forward, ...
std::string Name(const CostKey& key);  // "dispatch backward inter"
std::string Name(const Task& task);    // "layer 3 dispatch backward 1 (part 0)"

// Equal exactly when the graphs are (up to collisions), without units: compared between ranks before they run one.
uint64_t Fingerprint(const Graph& graph);

}  // namespace shoal
