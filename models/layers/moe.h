// The feed-forward half of a layer of experts: x + shared(norm(x)) + sum over chosen experts of weight * expert(norm(x)). Each call
// is the body of one kind of task (parallel/schedule/graph.h); the graph says in which order and on which lane they run. T tokens, D
// width, F inner width, S rows of this rank's (token, expert) pairs, R rows of the experts that are here.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/layers/expert_rows.h"
#include "models/layers/gated_mlp.h"
#include "models/model_config.h"
#include "models/routers/router.h"
#include "parallel/expert/token_exchange.h"

namespace shoal {

// What layers of experts share.
struct ExpertContext {
  Communicator* control = nullptr;  // All ranks, for routing summaries; null: choices need no other rank and no row travels.
  TokenExchange* exchange = nullptr;
  Topology topology;
  int rank = 0;
  DispatchRule rule = DispatchRule::kNearest;
  Numerics numerics = Numerics::kFast;  // kPinned: one wave, one chunk and a rule that IsWhole.
  // Where experts shall be in this step, once the rows_SE [ranks, E] of its first wave are known: `planned`, maybe with more
  // holders. The same on every rank. Null: as planned. The graph must have kCalibrate then.
  std::function<ExpertPlacement(const ExpertPlacement& planned, absl::Span<const int64_t> rows)> calibrate;
};

// Whether such layers leave their choices on the stream of a device, so that nothing of a pass waits for it: where there is one rank,
// a router without capacity and no pinned order. On others, and on the CPU, the host plans rows by counts that it waits for.
bool RoutesOnStream(const ModelConfig& config, const ExpertContext& context, const Stream& stream);
// Sums [layers, RoutingSums::Width] of nothing yet, where the routers of such layers add to them.
Tensor NewRoutingSums(const ModelConfig& config, const ExpertContext& context, int64_t layers, Stream& stream);

class MoeLayer {
 public:
  struct Chunks {
    int forward = 1, backward = 1;
  };
  // What one pass of one wave leaves for the next task and for the backward pass. `wave` and `first` are given.
  struct Saved {
    int wave = 0;
    bool first = false;  // Of a training step.
    Router::Batch batch;
    Chunks chunks;
    Tensor x, normed, rstd;  // x: the sum that was normalised.
    std::unique_ptr<Router::Saved> routing;
    // Of this rank and of all; of a pass that RoutesOnStream none. Those of all may be given, by a pass of the same tokens before.
    Tensor summary, summaries;
    RoutedTokens routed;
    std::optional<ExpertRows> rows;
    Tensor slot, token, offset;  // `offset`: that of `routed`, where the stream computes.
    Tensor sent, arrived, gate_up;  // [S, D] (a buffer: until the rows are gone), [R, D], [R, 2F]
    Tensor results, y;              // [R, D] (a buffer), [S, D]: the experts' results here and back home.
    Tensor shared_gate_up, out;     // [T, 2F'], [T, D]
    // Of the backward pass.
    Tensor dweight, dy_home, dy, dh, dx, dx_home;
  };

  // Borrows `store` and `context` for life.
  MoeLayer(const ModelConfig& config, int layer, ParameterStore& store, const ExpertContext& context);

  Router& router() { return *router_; }
  bool has_shared_expert() const { return shared_.has_value(); }

  // ---- Forward. `batch` without pieces.
  void Route(const Tensor& x, const Tensor& delta, Router::Batch batch, Chunks chunks, Saved* saved, const RoutingSums* sums,
             Stream& stream);
  absl::StatusOr<int64_t> Exchange(Saved* saved);  // Bytes.
  absl::Status Arrange(Saved* saved, const RoutingSums* sums, Stream& stream);
  // Adds the rows of every rank for each expert to rows [ranks, E]; nothing where ranks do not tell each other.
  void AddRows(const Saved& saved, std::vector<int64_t>* rows) const;
  int64_t Pack(int chunk, Saved* saved, Stream& stream);     // Rows.
  int64_t Experts(int chunk, Saved* saved, Stream& stream);  // Rows.
  void Shared(Saved* saved, Stream& stream);
  int64_t Combine(int chunk, Saved* saved, Stream& stream);  // Rows. The last chunk completes saved->out.

  // ---- Backward, from gradient_TD (f32) by the output.
  absl::StatusOr<int64_t> PackBackward(int chunk, const Tensor& gradient, Saved* saved, Stream& stream);
  int64_t ExpertsBackward(int chunk, Saved* saved, Stream& stream);
  int64_t ExpertsWeight(int chunk, int part, Saved* saved, Stream& stream);
  void SharedBackward(const Tensor& gradient, kernels::Accumulate accumulate, Saved* saved, Stream& stream);
  // gradient becomes the one by x + delta.
  void RouteBackward(const RoutingGradient& routing, kernels::Accumulate accumulate, const Tensor& gradient, Saved* saved,
                     Stream& stream);

  // Rows of a chunk on their way; `phase` says of which pass. Bytes.
  absl::StatusOr<int64_t> Travel(const Task& task, Saved* saved);
  int64_t Stay(const Task& task, Saved* saved, Stream& stream);

 private:
  // The plan of the rows of `saved->routed`, whose counts the host knows, and their order.
  void PlanRows(Saved* saved, Stream& stream) const;
  // Adds the holders that the rows of a step's first wave justify.
  void Calibrate(const Saved& saved);
  struct Ends {
    Tensor from, to;
  };
  static Ends EndsOf(Phase phase, TokenExchange::Way way, const Saved& saved);
  // Matrices of experts from their flat tensors: w2, or w1 and w3 together.
  std::vector<Tensor> Matrices(const std::vector<Tensor>& experts, bool down) const;
  std::vector<Tensor> LocalWeights(bool down) const;
  std::vector<Tensor> LocalGradients(bool down) const;
  // The gradient of each source's rows as a product of its own.
  void PinnedWeight(int part, const Saved& saved, Stream& stream);
  absl::StatusOr<Tensor> Rows(TokenExchange::Use use, int64_t rows, const Saved& saved, Stream& stream);

  const ModelConfig config_;
  const int layer_;
  ParameterStore* store_;
  const ExpertContext* context_;
  const float epsilon_;
  const std::string norm_;
  std::unique_ptr<Router> router_;
  std::optional<GatedMlp> shared_;
  ExpertProjection gate_up_, down_;
  KeptMatrixList gate_up_gradients_, down_gradients_;
};

}  // namespace shoal
