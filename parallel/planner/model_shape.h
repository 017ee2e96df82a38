// The sizes of a model and of its batch: what a step's time and memory follow from. A plain value.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

struct ModelShape {
  int64_t vocab = 256, width = 256;
  int64_t expert_inner = 512, dense_inner = 1024, shared_inner = 0;  // 0: no shared expert.
  int64_t query_size = 256, kv_size = 256;
  int heads = 8;
  int experts = 8, choices = 2;
  std::vector<bool> moe;  // By layer.
  bool tied_head = false;
  bool balance = true;  // Losses that balance experts: none goes back before all have chosen.
  // By bucket, elements of its blocks (models/blocks.h), which are owned whole; empty: as fine as may be.
  std::vector<std::vector<int64_t>> blocks;
  int64_t compute_bytes = 4;                     // Of an element of weights and activations: 2 in bf16.
  bool fp8 = false;                              // Products of layers are (runtime/kernels/fp8.h).
  int64_t sequences = 8, sequence_length = 256;  // Of a step, on all ranks together.
  int64_t loss_chunk = 1024;

  int layers() const { return static_cast<int>(moe.size()); }
  int64_t expert_elements() const { return 3 * width * expert_inner; }
  // Of the matrices that are not experts, in BucketIndex's order.
  std::vector<int64_t> BucketElements() const;
  std::vector<int64_t> BucketBytes() const;  // Of their weights; norm vectors are f32.
  // Of a bucket, what the rank that owns most of it owns.
  int64_t OwnedElements(int bucket, int ranks) const;
  int64_t AttentionElements() const { return width * (2 * query_size + 2 * kv_size); }
  // Forward and backward operations of matrix products and attention of one token, nothing computed twice.
  double TrainFlopsPerToken() const;
};

}  // namespace shoal
