// The kernels of this folder by name; DeviceKernels has their contracts. Compiled by nvcc into the plug-in, and for the emulator into
// tests.
#pragma once

#include "runtime/kernels/device_kernels.h"

namespace shoal::cuda {

using TensorArg = const DeviceTensor&;
using StreamArg = DeviceStream*;

DeviceResult Convert(TensorArg from, TensorArg to, StreamArg stream);
DeviceResult AddTo(TensorArg x, TensorArg sum, StreamArg stream);
DeviceResult FillNormal(uint64_t seed, uint64_t key_stream, uint64_t first_index, double mean, double stddev, TensorArg x,
                        StreamArg stream);
DeviceResult Embedding(TensorArg table, TensorArg ids, TensorArg out, StreamArg stream);
DeviceResult EmbeddingBackward(TensorArg dout, TensorArg ids, TensorArg dtable, StreamArg stream);
DeviceResult RmsNorm(TensorArg x, TensorArg delta, TensorArg weight, float epsilon, TensorArg sum, TensorArg y, TensorArg rstd,
                     StreamArg stream);
DeviceResult RmsNormBackward(TensorArg dy, TensorArg x, TensorArg weight, TensorArg rstd, TensorArg dx, TensorArg dweight,
                             StreamArg stream);
DeviceResult Rope(TensorArg x, int32_t heads, int32_t dim, TensorArg cos, TensorArg sin, bool backward, StreamArg stream);
DeviceResult SwiGlu(TensorArg gate_up, TensorArg h, StreamArg stream);
DeviceResult SwiGluBackward(TensorArg dh, TensorArg gate_up, TensorArg dgate_up, TensorArg h, StreamArg stream);
DeviceResult AdamW(double beta1, double beta2, double epsilon, double weight_decay, TensorArg numbers, TensorArg grad,
                   TensorArg master, TensorArg m, TensorArg v, TensorArg copy, StreamArg stream);
DeviceResult ClipGradients(TensorArg squares, TensorArg losses, double clip, TensorArg numbers, StreamArg stream);
DeviceResult SumOfSquares(TensorArg x, TensorArg sum, StreamArg stream);
DeviceResult CrossEntropy(TensorArg logits, TensorArg targets, float scale, TensorArg loss, TensorArg dlogits, StreamArg stream);
DeviceResult GatherRows(TensorArg x, TensorArg token, TensorArg rows, StreamArg stream);
DeviceResult SumSlots(TensorArg drows, TensorArg offset, TensorArg slot, TensorArg dx, StreamArg stream);
DeviceResult CombineSlots(TensorArg residual, TensorArg y, TensorArg offset, TensorArg slot, TensorArg weight, TensorArg out,
                          StreamArg stream);
DeviceResult CombineSlotsBackward(TensorArg dout, TensorArg y, TensorArg offset, TensorArg slot, TensorArg weight, TensorArg dy,
                                  TensorArg dweight, StreamArg stream);
DeviceResult TopKSoftmax(TensorArg logits, bool renormalize, TensorArg probs, TensorArg chosen, TensorArg weights,
                         TensorArg logz, int32_t pieces, TensorArg counts, TensorArg sums, StreamArg stream);
DeviceResult TopKSoftmaxBackward(TensorArg probs, TensorArg chosen, TensorArg weights, TensorArg logz, bool renormalize,
                                 TensorArg dweights, TensorArg dprob, float z_scale, TensorArg dlogits, StreamArg stream);
DeviceResult Softmax(TensorArg logits, TensorArg probs, TensorArg logz, StreamArg stream);
DeviceResult SoftmaxBackward(TensorArg probs, TensorArg logz, TensorArg dprobs, float z_scale, TensorArg dlogits,
                             StreamArg stream);
DeviceResult TopKSigmoid(TensorArg logits, TensorArg bias, float scale, TensorArg scores, TensorArg chosen, TensorArg weights,
                         int32_t pieces, TensorArg counts, StreamArg stream);
DeviceResult TopKSigmoidBackward(TensorArg scores, TensorArg chosen, TensorArg weights, float scale, TensorArg dweights,
                                 TensorArg dshare, TensorArg dlogits, StreamArg stream);
DeviceResult SumShares(TensorArg scores, TensorArg sums, StreamArg stream);
DeviceResult TopTokens(TensorArg scores, int64_t capacity, TensorArg score, TensorArg token, StreamArg stream);
DeviceResult NormalizeRows(TensorArg x, TensorArg y, TensorArg norm, StreamArg stream);
DeviceResult NormalizeRowsBackward(TensorArg dy, TensorArg y, TensorArg norm, TensorArg dx, StreamArg stream);
DeviceResult SumOverTokens(TensorArg values, TensorArg sums, StreamArg stream);
DeviceResult SumTally(int32_t pieces, TensorArg counts, TensorArg sums, TensorArg totals, StreamArg stream);
DeviceResult OrderByExpert(TensorArg chosen, TensorArg counts, TensorArg sums, TensorArg offset, TensorArg segments, TensorArg slot,
                           TensorArg token, TensorArg all_counts, TensorArg all_probs, TensorArg all_z, StreamArg stream);
DeviceResult OrderByShares(TensorArg chosen, int32_t pieces, TensorArg counts, TensorArg shares, TensorArg offset, TensorArg slot,
                           TensorArg token, StreamArg stream);
DeviceResult GradientOfCounts(TensorArg sums, int64_t first, bool all_layers, double scale, TensorArg dprob, StreamArg stream);
DeviceResult SequenceLoads(TensorArg chosen, float scale, TensorArg load, StreamArg stream);
DeviceResult AddSequenceLoss(TensorArg load, TensorArg shares, double scale, TensorArg loss, StreamArg stream);
DeviceResult DivideBy(TensorArg x, TensorArg by, TensorArg y, StreamArg stream);
DeviceResult DivideByBackward(TensorArg dy, TensorArg y, TensorArg by, TensorArg dby, StreamArg stream);
DeviceResult GroupedMatMul(TensorArg x, TensorArg weights, TensorArg segments, TensorArg y, StreamArg stream);
DeviceResult GroupedMatMulGradInput(TensorArg dy, TensorArg weights, TensorArg segments, TensorArg dx, StreamArg stream);
DeviceResult GroupedMatMulGradWeight(TensorArg dy, TensorArg x, TensorArg segments, bool add, TensorArg weight_grads,
                                     StreamArg stream);
DeviceResult QuantiseRows(TensorArg x, TensorArg codes, TensorArg scales, StreamArg stream);
DeviceResult QuantiseWeights(const DeviceTensor* weights, int32_t count, TensorArg codes, TensorArg transposed, TensorArg scales,
                             StreamArg stream);
DeviceResult Fp8MatMul(TensorArg x, TensorArg x_scales, TensorArg weights, TensorArg weight_scales, bool transposed, TensorArg segments,
                       TensorArg addend, TensorArg y, TensorArg h, StreamArg stream);
DeviceResult GroupedMatMulSwiGlu(TensorArg x, TensorArg weights, TensorArg segments, TensorArg gate_up, TensorArg h, StreamArg stream);
DeviceResult DocumentStarts(TensorArg tokens, int32_t end_of_document, TensorArg first, StreamArg stream);
DeviceResult Attention(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, TensorArg qkv, TensorArg first,
                       TensorArg out, TensorArg lse, StreamArg stream);
DeviceResult AttentionBackward(int64_t rows, int64_t seq, int32_t heads, int32_t kv_heads, int32_t dim, TensorArg qkv,
                               TensorArg first, TensorArg out, TensorArg lse, TensorArg dout, TensorArg dqkv, StreamArg stream);
DeviceResult SumTensors(const DeviceTensor* from, int32_t count, TensorArg to, StreamArg stream);

// All of them; products of dense matrices (DeviceKernels::matmul) are added by who has a library for them.
inline DeviceKernels OwnKernels() {
  DeviceKernels kernels{};
  kernels.convert = Convert;
  kernels.add_to = AddTo;
  kernels.fill_normal = FillNormal;
  kernels.embedding = Embedding;
  kernels.embedding_backward = EmbeddingBackward;
  kernels.rms_norm = RmsNorm;
  kernels.rms_norm_backward = RmsNormBackward;
  kernels.rope = Rope;
  kernels.swiglu = SwiGlu;
  kernels.swiglu_backward = SwiGluBackward;
  kernels.adamw = AdamW;
  kernels.clip_gradients = ClipGradients;
  kernels.sum_of_squares = SumOfSquares;
  kernels.cross_entropy = CrossEntropy;
  kernels.gather_rows = GatherRows;
  kernels.sum_slots = SumSlots;
  kernels.combine_slots = CombineSlots;
  kernels.combine_slots_backward = CombineSlotsBackward;
  kernels.topk_softmax = TopKSoftmax;
  kernels.topk_softmax_backward = TopKSoftmaxBackward;
  kernels.softmax = Softmax;
  kernels.softmax_backward = SoftmaxBackward;
  kernels.topk_sigmoid = TopKSigmoid;
  kernels.topk_sigmoid_backward = TopKSigmoidBackward;
  kernels.sum_shares = SumShares;
  kernels.top_tokens = TopTokens;
  kernels.normalize_rows = NormalizeRows;
  kernels.normalize_rows_backward = NormalizeRowsBackward;
  kernels.sum_over_tokens = SumOverTokens;
  kernels.sum_tally = SumTally;
  kernels.order_by_expert = OrderByExpert;
  kernels.order_by_shares = OrderByShares;
  kernels.gradient_of_counts = GradientOfCounts;
  kernels.sequence_loads = SequenceLoads;
  kernels.add_sequence_loss = AddSequenceLoss;
  kernels.divide_by = DivideBy;
  kernels.divide_by_backward = DivideByBackward;
  kernels.grouped_matmul = GroupedMatMul;
  kernels.grouped_matmul_grad_input = GroupedMatMulGradInput;
  kernels.grouped_matmul_grad_weight = GroupedMatMulGradWeight;
  kernels.quantise_rows = QuantiseRows;
  kernels.quantise_weights = QuantiseWeights;
  kernels.fp8_matmul = Fp8MatMul;
  kernels.grouped_matmul_swiglu = GroupedMatMulSwiGlu;
  kernels.document_starts = DocumentStarts;
  kernels.attention = Attention;
  kernels.attention_backward = AttentionBackward;
  kernels.sum_tensors = SumTensors;
  return kernels;
}

}  // namespace shoal::cuda
