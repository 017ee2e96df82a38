// The parameters of one rank: the copies it computes with, their gradients, and the part of the optimizer state (f32 master
// weights and AdamW moments) that it owns. Dense parameters and experts are kept apart, because they are spread differently; this
// is what both have in common. Weights are of the compute type, norm vectors always f32; with f32 the owned weights are the master
// weights. Sharded as ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054). Threads and "collective" as in dense_store.h.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/optimizer/dense_store.h"
#include "models/optimizer/expert_store.h"
#include "runtime/kernels/fp8.h"

namespace shoal {

class ParameterStore {
 public:
  struct Options {
    DType compute = DType::kF32;
    bool training = true;  // Without gradients and moments otherwise.
    DensePolicy dense = DensePolicy::kReplicated;
    ExpertPolicy experts = ExpertPolicy::kKeep;
    int prefetch = 1;
    int waves_max = 1;  // Of schedules.
    int copies = -1;     // ExpertStore::Options::copies.
    Topology topology;   // Likewise.
    Numerics numerics = Numerics::kFast;
    Stream* stream = nullptr;  // DenseStore::Options::stream.
    kernels::Products products = kernels::Products::kSame;  // kFp8: `compute` is kBF16.
  };
  // `placement` is by layer, empty for dense layers. `group` has every rank; borrowed for life. RESOURCE_EXHAUSTED: too little
  // shared memory. Weights and state are uninitialised until InitializeOwned or a load, then GatherWeights.
  static absl::StatusOr<std::unique_ptr<ParameterStore>> Create(std::vector<ParameterSpec> parameters,
                                                                std::vector<ExpertPlacement> placement, Communicator& group,
                                                                const Options& options);

  DenseStore& dense() { return *dense_; }
  const DenseStore& dense() const { return *dense_; }
  ExpertStore& experts() { return *experts_; }
  const ExpertStore& experts() const { return *experts_; }

  // The dense parameter, as DenseStore has it.
  Tensor Weight(const std::string& name, Shape shape) const { return dense_->Weight(name, std::move(shape)); }
  Tensor Gradient(const std::string& name, Shape shape) const { return dense_->Gradient(name, std::move(shape)); }

  // What this rank owns, in canonical order. Valid until experts get other owners.
  std::vector<OwnedPart> owned() const;
  // Random weights: normal(0, stddev) by (seed, parameter, element), norm vectors 1; zero moments.
  void InitializeOwned(uint64_t seed, double stddev, Stream& stream);
  void ZeroMoments(Stream& stream);
  // Collective. Brings every rank's kept copies up to date with the owners' master weights.
  absl::Status GatherWeights(Stream& stream);
  // Writes sums of squares of reduced gradients by block [blocks] (f64, in memory of the stream), of those that this rank owns, 0 for
  // others: summed over ranks and then in the order of blocks they give a norm that does not depend on who owns what.
  void SquaresByBlock(const Tensor& squares, Stream& stream) const;
  int64_t owned_elements() const { return dense_->owned_elements() + experts_->owned_elements(); }

  bool training() const { return options_.training; }
  DType compute() const { return options_.compute; }
  // For layers that keep quantised weights beside those of the store, as long as the store keeps them.
  kernels::Products products() const { return options_.products; }
  bool keeps_dense() const { return options_.dense == DensePolicy::kReplicated; }
  bool keeps_experts() const { return options_.experts == ExpertPolicy::kKeep; }
  // Weights are the same from one BeginPass to the next, which its number tells apart (0 before the first).
  void BeginPass() { ++pass_; }
  uint64_t pass() const { return pass_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const std::vector<ParameterSpec>& parameters() const { return parameters_; }
  // Bytes of weights (with copies of experts), of gradients and of optimizer state on this rank.
  struct Memory {
    int64_t weights_bytes = 0, gradients_bytes = 0, state_bytes = 0;
  };
  Memory memory() const;

 private:
  ParameterStore(std::vector<ParameterSpec> parameters, const Options& options)
      : parameters_(std::move(parameters)), blocks_(MakeBlocks(parameters_)), options_(options) {}

  const std::vector<ParameterSpec> parameters_;
  const std::vector<Block> blocks_;
  const Options options_;
  uint64_t pass_ = 0;
  std::unique_ptr<DenseStore> dense_;
  std::unique_ptr<ExpertStore> experts_;
};

}  // namespace shoal
