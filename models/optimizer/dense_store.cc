#include "models/optimizer/dense_store.h"

#include <algorithm>
#include <numeric>

#include "models/optimizer/block_buckets.h"
#include "parallel/placement/placement.h"
#include "runtime/device/device.h"
#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {

absl::StatusOr<Tensor> AllocateFor(Communicator& group, int64_t elements, DType dtype, Stream& stream) {
  if (group.size() > 1) return group.Allocate({elements}, dtype);
  const Tensor tensor = Empty({elements}, dtype, stream);
  SHOAL_RETURN_IF_ERROR(stream.status());
  return tensor;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DenseStore>> DenseStore::Create(const std::vector<ParameterSpec>& parameters,
                                                               const std::vector<Block>& blocks, int layers,
                                                               Communicator& group, const Options& options) {
  std::unique_ptr<DenseStore> store(new DenseStore(parameters, blocks, group, options));
  if (options.stream != nullptr && options.stream->device() != nullptr) {
    SHOAL_ASSIGN_OR_RETURN(store->reduce_stream_, options.stream->device()->NewStream());
  }
  int buckets = 0;
  for (const Block& block : blocks) {
    if (block.kind != BlockKind::kExpert) buckets = std::max(buckets, BucketOf(block, BucketIndex{layers}) + 1);
  }
  store->buckets_.resize(static_cast<size_t>(buckets));
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].kind != BlockKind::kExpert) store->AddBlock(static_cast<int>(i), BucketOf(blocks[i], BucketIndex{layers}));
  }
  for (int bucket = 0; bucket < buckets; ++bucket) {
    const BucketIndex index{layers, /*head=*/buckets > 2 + layers};
    store->at(bucket).of_layer = index.IsLayer(bucket);
    store->at(bucket).sharded = index.Shardable(bucket) && options.policy == DensePolicy::kSharded && group.size() > 1;
    SHOAL_RETURN_IF_ERROR(store->Allocate(&store->at(bucket)), "dense parameters");
  }
  SHOAL_RETURN_IF_ERROR(store->AllocateBuffers(/*of_layers=*/true, std::min(options.buffers, layers)), "buffers of dense layers");
  SHOAL_RETURN_IF_ERROR(store->AllocateBuffers(/*of_layers=*/false, 1), "buffer of embedding and head");
  return store;
}

void DenseStore::AddBlock(int index, int bucket) {
  const Block& block = (*blocks_)[static_cast<size_t>(index)];
  Bucket& to = at(bucket);
  for (const BlockPart& part : block.parts) {
    if (part.row_begin > 0) continue;
    places_[(*parameters_)[static_cast<size_t>(part.parameter)].name] = {bucket, to.elements + part.offset};
  }
  to.blocks.push_back(index);
  to.elements += block.elements;
}

absl::Status DenseStore::Allocate(Bucket* bucket) {
  const bool vectors = bucket == &buckets_.front();
  bucket->dtype = vectors ? DType::kF32 : options_.compute;
  bucket->decay = !vectors;
  std::vector<int64_t> sizes;
  for (int block : bucket->blocks) sizes.push_back((*blocks_)[static_cast<size_t>(block)].elements);
  const std::vector<int> owner = ContiguousPartition(sizes, group_->size());
  bucket->counts.assign(static_cast<size_t>(group_->size()), 0);
  for (size_t i = 0; i < sizes.size(); ++i) bucket->counts[static_cast<size_t>(owner[i])] += sizes[i];
  bucket->own_begin = std::accumulate(bucket->counts.begin(), bucket->counts.begin() + group_->index(), int64_t{0});
  bucket->own_count = bucket->counts[static_cast<size_t>(group_->index())];
  const int64_t own = bucket->own_count;
  if (bucket->sharded) {
    SHOAL_ASSIGN_OR_RETURN(bucket->own_weights, AllocateFor(*group_, own, bucket->dtype, stream()));
    if (options_.training) bucket->own_gradients = Zeros({own}, DType::kF32, stream());
  } else {
    SHOAL_ASSIGN_OR_RETURN(bucket->weights, AllocateFor(*group_, bucket->elements, bucket->dtype, stream()));
    bucket->own_weights = bucket->weights.Elements(bucket->own_begin, {own});
    if (options_.training) {
      SHOAL_ASSIGN_OR_RETURN(bucket->gradients, AllocateFor(*group_, bucket->elements, DType::kF32, stream()));
      bucket->own_gradients = bucket->gradients.Elements(bucket->own_begin, {own});
    }
  }
  bucket->master = bucket->dtype == DType::kF32 ? bucket->own_weights : Empty({own}, DType::kF32, stream());
  if (options_.training) {
    bucket->exp_avg = Zeros({own}, DType::kF32, stream());
    bucket->exp_avg_sq = Zeros({own}, DType::kF32, stream());
  }
  return absl::OkStatus();
}

absl::Status DenseStore::AllocateBuffers(bool of_layers, int count) {
  int64_t largest = 0;
  for (const Bucket& bucket : buckets_) {
    if (bucket.sharded && bucket.of_layer == of_layers) largest = std::max(largest, bucket.elements);
  }
  if (largest == 0) return absl::OkStatus();
  for (int i = 0; i < count; ++i) {
    SHOAL_ASSIGN_OR_RETURN(Tensor weights, AllocateFor(*group_, largest * SizeOf(options_.compute), DType::kU8, stream()));
    weight_buffers_.push_back({std::move(weights), Tensor(), of_layers});
    if (!options_.training) continue;
    SHOAL_ASSIGN_OR_RETURN(Tensor gradients, AllocateFor(*group_, largest, DType::kF32, stream()));
    gradient_buffers_.push_back({Tensor(), std::move(gradients), of_layers});
  }
  return absl::OkStatus();
}

const DenseStore::Place& DenseStore::Find(const std::string& name) const {
  const auto found = places_.find(name);
  SHOAL_CHECK(found != places_.end()) << "no dense parameter " << name;
  return found->second;
}

Tensor DenseStore::Weight(const std::string& name, Shape shape) const {
  const Place& place = Find(name);
  const Bucket& bucket = at(place.bucket);
  SHOAL_CHECK(!bucket.weights.empty()) << name << " is not gathered";
  return bucket.weights.Elements(place.offset, std::move(shape));
}

Tensor DenseStore::Gradient(const std::string& name, Shape shape) {
  const Place& place = Find(name);
  if (at(place.bucket).gradients.empty()) TakeGradients(place.bucket);
  return at(place.bucket).gradients.Elements(place.offset, std::move(shape));
}

kernels::Accumulate DenseStore::AccumulateOf(int bucket, int part) const {
  return part == 0 || at(bucket).sharded ? kernels::Accumulate::kOverwrite : kernels::Accumulate::kAdd;
}

void DenseStore::ZeroVectorGradients(Stream& stream) { FillWithZeros(buckets_.front().gradients, stream); }

// Not a kernel on the CPU: the team of threads is the compute lane's.
absl::Status DenseStore::AddReduced(const Tensor& from, const Tensor& to, int part) {
  if (reduce_stream_ == nullptr) {
    for (int64_t i = 0; i < from.elements(); ++i) {
      to.data<float>()[i] = part == 0 ? from.data<float>()[i] : to.data<float>()[i] + from.data<float>()[i];
    }
    return absl::OkStatus();
  }
  if (part == 0) {
    Copy(from, to, *reduce_stream_);
  } else {
    kernels::AddTo(from, to, *reduce_stream_);
  }
  return reduce_stream_->Wait();
}

DenseStore::Buffer& DenseStore::TakeOldest(std::vector<Buffer>* buffers, int bucket) {
  Buffer* oldest = nullptr;
  for (Buffer& buffer : *buffers) {
    if (buffer.bucket >= 0 || buffer.of_layers != at(bucket).of_layer) continue;
    if (oldest == nullptr || buffer.freed < oldest->freed) oldest = &buffer;
  }
  SHOAL_CHECK(oldest != nullptr) << "no buffer for bucket " << bucket;
  oldest->bucket = bucket;
  return *oldest;
}

void DenseStore::Free(std::vector<Buffer>* buffers, int bucket) {
  const MutexLock lock(&mutex_);
  for (Buffer& buffer : *buffers) {
    if (buffer.bucket != bucket) continue;
    buffer.bucket = -1;
    buffer.freed = ++releases_;
  }
}

Tensor DenseStore::TakeWeights(int bucket) {
  const MutexLock lock(&mutex_);
  return Tensor(TakeOldest(&weight_buffers_, bucket).weights.raw(), {at(bucket).elements}, at(bucket).dtype);
}

void DenseStore::TakeGradients(int bucket) {
  const MutexLock lock(&mutex_);
  at(bucket).gradients = TakeOldest(&gradient_buffers_, bucket).gradients.Elements(0, {at(bucket).elements});
}

absl::Status DenseStore::Gather(int index) {
  Bucket& bucket = at(index);
  if (group_->size() == 1 || (!bucket.sharded && bucket.fresh)) return absl::OkStatus();
  const Tensor whole = bucket.sharded ? TakeWeights(index) : bucket.weights;
  SHOAL_RETURN_IF_ERROR(group_->AllGather(bucket.own_weights, bucket.counts, whole, {.label = "weights"}).Await(),
                        "gathering weights");
  bucket.weights = whole;
  bucket.fresh = true;
  return absl::OkStatus();
}

void DenseStore::Release(int index) {
  Bucket& bucket = at(index);
  if (!bucket.sharded) return;
  bucket.weights = Tensor();
  Free(&weight_buffers_, index);
}

absl::Status DenseStore::Reduce(int index, int64_t begin, int64_t count, int part) {
  Bucket& bucket = at(index);
  if (group_->size() == 1) return absl::OkStatus();
  std::vector<int64_t> counts;
  Range own;  // Of the range; its begin counts from the bucket's.
  int64_t offset = 0;
  for (size_t rank = 0; rank < bucket.counts.size(); ++rank) {
    const int64_t from = std::max(begin, offset), to = std::min(begin + count, offset + bucket.counts[rank]);
    counts.push_back(std::max<int64_t>(0, to - from));
    if (static_cast<int>(rank) == group_->index()) own = {counts.back() > 0 ? from : begin, counts.back()};
    offset += bucket.counts[rank];
  }
  const Tensor out = bucket.gradients.Elements(own.begin, {own.count});
  const Order order = options_.numerics == Numerics::kPinned ? Order::kFixed : Order::kFast;
  SHOAL_RETURN_IF_ERROR(group_->ReduceScatter(bucket.gradients.Elements(begin, {count}), counts, out, ReduceOp::kSum,
                                              {.label = "gradients", .order = order}).Await(),
                        "reducing gradients");
  if (!bucket.sharded) return absl::OkStatus();
  if (own.count > 0) {
    SHOAL_RETURN_IF_ERROR(AddReduced(out, bucket.own_gradients.Elements(own.begin - bucket.own_begin, {own.count}), part));
  }
  bucket.reduced += count;
  if (bucket.reduced < bucket.elements) return absl::OkStatus();
  bucket.reduced = 0;
  bucket.gradients = Tensor();
  Free(&gradient_buffers_, index);
  return absl::OkStatus();
}

int64_t DenseStore::Update(int index, kernels::AdamWStep step, const Tensor& numbers, Stream& stream) {
  Bucket& bucket = at(index);
  bucket.fresh = false;
  if (bucket.own_count == 0) return 0;
  if (!bucket.decay) step.weight_decay = 0;
  kernels::AdamW(step, numbers, bucket.own_gradients, bucket.master, bucket.exp_avg, bucket.exp_avg_sq,
                 bucket.dtype == DType::kF32 ? Tensor() : bucket.own_weights, stream);
  return bucket.own_count;
}

void DenseStore::Refresh(Stream& stream) {
  for (Bucket& bucket : buckets_) {
    bucket.fresh = false;
    if (bucket.dtype != DType::kF32 && bucket.own_count > 0) kernels::Convert(bucket.master, bucket.own_weights, stream);
  }
}

void DenseStore::SumSquares(const Tensor& sums, Stream& stream) const {
  for (const Bucket& bucket : buckets_) {
    int64_t offset = 0;
    for (int block : bucket.blocks) {
      const int64_t count = (*blocks_)[static_cast<size_t>(block)].elements, begin = offset - bucket.own_begin;
      offset += count;
      if (begin < 0 || begin + count > bucket.own_count) continue;
      kernels::SumOfSquares(bucket.own_gradients.Elements(begin, {count}), sums.Elements(block, {1}), stream);
    }
  }
}

int64_t DenseStore::owned_elements() const {
  int64_t elements = 0;
  for (const Bucket& bucket : buckets_) elements += bucket.own_count;
  return elements;
}

void DenseStore::AppendOwned(std::vector<OwnedPart>* owned) const {
  for (const Bucket& bucket : buckets_) {
    int64_t offset = 0;
    const size_t first = owned->size();
    for (int index : bucket.blocks) {
      const Block& block = (*blocks_)[static_cast<size_t>(index)];
      const int64_t begin = offset - bucket.own_begin;
      offset += block.elements;
      if (begin < 0 || begin + block.elements > bucket.own_count) continue;
      for (const BlockPart& part : block.parts) {
        const ParameterSpec& spec = (*parameters_)[static_cast<size_t>(part.parameter)];
        Shape shape = spec.shape;
        shape[0] = part.rows;
        int64_t at_element = begin + part.offset;
        OwnedPart piece{spec.name, spec.shape, part.row_begin, part.parameter, {}, {}, {}, {}};
        if (owned->size() > first && owned->back().parameter == part.parameter) {  // The rows before these.
          shape[0] += owned->back().master.dim(0);
          piece.row_begin = owned->back().row_begin;
          at_element -= owned->back().master.elements();
          owned->pop_back();
        }
        const auto view = [&](const Tensor& flat) { return flat.empty() ? Tensor() : flat.Elements(at_element, shape); };
        piece.master = view(bucket.master);
        piece.gradient = view(bucket.own_gradients);
        piece.exp_avg = view(bucket.exp_avg);
        piece.exp_avg_sq = view(bucket.exp_avg_sq);
        owned->push_back(std::move(piece));
      }
    }
  }
}

DenseStore::Memory DenseStore::memory() const {
  Memory memory;
  for (const Bucket& bucket : buckets_) {
    const bool narrow = bucket.dtype != DType::kF32;
    memory.weights_bytes += bucket.sharded ? bucket.own_weights.bytes() : bucket.weights.bytes();
    memory.gradients_bytes += bucket.sharded ? bucket.own_gradients.bytes() : bucket.gradients.bytes();
    memory.state_bytes += bucket.exp_avg.bytes() + bucket.exp_avg_sq.bytes() + (narrow ? bucket.master.bytes() : 0);
  }
  for (const Buffer& buffer : weight_buffers_) memory.weights_bytes += buffer.weights.bytes();
  for (const Buffer& buffer : gradient_buffers_) memory.gradients_bytes += buffer.gradients.bytes();
  return memory;
}

}  // namespace shoal
