// The kernels of a device plug-in: one function per operation of this folder's headers, where its contract stands; here only what
// differs. Tensors are in device memory unless said otherwise; an empty tensor (elements 0, data null) stands for "none". A function
// checks nothing that its CPU counterpart checks already (device_dispatch.h calls it after those checks), puts work on the stream and
// returns at once.
#pragma once

#include <cstdint>

#include "runtime/device/device_api.h"
#include "runtime/tensor/dtype.h"

namespace shoal {

struct DeviceTensor {
  void* data = nullptr;
  int64_t elements = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int32_t rank = 0;
  DType dtype = DType::kF32;
};

struct DeviceKernels {
  using T = const DeviceTensor&;
  using S = DeviceStream*;
  using R = DeviceResult;

  // elementwise.h
  R (*convert)(T from, T to, S);
  R (*add_to)(T x, T sum, S);
  R (*fill_normal)(uint64_t seed, uint64_t key_stream, uint64_t first_index, double mean, double stddev, T x, S);
  // embedding.h
  R (*embedding)(T table, T ids, T out, S);
  R (*embedding_backward)(T dout, T ids, T dtable, S);
  // norm.h
  R (*rms_norm)(T x, T delta, T weight, float epsilon, T sum, T y, T rstd, S);
  R (*rms_norm_backward)(T dy, T x, T weight, T rstd, T dx, T dweight, S);
  // rope.h. `backward`: by the negative angle.
  R (*rope)(T x, int32_t heads, int32_t dim, T cos, T sin, bool backward, S);
  // swiglu.h
  R (*swiglu)(T gate_up, T h, S);
  R (*swiglu_backward)(T dh, T gate_up, T dgate_up, T h, S);
  // optimizer.h. Of AdamWStep; what changes from update to update is read from `numbers` (AdamWNumber), where clipping leaves its part.
  R (*adamw)(double beta1, double beta2, double epsilon, double weight_decay, T numbers, T grad, T master, T m, T v, T copy, S);
  R (*clip_gradients)(T squares, T losses, double clip, T numbers, S);
  R (*sum_of_squares)(T x, T sum, S);  // sum: f64 [1]
  // cross_entropy.h
  R (*cross_entropy)(T logits, T targets, float scale, T loss, T dlogits, S);
  // permute.h
  R (*gather_rows)(T x, T token, T rows, S);
  R (*sum_slots)(T drows, T offset, T slot, T dx, S);
  R (*combine_slots)(T residual, T y, T offset, T slot, T weight, T out, S);
  R (*combine_slots_backward)(T dout, T y, T offset, T slot, T weight, T dy, T dweight, S);
  // router.h. A tally is its `pieces`, `counts` and `sums`.
  R (*topk_softmax)(T logits, bool renormalize, T probs, T chosen, T weights, T logz, int32_t pieces, T counts, T sums, S);
  R (*topk_softmax_backward)(T probs, T chosen, T weights, T logz, bool renormalize, T dweights, T dprob, float z_scale, T dlogits, S);
  R (*softmax)(T logits, T probs, T logz, S);
  R (*softmax_backward)(T probs, T logz, T dprobs, float z_scale, T dlogits, S);
  R (*topk_sigmoid)(T logits, T bias, float scale, T scores, T chosen, T weights, int32_t pieces, T counts, S);
  R (*topk_sigmoid_backward)(T scores, T chosen, T weights, float scale, T dweights, T dshare, T dlogits, S);
  R (*sum_shares)(T scores, T sums, S);
  R (*top_tokens)(T scores, int64_t capacity, T score, T token, S);
  R (*normalize_rows)(T x, T y, T norm, S);
  R (*normalize_rows_backward)(T dy, T y, T norm, T dx, S);
  R (*sum_over_tokens)(T values, T sums, S);
  R (*sum_tally)(int32_t pieces, T counts, T sums, T totals, S);
  R (*order_by_expert)(T chosen, T counts, T sums, T offset, T segments, T slot, T token, T all_counts, T all_probs, T all_z, S);
  R (*order_by_shares)(T chosen, int32_t pieces, T counts, T shares, T offset, T slot, T token, S);
  R (*gradient_of_counts)(T sums, int64_t first, bool all_layers, double scale, T dprob, S);
  R (*sequence_loads)(T chosen, float scale, T load, S);
  R (*add_sequence_loss)(T load, T shares, double scale, T loss, S);
  R (*divide_by)(T x, T by, T y, S);
  R (*divide_by_backward)(T dy, T y, T by, T dby, S);

  // matmul.h
  // c = addend + product; addend is c, or another f32 tensor like it, or none.
  R (*matmul)(T a, bool transpose_a, T b, bool transpose_b, T addend, T c, S);
  // Segments are rows (expert, begin, count) of an i32 tensor [segments, 3]; weights are addresses, i64 [experts], of row-major
  // matrices of `x`'s type; both in device memory, so counts need not be known to the host. Segments with count 0 are allowed.
  R (*grouped_matmul)(T x, T weights, T segments, T y, S);
  R (*grouped_matmul_grad_input)(T dy, T weights, T segments, T dx, S);
  // weight_grads: addresses, i64 [experts], of f32 [N, K] with N, K the widths of dy and x.
  R (*grouped_matmul_grad_weight)(T dy, T x, T segments, bool add, T weight_grads, S);

  // fp8.h. x bf16 [R, K]; codes u8 [R, ceil(K / 128) 128] (zeros behind K), scales f32 [R, ceil(K / 128)]. kUnavailable: the device
  // cannot multiply codes.
  R (*quantise_rows)(T x, T codes, T scales, S);
  // `count` matrices of bf16 [N, K] (host array); codes, transposed and scales as in Fp8Weights.
  R (*quantise_weights)(const DeviceTensor* weights, int32_t count, T codes, T transposed, T scales, S);
  // y = addend + x w^T, or with `transposed` x w, of codes [E, n, k] (or those transposed) by segments as above; none: all rows by the
  // first matrix. weight_scales are those of the matrices as they lie, not transposed. addend as in `matmul`.
  // h (bf16), unless empty: y is gate_up and h as of swiglu.h, of the rows of the segments.
  R (*fp8_matmul)(T x, T x_scales, T weights, T weight_scales, bool transposed, T segments, T addend, T y, T h, S);
  // gated_matmul.h. Lists as above.
  R (*grouped_matmul_swiglu)(T x, T weights, T segments, T gate_up, T h, S);

  // documents.h
  R (*document_starts)(T tokens, int32_t end_of_document, T first, S);
  // attention.h. Its AttentionShape.
  R (*attention)(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, T qkv, T first, T out, T lse, S);
  R (*attention_backward)(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, T qkv, T first, T out, T lse,
                          T dout, T dqkv, S);

  // A reduction of communicator buffers: to (f32 or bf16) = sum of `count` tensors like it (host array), in their order.
  R (*sum_tensors)(const DeviceTensor* from, int32_t count, T to, S);
};

}  // namespace shoal
