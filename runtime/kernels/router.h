// Top-k softmax routing. T tokens, E experts, K experts per token.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

enum class Renormalize : uint8_t { kNo, kYes };

// probs_TE = softmax(logits_TE), f32. chosen_TK (i32): the K most probable experts, most probable first, ties to the lower
// index. weights_TK (f32): their probabilities, with kYes divided by their sum. logz_T (f32) = logsumexp of the logits.
void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream& stream);

// dlogits_TE (f32, overwritten) from three sources: dweights_TK; dprob_E, the same gradient for the probabilities of every
// token (auxiliary losses; empty: none); and z_scale: d/dlogits of z_scale * logz^2 per token (z-loss; 0: none).
// The choice is a constant.
void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream& stream);

// sums_E (f64) = sum over tokens of probs_TE, in an order that does not depend on the number of threads.
void SumOverTokens(const Tensor& values, const Tensor& sums, Stream& stream);

namespace ref {
void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream& stream);
void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
