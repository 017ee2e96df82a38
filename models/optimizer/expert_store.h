// The experts of one rank: those that it owns (weights, gradients, optimizer state) and copies of others that are materialised here
// (weights and gradients alone). A layer's ExpertPlacement says which; Materialise brings the owners' weights to the holders,
// ReduceGradients brings their gradients back (sparse all-gather and reduce-scatter of Hecate, arXiv 2502.02581).
//
// Gradients of experts are sums over what ranks compute, in any order (Numerics::kFast: BeginGradients, Gradients) or in the pinned
// one (kPinned: BeginPartials, AddPartial); ReduceGradients completes either.
//
// Copies are kept from the forward to the backward pass, in room for `copies` experts per layer; or only while a layer is computed,
// in prefetch + 1 such rooms that layers take in turn (ExpertPolicy). Threads and "collective" as in dense_store.h.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "collectives/communicator.h"
#include "models/blocks.h"
#include "models/optimizer/expert_partials.h"
#include "models/optimizer/owned_part.h"
#include "parallel/placement/expert_placement.h"
#include "parallel/schedule/step_graph.h"
#include "runtime/base/mutex.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/optimizer.h"

namespace shoal {

class ExpertStore {
 public:
  struct Options {
    DType compute = DType::kF32;
    bool training = true;
    ExpertPolicy policy = ExpertPolicy::kKeep;
    int prefetch = 1;
    int copies = -1;  // Room for copies of a layer; -1: as many as the first placement needs.
    Topology topology;  // To count bytes; empty: one host.
    Numerics numerics = Numerics::kFast;
    Stream* stream = nullptr;  // As DenseStore's.
  };
  // `placement` is by layer, empty for layers without experts. Borrows all but `placement` and `options` for life.
  // RESOURCE_EXHAUSTED: too little shared memory.
  static absl::StatusOr<std::unique_ptr<ExpertStore>> Create(const std::vector<ParameterSpec>& parameters,
                                                             const std::vector<Block>& blocks,
                                                             std::vector<ExpertPlacement> placement, Communicator& group,
                                                             const Options& options);

  const std::vector<ExpertPlacement>& placement() const { return placement_; }
  int copies() const { return copies_; }
  // What room for one more copy of each layer takes on this rank.
  int64_t copy_bytes() const;
  // Local, between steps: room for at least so many copies of each layer. If there was less, copies are gone until they are
  // materialised again. RESOURCE_EXHAUSTED: too little shared memory.
  absl::Status MakeRoom(int copies);
  int64_t expert_elements() const { return elements_; }
  // Other holders, the same owners, for the next passes. Copies are empty until materialised. Between steps only.
  void SetHolders(std::vector<ExpertPlacement> placement);
  // In a step, before the layer's experts are used: more holders for the rest of it, `placement` with all that there are now. Only
  // placement() changes at once, so weights of the layer may be on their way meanwhile; the rest follows with MaterialiseAdded.
  void AddHolders(int layer, ExpertPlacement placement);
  // Collective, after Materialise: brings weights to holders that were added. Does nothing where none were. Returns bytes as
  // Materialise.
  absl::StatusOr<int64_t> MaterialiseAdded(int layer);
  // Collective, between steps: experts, with their optimizer state, to new owners. Layers with moved experts then have no holders.
  // Needs memory for what arrives here once more.
  absl::Status SetOwners(const OwnerMap& owners);

  // Experts of a layer that are here, ascending: of them an index counts in the calls below.
  const std::vector<int>& Local(int layer) const { return at(layer).local; }
  // Flat [elements of an expert]: its parts in the order of its block (w1, w3, w2). Valid while the layer's copies are.
  Tensor Weights(int layer, int expert) const;
  Tensor Gradients(int layer, int expert) const;

  // Collective. Does nothing where no expert has holders, or where all copies are up to date. Returns the bytes that this rank
  // sends or receives, the larger.
  absl::StatusOr<int64_t> Materialise(int layer);
  void Release(int layer);
  // Before gradients of a part are written: which mode they are written in.
  kernels::Accumulate BeginGradients(int layer, int part, Stream& stream);
  // kPinned: before gradients of a part are computed; `shares` by source (DispatchPlan::shares). Then for each expert the partial
  // [elements] (f32) of each source that has rows here, ascending by source. Where some expert has holders
  // ReduceGradients comes after each part, which needs kRematerialise if there are several.
  void BeginPartials(int layer, int part, absl::Span<const std::vector<DispatchShare>> shares, Stream& stream);
  void AddPartial(int layer, int expert, int source, Tensor partial, Stream& stream);
  // Collective. Sums gradients into owners. With kRematerialise also ends the use of the layer's copies.
  absl::StatusOr<int64_t> ReduceGradients(int layer);

  // AdamW on the owned experts of a layer, with `numbers` as kernels::AdamW has them. Returns their elements.
  int64_t Update(int layer, const kernels::AdamWStep& step, const Tensor& numbers, Stream& stream);
  void Refresh(Stream& stream);
  void SumSquares(const Tensor& sums, Stream& stream) const;  // As DenseStore's.
  void AppendOwned(std::vector<OwnedPart>* owned) const;
  int64_t owned_elements() const { return (slots_ - static_cast<int64_t>(free_slots_.size())) * elements_; }
  struct Memory {
    int64_t weights_bytes = 0, gradients_bytes = 0, state_bytes = 0;  // Copies included.
  };
  Memory memory() const;

 private:
  struct Layer {
    std::vector<int> blocks;     // By expert; empty: no experts.
    std::vector<int> slot;       // By expert: of those owned here, its row in the tensors below; else -1.
    std::vector<int> local;      // Experts here.
    std::vector<int> copy;       // By expert: of those copied here, its row in a room; else -1.
    std::vector<SparseMove> moves;
    int64_t moved = 0;           // MovedExperts of this rank.
    int room = -1;               // Where copies are now; -1: nowhere.
    bool fresh = false;          // Copies are up to date.
  };
  struct Room {
    Tensor weights, gradients;  // [copies, elements]
    int layer = -1;
    int64_t freed = 0;          // Which of all releases was its last: rooms are taken in that order, as DenseStore's buffers.
  };

  ExpertStore(const std::vector<ParameterSpec>& parameters, const std::vector<Block>& blocks, Communicator& group,
              const Options& options)
      : parameters_(&parameters), blocks_(&blocks), group_(&group), options_(options) {}
  const Layer& at(int layer) const { return layers_[static_cast<size_t>(layer)]; }
  Layer& at(int layer) { return layers_[static_cast<size_t>(layer)]; }
  Stream& stream() { return options_.stream != nullptr ? *options_.stream : cpu_; }
  absl::Status Allocate();
  absl::Status AllocateRooms();
  int RoomCount() const;
  bool copies_have_gradients() const { return options_.training && !partials_.has_value(); }
  void Arrange(int layer);  // From placement_: local, copy, moves.
  bool Here(const Layer& layer, int expert) const;
  absl::Status Gather(int layer, absl::Span<const SparseMove> moves);
  int64_t MovedHere(const ExpertPlacement& placement) const;
  absl::StatusOr<int64_t> ReducePartials(int layer);
  void TakeRoom(int layer);
  int TakeSlot();

  const std::vector<ParameterSpec>* parameters_;
  const std::vector<Block>* blocks_;
  Communicator* group_;
  const Options options_;
  std::vector<ExpertPlacement> placement_;
  int64_t elements_ = 0;
  int slots_ = 0, copies_ = 0;
  std::vector<Layer> layers_;
  std::vector<int> free_slots_;  // Descending.
  Tensor weights_, gradients_, master_, exp_avg_, exp_avg_sq_;  // [slots, elements] of owned experts.
  std::optional<ExpertPartials> partials_;  // kPinned.
  std::unique_ptr<Stream> adding_;          // Of the thread that collects them.
  mutable Mutex mutex_;  // Who has which room.
  int64_t releases_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Room> rooms_;
  Stream cpu_;
};

}  // namespace shoal
