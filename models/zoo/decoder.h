// A decoder-only transformer whose layers are mixtures of experts or dense: Mixtral (Jiang et al., 2024, arXiv 2401.04088)
// and its relatives. States what is computed for the sequences that a rank was given, as bodies of the tasks of a step graph
// (parallel/schedule/step_graph.h); which tasks there are, in which order and where experts live, is the placement's and the
// schedule's. Not thread-safe but for what the graph runs at the same time.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "models/layers/attention.h"
#include "models/layers/dense.h"
#include "models/layers/moe.h"

namespace shoal {

class Decoder {
 public:
  struct Options {
    int64_t seq = 0;            // Longest sequence.
    bool recompute = false;     // Keep only each layer's input for the backward pass.
    int64_t loss_chunk = 1024;  // Tokens whose logits exist at one time.
    // Tokens of training and evaluation attend within their own document, which ends with this token. None: within their sequence.
    std::optional<int32_t> end_of_document;
  };
  // Borrows `store` and `experts` for life.
  Decoder(const ModelConfig& config, const Options& options, ParameterStore& store, const ExpertContext& experts,
          Stream& stream);

  // One part of the batch, or one batch to evaluate.
  struct Pass {
    enum class Mode : uint8_t { kTrain, kEvaluate, kNextLogits };
    Mode mode = Mode::kTrain;
    Tensor tokens;  // [2, rows, n] (i32), in memory of the stream, as IdsAndTargets; with kNextLogits [1, 1, n]. rows may be 0.
    std::vector<int64_t> tokens_of_rank;  // n * rows of every rank.
    float loss_scale = 0;   // kTrain: the loss is this times the sum of cross-entropies.
    Tensor losses;          // kTrain, kEvaluate: f64 [waves], in memory of the stream; gets each wave's sum of cross-entropies.
    int part = 0;           // kTrain: the first part overwrites gradients, later ones add.
    const Schedule* schedule = nullptr;  // Borrowed until the next pass. The graph must have been emitted from it.
  };
  // [2, rows, n] of host tokens [rows, n + 1] (i32): the ids, and what follows each of them.
  static Tensor IdsAndTargets(const Tensor& tokens);
  // Before the pass's kEmbed. Drops what is left of the pass before.
  void Begin(Pass pass, Stream& stream);

  // The body of a task of the model: from kEmbed to kHead, forward and backward, with the rows on their way. Returns the units
  // done, when its kernels are on `stream`, of the task's lane. ABORTED when the group is over; the stream's failure.
  absl::StatusOr<double> Run(const Task& task, Stream& stream);

  // Sums over this rank's tokens, when the forward tasks are done.
  const Tensor& routing() const { return routing_; }  // RoutingSums of MoE layers, a row each.
  // kNextLogits: [V] (f32), of the token after the last, in memory of the stream.
  const Tensor& next_logits() const { return next_logits_; }
  // Rows of every rank for each expert, [ranks, E] per MoE layer, summed over the parts of a batch so far: the same on every rank.
  // Empty where ranks do not tell each other.
  const std::vector<std::vector<int64_t>>& rows_by_rank() const { return rows_by_rank_; }
  // How auxiliary losses enter the backward pass, one per MoE layer; before the first backward task.
  void SetRoutingGradients(std::vector<RoutingGradient> gradients) { routing_gradients_ = std::move(gradients); }

  int layers() const { return static_cast<int>(layers_.size()); }
  // Routers of MoE layers, in order.
  std::vector<Router*> routers();

 private:
  struct Layer {
    AttentionLayer attention;
    std::optional<DenseLayer> dense;
    std::unique_ptr<MoeLayer> moe;
    int moe_index = -1;
  };
  struct LayerState {
    Tensor x, delta;
    AttentionLayer::Saved attention;
    DenseLayer::Saved dense;
    MoeLayer::Saved moe;
  };
  // Some sequences of the pass (Schedule::waves).
  struct Wave {
    int index = 0;
    int64_t rows = 0;
    std::vector<int64_t> tokens_of_rank;
    Tensor ids, targets, x, gradient, final_rstd, final_gradient;
    Tensor first;  // Of kernels::Attention.
    std::vector<LayerState> layers;
    int64_t tokens() const { return ids.elements(); }
  };

  bool training() const { return pass_.mode == Pass::Mode::kTrain; }
  // Of the first wave; those after it add.
  kernels::Accumulate AccumulateOf(int layer, const Wave& wave) const;
  kernels::Accumulate AccumulateOfHead(const Wave& wave) const;
  void Embed(Wave* wave, Stream& stream);
  void EmbedBackward(Wave* wave, Stream& stream);
  absl::StatusOr<double> RunForward(const Task& task, Wave* wave, Stream& stream);
  absl::StatusOr<double> RunBackward(const Task& task, Wave* wave, Stream& stream);
  absl::Status Arrange(const Task& task, Wave* wave, Stream& stream);
  void Route(const Task& task, Wave* wave, Stream& stream);
  // Where a forward task of training notes what its router does.
  std::optional<RoutingSums> SumsOf(const Task& task) const;
  // The output of a layer is the input of the next; what the backward pass does not need goes.
  void FinishLayer(size_t layer, Tensor out, Wave* wave);
  void Head(Wave* wave, Stream& stream);
  void HeadBackward(Wave* wave, Stream& stream);
  // The wave's sum of cross-entropies; with a positive scale also gradients of the head and of the final norm's output.
  void Loss(const Tensor& normed, float scale, const Wave& wave, Stream& stream);

  const ModelConfig config_;
  const Options options_;
  ParameterStore* store_;
  Stream* compute_;  // Of the compute lane.
  const ExpertContext* experts_;
  kernels::RopeTable rope_;
  const std::string head_name_;
  std::vector<Layer> layers_;
  int64_t moe_layers_ = 0;

  Pass pass_;
  int64_t seq_ = 0;
  std::vector<Wave> waves_;
  Tensor next_logits_;
  Tensor routing_;
  std::vector<std::vector<int64_t>> rows_by_rank_;
  std::vector<RoutingGradient> routing_gradients_;
};

}  // namespace shoal
