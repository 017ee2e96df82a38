// One optimizer step of one rank: forward, backward, reduction, clipping, AdamW. Reads like the paper; where things live is
// the placement's.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "collectives/communicator.h"
#include "launch/config/config.pb.h"
#include "models/routers/balance.h"
#include "models/zoo/decoder.h"

namespace shoal {

struct StepResult {
  double loss = 0;  // cross_entropy + coefficients * (aux, z), over the global batch; the same on every rank.
  double cross_entropy = 0, aux = 0, z = 0;
  double grad_norm = 0;                            // Before clipping.
  std::vector<std::vector<int64_t>> expert_counts;  // Per MoE layer, over the global batch.
  bool finite = true;                              // False: the update was skipped.
  double forward_seconds = 0, backward_seconds = 0, reduce_seconds = 0, update_seconds = 0;
};

// Gradients of a step before clipping and update; for tests. Called between the reduction and the update.
using OnGradients = std::function<void(const ParameterStore&)>;

// The model of one rank, ready to train or to evaluate. Not thread-safe; its collective calls are made by all ranks alike.
class RankModel {
 public:
  // Borrows `world` for life. `precision` fp32 or bf16 is the configuration's. Parameters are uninitialised.
  // INVALID_ARGUMENT: the parallel layout does not fit; RESOURCE_EXHAUSTED: too little shared memory.
  static absl::StatusOr<std::unique_ptr<RankModel>> Create(const Config& config, const ModelConfig& model,
                                                           Communicator& world, bool training);

  // Collective. One step on this rank's rows of each part of the global batch: batch_of(part) is [rows, seq + 1] (i32).
  absl::StatusOr<StepResult> Train(const std::vector<Tensor>& parts, double learning_rate, int64_t update,
                                   const OnGradients& on_gradients = nullptr);
  // Collective. Sum of cross-entropies over all ranks' rows.
  absl::StatusOr<double> Evaluate(const Tensor& rows);

  // This rank's share of a part of the batch with `rows` sequences.
  Range RowsOf(int64_t rows) const { return placement_.RowsOf(Rank{world_->index()}, rows); }

  ParameterStore& store() { return *store_; }
  const ParameterStore& store() const { return *store_; }
  Decoder& decoder() { return *decoder_; }
  Stream& stream() { return stream_; }
  const Placement& placement() const { return placement_; }
  const ModelConfig& model() const { return model_; }

 private:
  RankModel(const Config& config, const ModelConfig& model, Placement placement, Communicator& world)
      : config_(config), model_(model), placement_(std::move(placement)), world_(&world) {}

  // Sums of a part over all ranks, from one reduction.
  struct PartTotals {
    double cross_entropy = 0;
    RoutingTotals routing;
  };
  absl::StatusOr<PartTotals> SumOverRanks(const Decoder::Sums& sums, int64_t tokens);
  absl::Status TrainPart(const Tensor& tokens, int part, StepResult* result);

  Config config_;
  ModelConfig model_;
  Placement placement_;
  Communicator* world_;
  std::unique_ptr<Communicator> replicas_, experts_;
  std::unique_ptr<ParameterStore> store_;
  std::unique_ptr<TokenExchange> exchange_;
  std::unique_ptr<Decoder> decoder_;
  Stream stream_;
};

// The placement's layout of a resolved configuration on `ranks` ranks.
Layout LayoutFor(const Config& config, const ModelConfig& model, int ranks);
// The model's shape, as the lower floors know it, from a resolved configuration.
ModelConfig ModelConfigOf(const Config& config);

}  // namespace shoal
