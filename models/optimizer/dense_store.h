// Everything but the experts: norm vectors, embedding, the dense matrices of each layer, head. Each of these is a bucket (BucketIndex
// of parallel/schedule/step_graph.h): a flat buffer of blocks in which every rank owns consecutive blocks of nearly equal size,
// so that gathers and reductions of a bucket load all links alike. Replicated (ZeRO stage 1) or sharded (stage 3): then weights exist
// only between Gather and Release, gradients from the first that is written to the last Reduce, in a few buffers that layers take in
// turn, and one more for embedding and head. BucketIndex::Shardable says which buckets that are.
//
// Calls marked "collective" block, are made by all ranks in the same order and fail with the communicator's ABORTED. One thread may
// make collective calls while another computes with other buckets.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "collectives/communicator.h"
#include "models/blocks.h"
#include "models/optimizer/owned_part.h"
#include "parallel/schedule/step_graph.h"
#include "runtime/base/mutex.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/optimizer.h"

namespace shoal {

class DenseStore {
 public:
  struct Options {
    DType compute = DType::kF32;
    bool training = true;
    DensePolicy policy = DensePolicy::kReplicated;
    int buffers = 2;  // Layers that are here at a time, where they are sharded.
    Numerics numerics = Numerics::kFast;  // kPinned: gradients are summed in rank order.
    Stream* stream = nullptr;  // Of the device whose memory has the parameters (and that `group` allocates); null: the CPU's.
  };
  // Borrows all but `options` for life. RESOURCE_EXHAUSTED: too little shared memory.
  static absl::StatusOr<std::unique_ptr<DenseStore>> Create(const std::vector<ParameterSpec>& parameters,
                                                            const std::vector<Block>& blocks, int layers,
                                                            Communicator& group, const Options& options);

  bool Has(const std::string& name) const { return places_.contains(name); }
  // The parameter as a tensor of `shape`, which may span parameters that lie side by side. CHECKs that it is here. Cheap; valid
  // until the bucket's Release.
  Tensor Weight(const std::string& name, Shape shape) const;
  Tensor Gradient(const std::string& name, Shape shape);

  int buckets() const { return static_cast<int>(buckets_.size()); }
  int64_t elements(int bucket) const { return at(bucket).elements; }
  int64_t bytes(int bucket) const { return at(bucket).elements * SizeOf(at(bucket).dtype); }
  bool sharded(int bucket) const { return at(bucket).sharded; }
  // How gradients of part `part` of the batch enter a bucket.
  kernels::Accumulate AccumulateOf(int bucket, int part) const;
  void ZeroVectorGradients(Stream& stream);

  // Collective. Does nothing where the weights are up to date.
  absl::Status Gather(int bucket);
  void Release(int bucket);
  // Collective. Sums a range of a bucket's gradients into its owners. A sharded bucket adds to the parts before.
  absl::Status Reduce(int bucket, int64_t begin, int64_t count, int part);
  // AdamW on what this rank owns, from gradients that are reduced; `decay` of vectors is 0. `numbers` as kernels::AdamW has them.
  // Returns the elements.
  int64_t Update(int bucket, kernels::AdamWStep step, const Tensor& numbers, Stream& stream);
  // Brings own copies up to date with master weights; those of other ranks are gathered with the next Gather.
  void Refresh(Stream& stream);

  // Writes the sum of squares of each owned block's gradient at its index in `sums` (f64), in memory of the stream.
  void SumSquares(const Tensor& sums, Stream& stream) const;
  void AppendOwned(std::vector<OwnedPart>* owned) const;
  int64_t owned_elements() const;

  struct Memory {
    int64_t weights_bytes = 0, gradients_bytes = 0, state_bytes = 0;
  };
  Memory memory() const;

 private:
  struct Buffer {
    Tensor weights, gradients;  // Raw bytes, f32.
    bool of_layers = true;      // Else of embedding and head.
    int bucket = -1;            // Who has it.
    int64_t freed = 0;          // Which of all releases was its last.
  };
  struct Bucket {
    std::vector<int> blocks;
    std::vector<int64_t> counts;  // Elements that each rank owns.
    int64_t elements = 0, own_begin = 0, own_count = 0;
    DType dtype = DType::kF32;
    bool decay = true, sharded = false, of_layer = false;
    bool fresh = false;           // Weights of other ranks are up to date.
    Tensor weights, gradients;    // Whole; empty while a sharded bucket is not here.
    Tensor own_weights, own_gradients;
    Tensor master, exp_avg, exp_avg_sq;
    int64_t reduced = 0;          // Elements, of the part at hand.
  };
  struct Place {
    int bucket = 0;
    int64_t offset = 0;
  };

  DenseStore(const std::vector<ParameterSpec>& parameters, const std::vector<Block>& blocks, Communicator& group,
             const Options& options)
      : parameters_(&parameters), blocks_(&blocks), group_(&group), options_(options) {}
  Stream& stream() { return options_.stream != nullptr ? *options_.stream : cpu_; }
  absl::Status AddReduced(const Tensor& from, const Tensor& to, int part);
  const Bucket& at(int bucket) const { return buckets_[static_cast<size_t>(bucket)]; }
  Bucket& at(int bucket) { return buckets_[static_cast<size_t>(bucket)]; }
  void AddBlock(int index, int bucket);
  absl::Status Allocate(Bucket* bucket);
  // `count` for buckets of layers, or of the others.
  absl::Status AllocateBuffers(bool of_layers, int count);
  Tensor TakeWeights(int bucket);
  void TakeGradients(int bucket);
  // Buffers are taken in the order in which they were freed, as the step graph says who waits for whom: the host may have released later
  // ones whose last use is still before the device.
  Buffer& TakeOldest(std::vector<Buffer>* buffers, int bucket) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Free(std::vector<Buffer>* buffers, int bucket);
  const Place& Find(const std::string& name) const;

  const std::vector<ParameterSpec>* parameters_;
  const std::vector<Block>* blocks_;
  Communicator* group_;
  const Options options_;
  std::vector<Bucket> buckets_;
  absl::flat_hash_map<std::string, Place> places_;
  Mutex mutex_;  // Who has which buffer.
  int64_t releases_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Buffer> weight_buffers_, gradient_buffers_;
  Stream cpu_;
  std::unique_ptr<Stream> reduce_stream_;  // On a device, of the thread that makes collective calls.
};

}  // namespace shoal
