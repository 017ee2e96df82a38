#include "models/optimizer/parameter_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {

constexpr uint64_t kInitialWeights = 1;  // The op number of initial weights in random keys.

absl::StatusOr<Tensor> AllocateFor(Communicator& group, int64_t elements, DType dtype) {
  if (group.size() == 1) return Empty({elements}, dtype);
  return group.Allocate({elements}, dtype);
}

}  // namespace

ParameterStore::ParameterStore(std::vector<ParameterSpec> parameters, const Options& options)
    : parameters_(std::move(parameters)), blocks_(MakeBlocks(parameters_)), options_(options) {}

absl::StatusOr<std::unique_ptr<ParameterStore>> ParameterStore::Create(std::vector<ParameterSpec> parameters,
                                                                       const Placement& placement,
                                                                       Communicator& world, Communicator& replicas,
                                                                       const Options& options) {
  std::unique_ptr<ParameterStore> store(new ParameterStore(std::move(parameters), options));
  store->world_ = &world;
  const Rank rank{world.index()};
  SHOAL_RETURN_IF_ERROR(store->AddFlat(BlockKind::kVectors, placement, rank, world), "norm vectors");
  SHOAL_RETURN_IF_ERROR(store->AddFlat(BlockKind::kDense, placement, rank, world), "dense parameters");
  SHOAL_RETURN_IF_ERROR(store->AddFlat(BlockKind::kExpert, placement, rank, replicas), "experts");
  return store;
}

absl::Status ParameterStore::AddFlat(BlockKind kind, const Placement& placement, Rank rank, Communicator& group) {
  Flat flat;
  flat.group = &group;
  flat.counts.assign(static_cast<size_t>(group.size()), 0);
  const std::vector<int> members =
      kind == BlockKind::kExpert ? placement.ReplicaGroup(rank) : std::vector<int>();
  int64_t elements = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const int block = static_cast<int>(i);
    if (blocks_[i].kind != kind || !placement.Materialised(block, rank)) continue;
    const int owner = Index(placement.OwnerFor(block, rank));
    const size_t owner_index =
        members.empty() ? static_cast<size_t>(owner)
                        : static_cast<size_t>(std::find(members.begin(), members.end(), owner) - members.begin());
    for (const BlockPart& part : blocks_[i].parts) {
      if (part.row_begin > 0) continue;
      places_[parameters_[static_cast<size_t>(part.parameter)].name] = {static_cast<int>(flats_.size()),
                                                                       elements + part.offset};
    }
    flat.blocks.push_back(block);
    flat.counts[owner_index] += blocks_[i].elements;
    elements += blocks_[i].elements;
  }
  flat.owned_begin = std::accumulate(flat.counts.begin(), flat.counts.begin() + group.index(), int64_t{0});
  const int64_t owned = flat.counts[static_cast<size_t>(group.index())];
  const DType dtype = kind == BlockKind::kVectors ? DType::kF32 : options_.compute;
  SHOAL_ASSIGN_OR_RETURN(flat.weights, AllocateFor(group, elements, dtype));
  if (options_.training) {
    SHOAL_ASSIGN_OR_RETURN(flat.gradients, AllocateFor(group, elements, DType::kF32));
    flat.exp_avg = Zeros({owned}, DType::kF32);
    flat.exp_avg_sq = Zeros({owned}, DType::kF32);
  }
  flat.master = dtype == DType::kF32 ? flat.weights.Elements(flat.owned_begin, {owned}) : Empty({owned}, DType::kF32);
  int64_t offset = 0;
  for (int block : flat.blocks) {
    AddOwnedParts(flat, blocks_[static_cast<size_t>(block)], offset);
    offset += blocks_[static_cast<size_t>(block)].elements;
  }
  flats_.push_back(std::move(flat));
  return absl::OkStatus();
}

void ParameterStore::AddOwnedParts(const Flat& flat, const Block& block, int64_t block_offset) {
  const int64_t begin = block_offset - flat.owned_begin;
  if (begin < 0 || begin + block.elements > flat.master.elements()) return;
  for (const BlockPart& part : block.parts) {
    const ParameterSpec& spec = parameters_[static_cast<size_t>(part.parameter)];
    Shape shape = spec.shape;
    shape[0] = part.rows;
    const auto view = [&](const Tensor& flat_state) {
      return flat_state.empty() ? Tensor() : flat_state.Elements(begin + part.offset, shape);
    };
    owned_.push_back({spec.name, spec.shape, part.row_begin, part.parameter, view(flat.master), view(flat.exp_avg),
                      view(flat.exp_avg_sq)});
  }
}

const ParameterStore::Place& ParameterStore::Find(const std::string& name) const {
  const auto found = places_.find(name);
  SHOAL_CHECK(found != places_.end()) << "no parameter " << name << " on this rank";
  return found->second;
}

Tensor ParameterStore::Weight(const std::string& name, Shape shape) const {
  const Place& place = Find(name);
  return flats_[static_cast<size_t>(place.flat)].weights.Elements(place.offset, std::move(shape));
}

Tensor ParameterStore::Gradient(const std::string& name, Shape shape) const {
  const Place& place = Find(name);
  return flats_[static_cast<size_t>(place.flat)].gradients.Elements(place.offset, std::move(shape));
}

void ParameterStore::InitializeOwned(uint64_t seed, double stddev, Stream& stream) {
  for (const OwnedPart& part : owned_) {
    if (part.full_shape.size() == 1) {
      std::fill(part.master.span<float>().begin(), part.master.span<float>().end(), 1.0f);
    } else {
      const kernels::RandomKey key{seed, kernels::MakeStream(0, 0, static_cast<uint64_t>(part.parameter), kInitialWeights)};
      const int64_t row = ElementCount(part.full_shape) / part.full_shape[0];
      kernels::FillNormal(key, static_cast<uint64_t>(part.row_begin * row), 0.0, stddev, part.master, stream);
    }
    if (!part.exp_avg.empty()) std::memset(part.exp_avg.raw(), 0, static_cast<size_t>(part.exp_avg.bytes()));
    if (!part.exp_avg_sq.empty()) std::memset(part.exp_avg_sq.raw(), 0, static_cast<size_t>(part.exp_avg_sq.bytes()));
  }
}

void ParameterStore::ZeroVectorGradients() {
  const Tensor& gradients = flats_.front().gradients;
  std::memset(gradients.raw(), 0, static_cast<size_t>(gradients.bytes()));
}

absl::Status ParameterStore::ReduceGradients() {
  std::vector<Work> works;
  for (const Flat& flat : flats_) {
    if (flat.group->size() == 1) continue;
    const Tensor own = flat.gradients.Elements(flat.owned_begin, {flat.counts[static_cast<size_t>(flat.group->index())]});
    works.push_back(flat.group->ReduceScatter(flat.gradients, flat.counts, own, ReduceOp::kSum, {.label = "gradients"}));
  }
  for (const Work& work : works) SHOAL_RETURN_IF_ERROR(work.Await(), "reducing gradients");
  return absl::OkStatus();
}

absl::StatusOr<double> ParameterStore::GradientNorm(Stream& stream) {
  // A sum per block, added in the order of blocks: it does not depend on who owns what.
  const Tensor sums = Zeros({static_cast<int64_t>(blocks_.size())}, DType::kF64);
  for (const Flat& flat : flats_) {
    const int64_t owned_end = flat.owned_begin + flat.counts[static_cast<size_t>(flat.group->index())];
    int64_t offset = 0;
    for (int block : flat.blocks) {
      const int64_t elements = blocks_[static_cast<size_t>(block)].elements;
      if (offset >= flat.owned_begin && offset + elements <= owned_end) {
        sums.data<double>()[block] = kernels::SumOfSquares(flat.gradients.Elements(offset, {elements}), stream);
      }
      offset += elements;
    }
  }
  if (world_->size() > 1) {
    SHOAL_RETURN_IF_ERROR(world_->AllReduce(sums, sums, ReduceOp::kSum, {.label = "gradient norm"}).Await(), "gradient norm");
  }
  double total = 0;
  for (double sum : sums.span<double>()) total += sum;
  return std::sqrt(total);
}

absl::Status ParameterStore::Update(kernels::AdamWStep step, Stream& stream) {
  const double decay = step.weight_decay;
  for (const Flat& flat : flats_) {
    const int64_t owned = flat.master.elements();
    if (owned == 0) continue;
    step.weight_decay = blocks_[static_cast<size_t>(flat.blocks.front())].kind == BlockKind::kVectors ? 0 : decay;
    const Tensor copy = flat.weights.dtype() == DType::kF32 ? Tensor() : flat.weights.Elements(flat.owned_begin, {owned});
    kernels::AdamW(step, flat.gradients.Elements(flat.owned_begin, {owned}), flat.master, flat.exp_avg, flat.exp_avg_sq,
                   copy, stream);
  }
  std::vector<Work> works;
  for (const Flat& flat : flats_) {
    if (flat.group->size() == 1) continue;
    const Tensor own = flat.weights.Elements(flat.owned_begin, {flat.master.elements()});
    works.push_back(flat.group->AllGather(own, flat.counts, flat.weights, {.label = "weights"}));
  }
  for (const Work& work : works) SHOAL_RETURN_IF_ERROR(work.Await(), "gathering weights");
  return stream.status();
}

absl::Status ParameterStore::GatherWeights(Stream& stream) {
  for (const Flat& flat : flats_) {
    const Tensor own = flat.weights.Elements(flat.owned_begin, {flat.master.elements()});
    if (flat.weights.dtype() != DType::kF32 && !flat.master.empty()) kernels::Convert(flat.master, own, stream);
    if (flat.group->size() == 1) continue;
    SHOAL_RETURN_IF_ERROR(flat.group->AllGather(own, flat.counts, flat.weights, {.label = "weights"}).Await(),
                          "gathering weights");
  }
  return stream.status();
}

ParameterStore::Memory ParameterStore::memory() const {
  Memory memory;
  for (const Flat& flat : flats_) {
    memory.weights_bytes += flat.weights.bytes();
    memory.gradients_bytes += flat.gradients.bytes();
    memory.state_bytes += flat.exp_avg.bytes() + flat.exp_avg_sq.bytes();
    if (flat.weights.dtype() != DType::kF32) memory.state_bytes += flat.master.bytes();
  }
  return memory;
}

}  // namespace shoal
