// For tests that train: a model so small that a step takes milliseconds, also on an emulated device.
#pragma once

#include <cstdint>

#include "launch/config/config.pb.h"

namespace shoal::testing {

// Two layers of four experts, width 16; `rows` sequences of `seq` tokens a step, in one chunk and one wave. Not resolved yet
// (ResolveConfig).
inline Config TinyConfig(int64_t rows, int64_t seq) {
  Config config;
  Model& model = *config.mutable_model();
  model.set_hidden_size(16);
  model.set_num_attention_heads(2);
  model.set_num_hidden_layers(2);
  model.set_intermediate_size(16);
  model.set_num_local_experts(4);
  config.mutable_train()->set_seq_length(seq);
  config.mutable_train()->set_global_batch_size(rows);
  config.mutable_schedule()->set_chunks_forward(1);
  config.mutable_schedule()->set_chunks_backward(1);
  config.mutable_schedule()->set_waves(1);
  return config;
}

}  // namespace shoal::testing
