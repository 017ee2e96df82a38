// For the tests of parameter stores: a small model with several blocks to a bucket, and numbers by which elements are known.
#pragma once

#include <vector>

#include "models/blocks.h"
#include "models/model_config.h"
#include "models/optimizer/owned_part.h"

namespace shoal {
namespace store_testing {

// Layer 1 is dense; buckets have up to 14 blocks, so that several ranks own some of each.
inline ModelConfig SmallConfig(int experts = 3) {
  ModelConfig config;
  config.vocab_size = 600;
  config.hidden_size = 256;
  config.intermediate_size = 8;
  config.dense_intermediate_size = 512;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 8;
  config.num_key_value_heads = 4;
  config.head_dim = 32;
  config.num_local_experts = experts;
  config.num_experts_per_tok = 1;
  config.dense_layers = {false, true, false};
  return config;
}

// Small integers, so that sums of a few are exact in f32 (and values alone in bf16).
inline float Number(int64_t kind, int64_t parameter, int64_t element) {
  return static_cast<float>((kind * 31 + parameter * 17 + element * 7 + element / 64) % 61 - 30);
}

inline int64_t FirstElement(const OwnedPart& part) {
  return part.row_begin * (ElementCount(part.full_shape) / part.full_shape[0]);
}

}  // namespace store_testing
}  // namespace shoal
