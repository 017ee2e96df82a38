// The parameters of one rank: the copies it computes with, their gradients, and the part of the optimizer state (f32 master
// weights and AdamW moments) that it owns. Sharded as ZeRO stage 1 (Rajbhandari et al., 2020, arXiv 1910.02054): gradients
// are reduce-scattered to the owners of their blocks, owners update, updated weights are all-gathered.
//
// Blocks lie in flat buffers in the placement's order: norm vectors (always f32), dense matrices, experts. Weights are of
// the compute type; with f32 the owned weights are the master weights. Not thread-safe. Calls marked "collective" are made
// by all ranks in the same order, block, and fail with the communicator's ABORTED.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "collectives/communicator.h"
#include "models/blocks.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/optimizer.h"

namespace shoal {

// Rows of one parameter that this rank owns, f32 views of [rows, ...]; the moments are empty views in a store for inference.
struct OwnedPart {
  std::string name;
  Shape full_shape;
  int64_t row_begin = 0;
  int parameter = 0;
  Tensor master, exp_avg, exp_avg_sq;
};

class ParameterStore {
 public:
  struct Options {
    DType compute = DType::kF32;
    bool training = true;  // Without gradients and moments otherwise.
  };
  // `world` has every rank, `replicas` those that hold the same experts. Borrows both for life. RESOURCE_EXHAUSTED: too
  // little shared memory. Weights and state are uninitialised until InitializeOwned or a load, then GatherWeights.
  static absl::StatusOr<std::unique_ptr<ParameterStore>> Create(std::vector<ParameterSpec> parameters,
                                                                const Placement& placement, Communicator& world,
                                                                Communicator& replicas, const Options& options);

  // The parameter as a tensor of `shape`, which may span parameters that lie side by side. CHECKs that this rank holds it.
  Tensor Weight(const std::string& name, Shape shape) const;
  Tensor Gradient(const std::string& name, Shape shape) const;

  // What this rank owns, in canonical order.
  const std::vector<OwnedPart>& owned() const { return owned_; }
  // Random weights: normal(0, stddev) by (seed, parameter, element), norm vectors 1; zero moments.
  void InitializeOwned(uint64_t seed, double stddev, Stream& stream);

  void ZeroVectorGradients();
  // Collective. Sums gradients over the ranks that hold a block, into its owner.
  absl::Status ReduceGradients();
  // Collective, after ReduceGradients. The global L2 norm; the same bits on every rank.
  absl::StatusOr<double> GradientNorm(Stream& stream);
  // Collective. AdamW on what this rank owns; `decay` is for matrices. Then GatherWeights.
  absl::Status Update(kernels::AdamWStep step, Stream& stream);
  // Collective. Brings every rank's copies up to date with the owners' master weights.
  absl::Status GatherWeights(Stream& stream);

  bool training() const { return options_.training; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const std::vector<ParameterSpec>& parameters() const { return parameters_; }
  // Bytes of weights, of gradients and of optimizer state on this rank.
  struct Memory {
    int64_t weights_bytes = 0, gradients_bytes = 0, state_bytes = 0;
  };
  Memory memory() const;

 private:
  // The blocks of one kind on this rank.
  struct Flat {
    Communicator* group = nullptr;
    std::vector<int> blocks;
    std::vector<int64_t> counts;  // Elements owned by each rank of the group.
    int64_t owned_begin = 0;
    Tensor weights, gradients;              // All blocks of this kind that this rank holds.
    Tensor master, exp_avg, exp_avg_sq;     // What it owns of them.
  };
  struct Place {
    int flat = 0;
    int64_t offset = 0;
  };

  ParameterStore(std::vector<ParameterSpec> parameters, const Options& options);
  absl::Status AddFlat(BlockKind kind, const Placement& placement, Rank rank, Communicator& group);
  void AddOwnedParts(const Flat& flat, const Block& block, int64_t block_offset);
  const Place& Find(const std::string& name) const;

  std::vector<ParameterSpec> parameters_;
  std::vector<Block> blocks_;
  Options options_;
  Communicator* world_ = nullptr;
  std::vector<Flat> flats_;
  absl::flat_hash_map<std::string, Place> places_;
  std::vector<OwnedPart> owned_;
};

}  // namespace shoal
