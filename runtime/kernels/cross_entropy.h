// Softmax cross-entropy of one chunk of tokens: callers loop over chunks, so that the logits of a whole batch never exist.
// C tokens of the chunk, V vocabulary.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// loss_C (f32) = logsumexp(logits_CV) - logits_CV[target_C], logits f32, targets i32 in [0, V). dlogits_CV (act: f32 or
// bf16) = scale * (softmax(logits) - onehot(target)); an empty dlogits: none wanted. An f32 dlogits may be logits.
void CrossEntropy(const Tensor& logits, const Tensor& targets, float scale, const Tensor& loss, const Tensor& dlogits,
                  Stream& stream);

namespace ref {
void CrossEntropy(const Tensor& logits, const Tensor& targets, float scale, const Tensor& loss, const Tensor& dlogits,
                  Stream& stream);
}
}  // namespace shoal::kernels
