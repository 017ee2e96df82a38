// The graph of one training step of a mixture-of-experts transformer, from the shape of the model, the policies of the
// placement and a schedule. Pure: every rank emits the same list from the same arguments; which rows and bytes a task moves is
// decided when it runs.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "parallel/schedule/graph.h"

namespace shoal {

// Dense parameters are communicated in buckets, each with consecutive numbers of elements: vectors, embedding, the dense
// matrices of each layer, head.
struct BucketIndex {
  int layers = 0;
  bool head = true;  // False: tied to the embedding.
  static constexpr int kVectors = 0, kEmbedding = 1;
  int OfLayer(int layer) const { return 2 + layer; }
  int OfHead() const { return head ? 2 + layers : kEmbedding; }
  int count() const { return 2 + layers + (head ? 1 : 0); }
  bool IsLayer(int bucket) const { return bucket >= 2 && bucket < 2 + layers; }
  // What DensePolicy::kSharded shards: not vectors, which are small, nor an embedding that is the head, too, as it is needed at both
  // ends of a step.
  bool Shardable(int bucket) const { return IsLayer(bucket) || (head && bucket != kVectors); }
};

enum class DensePolicy : uint8_t {
  kReplicated,  // Weights are gathered once a step and kept (ZeRO stage 1).
  // Gathered when used and released, gradients leave at once (ZeRO stage 3, FSDP); vectors and a tied embedding as above.
  kSharded,
};
enum class ExpertPolicy : uint8_t {
  kKeep,           // Materialised experts stay from the forward to the backward pass.
  kRematerialise,  // Released after the forward pass and gathered again.
};

struct LayerShape {
  bool moe = true;
  bool shared_expert = false;
};

struct StepShape {
  enum class Mode : uint8_t { kTrain, kForward };
  Mode mode = Mode::kTrain;  // kForward: no gradients, nothing kept (validation, generation).
  std::vector<LayerShape> layers;
  bool tied_head = false;
  int parts = 1;
  bool recompute = false;
  int ranks = 1;
  bool intra = false;      // Some host has several ranks.
  bool inter = false;      // There are several hosts.
  bool exchange = true;    // Ranks tell each other what their routers chose: rows travel, or choices depend on all tokens.
  bool dispatch = false;   // Some expert is not on every rank: rows travel.
  bool materialise = false;  // Some expert has holders beside its owner.
  bool balance = true;       // Gradients of routers depend on what all tokens of a part chose (auxiliary losses).
  bool calibrate = false;    // More copies may be sent when a layer's rows are known; needs `materialise` and `exchange`.
  bool streams = false;      // A device computes, whose streams run ahead of rows: which wave may go on is not known in time.
  DensePolicy dense = DensePolicy::kReplicated;
  ExpertPolicy experts = ExpertPolicy::kKeep;
  BucketIndex buckets() const { return {static_cast<int>(layers.size()), !tied_head}; }
};

// A range of a dense bucket's gradients, sent in one reduce-scatter.
struct GradientSlice {
  int bucket = 0;
  int64_t begin = 0, count = 0;  // Elements.
  // Its place in the lane: right after the last dispatch of this layer's backward pass, which must come after the backward pass
  // of the bucket's own layer; -1: when all backward passes are done. With DensePolicy::kSharded the layer must be one of the
  // `prefetch` layers below the bucket's own, for the head any layer, because then its buffer is needed.
  int before_layer = -1;
};

struct LayerSchedule {
  int forward_chunks = 1, backward_chunks = 1;
};

// What the scheduler decides. Never changes what is computed beyond the order of sums.
struct Schedule {
  std::vector<LayerSchedule> layers;
  std::vector<GradientSlice> gradients;  // All elements of all buckets exactly once, in the order of sending.
  int prefetch = 1;                      // Layers ahead that weights are gathered.
  // Parts of this rank's sequences (EvenPart) that take turns in each layer: while the rows of one wave travel, another computes
  // attention or experts, so that communication hides behind all work of a layer and not only behind its experts.
  int waves = 1;
  // The wave that goes on, turn by turn; empty: each in turn, so that all are in one layer. A turn ends where a wave waits for links:
  // a layer has two of them in each pass, one up to the departure of rows, one with the experts. A wave is never ahead of an earlier
  // one. Only where WavesMayPart: then the backward pass of early waves, which computes more than it sends, runs beside the forward
  // pass of late ones (DualPipe of DeepSeek-V3, arXiv 2412.19437, has the same aim between stages of a pipeline).
  std::vector<int> turns;
};

// Whether waves may be in different layers: nothing waits for what all of them have done, weights are here throughout.
bool WavesMayPart(const StepShape& shape);

// Which wave goes on.
struct TurnRule {
  int forward_waves = 2;  // In the forward pass at a time: early ones are to be in their backward pass soon.
  // The youngest wave goes on while the link would be idle this soon, otherwise the oldest: of those whose rows are here.
  double hungry_ns = 0;
};

// Schedule::turns by a rule, if tasks take `cost_ns`; `schedule` has none. Only where WavesMayPart.
std::vector<int> ChooseTurns(const StepShape& shape, const Schedule& schedule, const TurnRule& rule,
                             const std::function<double(const Task&)>& cost_ns);

// Numbers of waves worth a trial where a rank has so many sequences: powers of two, not more than hide what their messages cost.
std::vector<int> WavesUpTo(int64_t sequences);

// How many layers ahead weights may be gathered, where nobody says: more than one where that takes no memory.
std::vector<int> PrefetchUpTo(const StepShape& shape);

// One chunk everywhere, each bucket's gradients as one slice as soon as they are complete.
Schedule PlainSchedule(const StepShape& shape, const std::vector<int64_t>& bucket_elements);

// "2 waves; chunks 1 forward, 2 backward; 9 slices of gradients": for people.
std::string Describe(const Schedule& schedule);

// Buffers that sharded layers take in turn. Sharded embedding and head have one between them.
int DenseBuffers(int prefetch, int waves);

// The layer whose backward pass completes the gradients of a bucket; -1: only the end of the pass does (vectors, embedding).
int CompletedBy(const StepShape& shape, int bucket);

Graph EmitStep(const StepShape& shape, const Schedule& schedule);

}  // namespace shoal
