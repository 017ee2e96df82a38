#include "models/optimizer/expert_store.h"

#include <algorithm>

#include "runtime/device/device.h"
#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {

absl::StatusOr<Tensor> AllocateFor(Communicator& group, Shape shape, DType dtype, Stream& stream) {
  if (group.size() > 1) return group.Allocate(std::move(shape), dtype);
  const Tensor tensor = Empty(std::move(shape), dtype, stream);
  SHOAL_RETURN_IF_ERROR(stream.status());
  return tensor;
}

Tensor Row(const Tensor& rows, int row) { return rows.Elements(row * rows.dim(1), {rows.dim(1)}); }

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertStore>> ExpertStore::Create(const std::vector<ParameterSpec>& parameters,
                                                                 const std::vector<Block>& blocks,
                                                                 std::vector<ExpertPlacement> placement,
                                                                 Communicator& group, const Options& options) {
  std::unique_ptr<ExpertStore> store(new ExpertStore(parameters, blocks, group, options));
  store->placement_ = std::move(placement);
  store->layers_.resize(store->placement_.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].kind != BlockKind::kExpert) continue;
    store->elements_ = blocks[i].elements;
    store->at(blocks[i].layer).blocks.push_back(static_cast<int>(i));
  }
  if (options.numerics == Numerics::kPinned) {
    store->partials_.emplace(group, store->elements_, static_cast<int>(store->layers_.size()));
    Device* const device = store->stream().device();
    store->adding_ = std::make_unique<Stream>();
    if (device != nullptr) {
      SHOAL_ASSIGN_OR_RETURN(store->adding_, device->NewStream());
    }
  }
  SHOAL_RETURN_IF_ERROR(store->Allocate(), "experts");
  return store;
}

absl::Status ExpertStore::Allocate() {
  int owned = 0, total = 0, room = 0;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    SHOAL_CHECK_EQ(placement_[layer].size(), layers_[layer].blocks.size());
    int copies = 0;
    for (const ExpertCopies& expert : placement_[layer]) {
      const bool mine = expert.owner == group_->index();
      owned += mine ? 1 : 0;
      copies += !mine && expert.On(group_->index()) ? 1 : 0;
    }
    total += static_cast<int>(placement_[layer].size());
    room = std::max(room, copies);
  }
  slots_ = std::max(owned, (total + group_->size() - 1) / group_->size());
  copies_ = options_.copies < 0 ? room : options_.copies;
  const DType compute = options_.compute;
  SHOAL_ASSIGN_OR_RETURN(weights_, AllocateFor(*group_, {slots_, elements_}, compute, stream()));
  master_ = compute == DType::kF32 ? weights_ : Empty({slots_, elements_}, DType::kF32, stream());
  if (options_.training) {
    SHOAL_ASSIGN_OR_RETURN(gradients_, AllocateFor(*group_, {slots_, elements_}, DType::kF32, stream()));
    exp_avg_ = Zeros({slots_, elements_}, DType::kF32, stream());
    exp_avg_sq_ = Zeros({slots_, elements_}, DType::kF32, stream());
  }
  for (int slot = slots_; slot-- > 0;) free_slots_.push_back(slot);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    layers_[layer].slot.assign(placement_[layer].size(), -1);
    for (size_t e = 0; e < placement_[layer].size(); ++e) {
      if (placement_[layer][e].owner == group_->index()) layers_[layer].slot[e] = TakeSlot();
    }
    Arrange(static_cast<int>(layer));
  }
  return AllocateRooms();
}

int ExpertStore::RoomCount() const {
  const int moe_layers =
      static_cast<int>(std::count_if(layers_.begin(), layers_.end(), [](const Layer& layer) { return !layer.blocks.empty(); }));
  return options_.policy == ExpertPolicy::kKeep ? moe_layers : std::min(options_.prefetch + 1, moe_layers);
}

absl::Status ExpertStore::AllocateRooms() {
  if (copies_ == 0) return absl::OkStatus();
  for (int i = 0; i < RoomCount(); ++i) {
    Room room;
    SHOAL_ASSIGN_OR_RETURN(room.weights, AllocateFor(*group_, {copies_, elements_}, options_.compute, stream()));
    if (copies_have_gradients()) {
      SHOAL_ASSIGN_OR_RETURN(room.gradients, AllocateFor(*group_, {copies_, elements_}, DType::kF32, stream()));
    }
    rooms_.push_back(std::move(room));
  }
  return absl::OkStatus();
}

int64_t ExpertStore::copy_bytes() const {
  return RoomCount() * elements_ * (SizeOf(options_.compute) + (copies_have_gradients() ? SizeOf(DType::kF32) : 0));
}

absl::Status ExpertStore::MakeRoom(int copies) {
  if (copies <= copies_) return absl::OkStatus();
  copies_ = copies;
  rooms_.clear();
  for (Layer& layer : layers_) {
    layer.room = -1;
    layer.fresh = false;
  }
  return AllocateRooms();
}

int ExpertStore::TakeSlot() {
  SHOAL_CHECK(!free_slots_.empty()) << "more experts owned than there is room for";
  const int slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

void ExpertStore::Arrange(int index) {
  Layer& layer = at(index);
  const ExpertPlacement& placement = placement_[static_cast<size_t>(index)];
  const int self = group_->index();
  layer.local = LocalExperts(placement, self);
  layer.moves.clear();
  layer.copy.assign(placement.size(), -1);
  layer.fresh = false;
  int copies = 0;
  for (size_t e = 0; e < placement.size(); ++e) {
    const int expert = static_cast<int>(e);
    if (placement[e].holders.empty()) continue;
    layer.moves.push_back({expert, placement[e].owner, placement[e].holders});
    if (placement[e].owner != self && placement[e].On(self)) layer.copy[e] = copies++;
  }
  layer.moved = MovedHere(placement);
  SHOAL_CHECK_LE(copies, copies_) << "no room for the copies of layer " << index;
}

int64_t ExpertStore::MovedHere(const ExpertPlacement& placement) const {
  const Topology one_host = Topology::OneHost(group_->size());
  const Topology& topology = options_.topology.ranks() > 0 ? options_.topology : one_host;
  return MovedExperts(placement, topology)[static_cast<size_t>(group_->index())];
}

bool ExpertStore::Here(const Layer& layer, int expert) const {
  return layer.slot[static_cast<size_t>(expert)] >= 0 || layer.copy[static_cast<size_t>(expert)] >= 0;
}

void ExpertStore::SetHolders(std::vector<ExpertPlacement> placement) {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    if (placement[layer] == placement_[layer]) continue;
    for (size_t e = 0; e < placement[layer].size(); ++e) SHOAL_CHECK_EQ(placement[layer][e].owner, placement_[layer][e].owner);
    placement_[layer] = std::move(placement[layer]);
    Arrange(static_cast<int>(layer));
  }
}

void ExpertStore::AddHolders(int index, ExpertPlacement placement) {
  ExpertPlacement& now = placement_[static_cast<size_t>(index)];
  SHOAL_CHECK_EQ(placement.size(), now.size());
  for (size_t e = 0; e < now.size(); ++e) {
    SHOAL_CHECK_EQ(placement[e].owner, now[e].owner);
    SHOAL_CHECK(std::includes(placement[e].holders.begin(), placement[e].holders.end(), now[e].holders.begin(),
                              now[e].holders.end()))
        << "expert " << e << " of layer " << index << " would lose a holder";
  }
  now = std::move(placement);
}

absl::StatusOr<int64_t> ExpertStore::MaterialiseAdded(int index) {
  Layer& layer = at(index);
  const ExpertPlacement& placement = placement_[static_cast<size_t>(index)];
  std::vector<const SparseMove*> before(placement.size(), nullptr);
  for (const SparseMove& move : layer.moves) before[static_cast<size_t>(move.chunk)] = &move;
  ExpertPlacement added = OwnersOnly(OwnersOf({placement}).front());
  std::vector<SparseMove> moves, all;
  for (size_t e = 0; e < placement.size(); ++e) {
    if (placement[e].holders.empty()) continue;
    all.push_back({static_cast<int>(e), placement[e].owner, placement[e].holders});
    if (before[e] == nullptr) {
      added[e].holders = placement[e].holders;
    } else {
      std::set_difference(placement[e].holders.begin(), placement[e].holders.end(), before[e]->holders.begin(),
                          before[e]->holders.end(), std::back_inserter(added[e].holders));
    }
    if (!added[e].holders.empty()) moves.push_back({static_cast<int>(e), placement[e].owner, added[e].holders});
  }
  if (moves.empty()) return 0;
  // Copies that are here stay where they are.
  const int self = group_->index();
  int copies = static_cast<int>(std::count_if(layer.copy.begin(), layer.copy.end(), [](int copy) { return copy >= 0; }));
  for (size_t e = 0; e < placement.size(); ++e) {
    if (self != added[e].owner && added[e].On(self)) layer.copy[e] = copies++;
  }
  SHOAL_CHECK_LE(copies, copies_) << "no room for the added copies of layer " << index;
  layer.moves = std::move(all);
  layer.moved = MovedHere(placement);
  layer.local = LocalExperts(placement, self);
  SHOAL_RETURN_IF_ERROR(Gather(index, moves), "gathering added copies of experts");
  return MovedHere(added) * elements_ * SizeOf(options_.compute);
}

absl::Status ExpertStore::SetOwners(const OwnerMap& owners) {
  struct Moved {
    size_t layer, expert;
    Tensor master, exp_avg, exp_avg_sq;  // Of what arrives here.
  };
  const int self = group_->index();
  std::vector<SparseMove> moves;
  std::vector<Moved> moved;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    for (size_t e = 0; e < placement_[layer].size(); ++e) {
      const int from = placement_[layer][e].owner, to = owners[layer][e];
      if (from == to) continue;
      moves.push_back({static_cast<int>(moved.size()), from, {to}});
      moved.push_back({layer, e, {}, {}, {}});
    }
  }
  for (auto part : {std::make_pair(&master_, &Moved::master), std::make_pair(&exp_avg_, &Moved::exp_avg),
                    std::make_pair(&exp_avg_sq_, &Moved::exp_avg_sq)}) {
    if (part.first->empty()) continue;
    std::vector<Tensor> chunks(moved.size());
    for (size_t i = 0; i < moved.size(); ++i) {
      if (moves[i].owner == self) chunks[i] = Row(*part.first, layers_[moved[i].layer].slot[moved[i].expert]);
      if (moves[i].holders[0] == self) chunks[i] = moved[i].*part.second = Empty({elements_}, DType::kF32, stream());
    }
    SHOAL_RETURN_IF_ERROR(group_->SparseAllGather(chunks, moves, {.label = "expert owners"}).Await(), "moving experts");
  }
  for (size_t i = 0; i < moved.size(); ++i) {
    if (moves[i].owner != self) continue;
    int& slot = layers_[moved[i].layer].slot[moved[i].expert];
    free_slots_.push_back(slot);
    slot = -1;
  }
  std::sort(free_slots_.rbegin(), free_slots_.rend());
  for (size_t i = 0; i < moved.size(); ++i) {
    ExpertPlacement& placement = placement_[moved[i].layer];
    placement[moved[i].expert].owner = moves[i].holders[0];
    for (ExpertCopies& expert : placement) expert.holders.clear();
    if (moves[i].holders[0] != self) continue;
    const int slot = layers_[moved[i].layer].slot[moved[i].expert] = TakeSlot();
    kernels::Convert(moved[i].master, Row(master_, slot), stream());
    if (options_.compute != DType::kF32) kernels::Convert(moved[i].master, Row(weights_, slot), stream());
    if (!options_.training) continue;
    kernels::Convert(moved[i].exp_avg, Row(exp_avg_, slot), stream());
    kernels::Convert(moved[i].exp_avg_sq, Row(exp_avg_sq_, slot), stream());
  }
  for (size_t i = 0; i < moved.size(); ++i) {
    if (i == 0 || moved[i].layer != moved[i - 1].layer) Arrange(static_cast<int>(moved[i].layer));
  }
  return stream().Wait();
}

Tensor ExpertStore::Weights(int index, int expert) const {
  const Layer& layer = at(index);
  const size_t e = static_cast<size_t>(expert);
  if (layer.slot[e] >= 0) return Row(weights_, layer.slot[e]);
  SHOAL_CHECK(layer.copy[e] >= 0 && layer.room >= 0) << "expert " << expert << " of layer " << index << " is not here";
  return Row(rooms_[static_cast<size_t>(layer.room)].weights, layer.copy[e]);
}

Tensor ExpertStore::Gradients(int index, int expert) const {
  const Layer& layer = at(index);
  const size_t e = static_cast<size_t>(expert);
  if (layer.slot[e] >= 0) return Row(gradients_, layer.slot[e]);
  SHOAL_CHECK(layer.copy[e] >= 0 && layer.room >= 0) << "expert " << expert << " of layer " << index << " is not here";
  return Row(rooms_[static_cast<size_t>(layer.room)].gradients, layer.copy[e]);
}

void ExpertStore::TakeRoom(int index) {
  const MutexLock lock(&mutex_);
  int oldest = -1;
  for (size_t i = 0; i < rooms_.size(); ++i) {
    if (rooms_[i].layer < 0 && (oldest < 0 || rooms_[i].freed < rooms_[static_cast<size_t>(oldest)].freed)) oldest = static_cast<int>(i);
  }
  SHOAL_CHECK_GE(oldest, 0) << "no room for the copies of layer " << index;
  rooms_[static_cast<size_t>(oldest)].layer = index;
  at(index).room = oldest;
}

absl::StatusOr<int64_t> ExpertStore::Materialise(int index) {
  Layer& layer = at(index);
  if (layer.room < 0 && copies_ > 0) TakeRoom(index);
  if (layer.moves.empty() || layer.fresh) return 0;
  SHOAL_RETURN_IF_ERROR(Gather(index, layer.moves), "gathering experts");
  layer.fresh = true;
  return layer.moved * elements_ * SizeOf(options_.compute);
}

absl::Status ExpertStore::Gather(int index, absl::Span<const SparseMove> moves) {
  std::vector<Tensor> chunks(at(index).copy.size());
  for (const SparseMove& move : moves) {
    if (Here(at(index), move.chunk)) chunks[static_cast<size_t>(move.chunk)] = Weights(index, move.chunk);
  }
  return group_->SparseAllGather(chunks, moves, {.label = "expert weights"}).Await();
}

void ExpertStore::Release(int index) {
  if (options_.policy == ExpertPolicy::kKeep || at(index).room < 0) return;
  const MutexLock lock(&mutex_);
  Room& room = rooms_[static_cast<size_t>(at(index).room)];
  room.layer = -1;
  room.freed = ++releases_;
  at(index).room = -1;
  at(index).fresh = false;
}

kernels::Accumulate ExpertStore::BeginGradients(int index, int part, Stream& stream) {
  if (part == 0) return kernels::Accumulate::kOverwrite;
  if (options_.policy == ExpertPolicy::kRematerialise) {  // Copies gave theirs away; owners keep the sum.
    for (int expert : Local(index)) {
      if (at(index).slot[static_cast<size_t>(expert)] >= 0) continue;
      FillWithZeros(Gradients(index, expert), stream);
    }
  }
  return kernels::Accumulate::kAdd;
}

void ExpertStore::BeginPartials(int index, int part, absl::Span<const std::vector<DispatchShare>> shares, Stream& stream) {
  for (int expert : Local(index)) {
    if (part > 0 || at(index).slot[static_cast<size_t>(expert)] < 0) continue;
    FillWithZeros(Gradients(index, expert), stream);
  }
  partials_->Begin(index, placement_[static_cast<size_t>(index)], shares);
}

void ExpertStore::AddPartial(int index, int expert, int source, Tensor partial, Stream& stream) {
  if (placement_[static_cast<size_t>(index)][static_cast<size_t>(expert)].holders.empty()) {
    kernels::AddTo(partial, Gradients(index, expert), stream);
  } else {
    partials_->Keep(index, expert, source, std::move(partial));
  }
}

absl::StatusOr<int64_t> ExpertStore::ReducePartials(int index) {
  std::vector<Tensor> added;  // Until it is done.
  const auto add = [&](int expert, const Tensor& partial) {
    kernels::AddTo(partial, Gradients(index, expert), *adding_);
    added.push_back(partial);
  };
  SHOAL_ASSIGN_OR_RETURN(const int64_t bytes, partials_->Collect(index, *adding_, add), "reducing gradients of experts");
  if (!added.empty()) SHOAL_RETURN_IF_ERROR(adding_->Wait(), "reducing gradients of experts");
  Release(index);
  return bytes;
}

absl::StatusOr<int64_t> ExpertStore::ReduceGradients(int index) {
  if (partials_.has_value()) return ReducePartials(index);
  Layer& layer = at(index);
  if (!layer.moves.empty()) {
    std::vector<Tensor> chunks(layer.copy.size());
    for (const SparseMove& move : layer.moves) {
      if (Here(layer, move.chunk)) chunks[static_cast<size_t>(move.chunk)] = Gradients(index, move.chunk);
    }
    SHOAL_RETURN_IF_ERROR(
        group_->SparseReduceScatter(chunks, layer.moves, ReduceOp::kSum, {.label = "expert gradients"}).Await(),
        "reducing gradients of experts");
  }
  Release(index);
  return layer.moved * elements_ * SizeOf(DType::kF32);
}

int64_t ExpertStore::Update(int index, const kernels::AdamWStep& step, const Tensor& numbers, Stream& stream) {
  int64_t elements = 0;
  at(index).fresh = false;
  for (int slot : at(index).slot) {
    if (slot < 0) continue;
    kernels::AdamW(step, numbers, Row(gradients_, slot), Row(master_, slot), Row(exp_avg_, slot), Row(exp_avg_sq_, slot),
                   options_.compute == DType::kF32 ? Tensor() : Row(weights_, slot), stream);
    elements += elements_;
  }
  return elements;
}

void ExpertStore::Refresh(Stream& stream) {
  if (options_.compute != DType::kF32 && !master_.empty()) kernels::Convert(master_, weights_, stream);
  for (Layer& layer : layers_) layer.fresh = false;
}

void ExpertStore::SumSquares(const Tensor& sums, Stream& stream) const {
  for (const Layer& layer : layers_) {
    for (size_t e = 0; e < layer.slot.size(); ++e) {
      if (layer.slot[e] < 0) continue;
      kernels::SumOfSquares(Row(gradients_, layer.slot[e]), sums.Elements(layer.blocks[e], {1}), stream);
    }
  }
}

void ExpertStore::AppendOwned(std::vector<OwnedPart>* owned) const {
  for (const Layer& layer : layers_) {
    for (size_t e = 0; e < layer.slot.size(); ++e) {
      if (layer.slot[e] < 0) continue;
      for (const BlockPart& part : (*blocks_)[static_cast<size_t>(layer.blocks[e])].parts) {
        const ParameterSpec& spec = (*parameters_)[static_cast<size_t>(part.parameter)];
        const auto view = [&](const Tensor& rows) {
          return rows.empty() ? Tensor() : Row(rows, layer.slot[e]).Elements(part.offset, spec.shape);
        };
        owned->push_back({spec.name, spec.shape, 0, part.parameter, view(master_), view(gradients_), view(exp_avg_),
                          view(exp_avg_sq_)});
      }
    }
  }
}

ExpertStore::Memory ExpertStore::memory() const {
  Memory memory{weights_.bytes(), gradients_.bytes(), exp_avg_.bytes() + exp_avg_sq_.bytes()};
  if (options_.compute != DType::kF32) memory.state_bytes += master_.bytes();
  for (const Room& room : rooms_) {
    memory.weights_bytes += room.weights.bytes();
    memory.gradients_bytes += room.gradients.bytes();
  }
  return memory;
}

}  // namespace shoal
