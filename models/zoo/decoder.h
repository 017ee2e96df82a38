// A decoder-only transformer whose layers are mixtures of experts or dense: Mixtral (Jiang et al., 2024, arXiv 2401.04088)
// and its relatives. States what is computed for the sequences that a rank was given; where they and the experts live is the
// placement's. Not thread-safe.
#pragma once

#include <memory>
#include <vector>

#include "models/layers/attention.h"
#include "models/layers/feed_forward.h"

namespace shoal {

class Decoder {
 public:
  struct Options {
    int64_t seq = 0;           // Longest sequence.
    bool recompute = false;    // Keep only each layer's input for the backward pass.
    int64_t loss_chunk = 1024;  // Tokens whose logits exist at one time.
  };
  // Borrows `store` and `exchange` for life.
  Decoder(const ModelConfig& config, const Options& options, ParameterStore& store, TokenExchange& exchange);

  // Sums over the tokens given to a forward pass.
  struct Sums {
    double cross_entropy = 0;
    std::vector<RoutingSums> routing;  // Per MoE layer.
  };

  // The forward pass of tokens [rows, n + 1] (i32; position t predicts t + 1), and the backward pass of the head, whose
  // loss is loss_scale * (sum of cross-entropies). Keeps what Backward needs. rows may be 0. Collective over the
  // expert group when experts are spread: ABORTED when the epoch is over.
  absl::StatusOr<Sums> Forward(const Tensor& tokens, float loss_scale, kernels::Accumulate accumulate, Stream& stream);
  // The rest of the backward pass. `routing` has one entry per MoE layer. Collective like Forward.
  absl::Status Backward(const std::vector<RoutingGradient>& routing, Stream& stream);

  // The sum of cross-entropies alone; keeps nothing. Collective like Forward.
  absl::StatusOr<double> Evaluate(const Tensor& tokens, Stream& stream);
  // Logits [V] (f32) of the token after `ids` [n] (i32), n >= 1.
  absl::StatusOr<Tensor> NextLogits(const Tensor& ids, Stream& stream);

 private:
  struct LayerSaved {
    Tensor x;
    AttentionLayer::Saved attention;
    std::unique_ptr<FeedForward::Saved> feed_forward;
  };

  absl::StatusOr<Tensor> RunLayer(size_t layer, const Tensor& x, int64_t rows, LayerSaved* saved, RoutingSums* sums,
                                  Stream& stream);
  absl::StatusOr<Tensor> RunLayers(const Tensor& x, int64_t rows, bool keep, std::vector<RoutingSums>* sums,
                                   Stream& stream);
  // Sum of cross-entropies; with a positive scale also gradients of the head and of the final norm's output.
  double RunHead(const Tensor& normed, const Tensor& targets, float scale, kernels::Accumulate accumulate,
                 const Tensor& dnormed, Stream& stream);

  ModelConfig config_;
  Options options_;
  ParameterStore* store_;
  kernels::RopeTable rope_;
  std::vector<AttentionLayer> attention_;
  std::vector<std::unique_ptr<FeedForward>> feed_forward_;
  Tensor embedding_, norm_, head_;
  Tensor embedding_gradient_, norm_gradient_, head_gradient_;

  // Of the pass between Forward and Backward.
  int64_t rows_ = 0;
  kernels::Accumulate accumulate_ = kernels::Accumulate::kOverwrite;
  std::vector<LayerSaved> saved_;
  Tensor ids_, final_x_, final_rstd_, final_gradient_;
};

}  // namespace shoal
