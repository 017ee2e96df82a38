// Routing: scores of experts and choices by them. T tokens, E experts, K experts per token. A choice is a constant to gradients; of
// equal scores the lower expert is chosen.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// Choices are counted, and what losses read of them is summed, while they are made: by blocks of tokens, none of which waits for another, so
// that sums have the same bits in every run and on every card. Tokens are cut into `pieces` as even as can be, the longer ones first, and
// each piece likewise into B / pieces blocks.
struct Tally {
  int pieces = 1;
  Tensor counts;  // [B, E] i32: choices of each expert by the tokens of a block. Empty: nothing is counted.
  Tensor sums;    // [B, E + 1] f64: over these tokens the probability of each expert, then logz^2. Empty: nothing is summed.
};
enum class TallySums : uint8_t { kNo, kYes };
// Of choices that are still to be made.
Tally MakeTally(int64_t tokens, int64_t experts, int pieces, TallySums sums, Stream& stream);

enum class Renormalize : uint8_t { kNo, kYes };

// probs_TE = softmax(logits_TE), f32. chosen_TK (i32): the K most probable experts, most probable first, ties to the lower
// index. weights_TK (f32): their probabilities, with kYes divided by their sum. logz_T (f32) = logsumexp of the logits. `tally`, where
// there is one, is overwritten. One launch on a device, which reads logits once.
void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream& stream, const Tally& tally = {});

// dlogits_TE (f32, overwritten) from three sources: dweights_TK; dprob_E, the same gradient for the probabilities of every
// token (auxiliary losses; empty: none); and z_scale: d/dlogits of z_scale * logz^2 per token (z-loss; 0: none).
// The choice is a constant.
void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream& stream);

// The same without a choice: every expert is reached, if at all, with its probability.
void Softmax(const Tensor& logits, const Tensor& probs, const Tensor& logz, Stream& stream);
// dlogits_TE (f32, overwritten) from dprobs_TE and z_scale, as above.
void SoftmaxBackward(const Tensor& probs, const Tensor& logz, const Tensor& dprobs, float z_scale, const Tensor& dlogits,
                     Stream& stream);

// scores_TE = sigmoid(logits_TE), f32. chosen_TK (i32): the K greatest of scores + bias_E (f32), greatest first. weights_TK (f32):
// their scores over the sum of their scores, times scale; the bias is not in them. `tally`: as above, without sums.
void TopKSigmoid(const Tensor& logits, const Tensor& bias, float scale, const Tensor& scores, const Tensor& chosen,
                 const Tensor& weights, Stream& stream, const Tally& tally = {});
// dlogits_TE (f32, overwritten) from dweights_TK and dshare_QE (f32; empty: none), the gradient by a token's shares, which are its
// scores over their sum, the same for all tokens of one of the Q sequences; T is a multiple of Q.
void TopKSigmoidBackward(const Tensor& scores, const Tensor& chosen, const Tensor& weights, float scale, const Tensor& dweights,
                         const Tensor& dshare, const Tensor& dlogits, Stream& stream);
// sums_QE (f64) = sum over the tokens of each sequence of their shares, in order.
void SumShares(const Tensor& scores, const Tensor& sums, Stream& stream);

// Each expert's C best of T tokens by scores_TE (f32), of equal ones the earlier: score_E (f32) and token_E (i64) of the worst
// that it takes. With C = 0 infinity and -1. T is below 2^32.
void TopTokens(const Tensor& scores, int64_t C, const Tensor& score, const Tensor& token, Stream& stream);

// y_RN = x_RN over the Euclidean norm_R of its rows, at least kNormMin; all f32. y may be x.
constexpr float kNormMin = 1e-12f;
void NormalizeRows(const Tensor& x, const Tensor& y, const Tensor& norm, Stream& stream);
// dx_RN (f32, overwritten); may be dy_RN.
void NormalizeRowsBackward(const Tensor& dy, const Tensor& y, const Tensor& norm, const Tensor& dx, Stream& stream);

// sums_E (f64) = sum over tokens of probs_TE, in an order that does not depend on the number of threads.
void SumOverTokens(const Tensor& values, const Tensor& sums, Stream& stream);

// totals (f64) of a tally: [pieces, E] choices of each piece, and where it has sums, [E + 1] those of all blocks, in order.
void SumTally(const Tally& tally, const Tensor& totals, Stream& stream);

// What OrderByExpert adds the totals of a tally to, all f64: counts_E, and probs_E and z_1 where the tally has sums. Empty: nothing.
struct TallyTotals {
  Tensor counts, probs, z;
};
// Pairs of tokens and experts, T * K of them, all of which stay: offset_T1 (i32), where the pairs of each token begin; segments_E3
// (i32), rows of expert, first slot and choices, as grouped products take them; slot of each pair and token of each slot (i32, T * K),
// slots by expert, then by token. `tally` is that of chosen_TK, of one piece.
//
// One launch on a device, which is the second and last of a layer's routing: the slot of the first token's last expert follows from the
// choices of all tokens, so no kernel can choose and give slots unless its blocks wait for all others, as those of a scan with look-back
// (Merrill and Garland, 2016) do for the blocks before them. Each block instead adds up for itself what others counted, which is in the
// cache. The host learns nothing.
void OrderByExpert(const Tensor& chosen, const Tally& tally, const Tensor& offset, const Tensor& segments, const Tensor& slot,
                   const Tensor& token, const TallyTotals& totals, Stream& stream);
// The same pairs where rows do not lie by expert alone, because they travel: offset_T1, slot and token as above. The pairs of a piece of the
// tally and an expert are numbered by token from 0; their rows are N runs in all, the *shares*: i32 [pieces * E + 1 + 2 N], for each piece
// and expert the index of its first share, and N; then of each share its end, the number of the first pair behind it, and what is added to
// the number of a pair in it for its row. One launch on a device, for which the host makes shares from the totals of the tally.
void OrderByShares(const Tensor& chosen, const Tally& tally, const Tensor& shares, const Tensor& offset, const Tensor& slot,
                   const Tensor& token, Stream& stream);

// dprob_LE (f32) = scale * counts_LE, which are the columns from `first` of sums_LN (f64); kAllLayers: their sums over L.
enum class CountsOf : uint8_t { kEachLayer, kAllLayers };
void GradientOfCounts(const Tensor& sums, int64_t first, CountsOf counts, double scale, const Tensor& dprob, Stream& stream);

// load_QE (f32) = scale * choices of an expert in a sequence over its fair share, (T / Q) * K / E.
void SequenceLoads(const Tensor& chosen, float scale, const Tensor& load, Stream& stream);
// loss_1 (f64) += scale * sum of load_QE (f32) * shares_QE (f64).
void AddSequenceLoss(const Tensor& load, const Tensor& shares, double scale, const Tensor& loss, Stream& stream);

// y_RN = x_RN / by_1, all f32. y may be x. The gradient by x is that by y, divided likewise.
void DivideBy(const Tensor& x, const Tensor& by, const Tensor& y, Stream& stream);
// dby_1 (f32) += the gradient by the divisor.
void DivideByBackward(const Tensor& dy, const Tensor& y, const Tensor& by, const Tensor& dby, Stream& stream);

namespace ref {
void Softmax(const Tensor& logits, const Tensor& probs, const Tensor& logz, Stream& stream);
void SoftmaxBackward(const Tensor& probs, const Tensor& logz, const Tensor& dprobs, float z_scale, const Tensor& dlogits,
                     Stream& stream);
void TopKSigmoid(const Tensor& logits, const Tensor& bias, float scale, const Tensor& scores, const Tensor& chosen,
                 const Tensor& weights, Stream& stream);
void TopKSigmoidBackward(const Tensor& scores, const Tensor& chosen, const Tensor& weights, float scale, const Tensor& dweights,
                         const Tensor& dshare, const Tensor& dlogits, Stream& stream);
void SumShares(const Tensor& scores, const Tensor& sums, Stream& stream);
void TopTokens(const Tensor& scores, int64_t C, const Tensor& score, const Tensor& token, Stream& stream);
void NormalizeRows(const Tensor& x, const Tensor& y, const Tensor& norm, Stream& stream);
void NormalizeRowsBackward(const Tensor& dy, const Tensor& y, const Tensor& norm, const Tensor& dx, Stream& stream);
void TopKSoftmax(const Tensor& logits, Renormalize renormalize, const Tensor& probs, const Tensor& chosen,
                 const Tensor& weights, const Tensor& logz, Stream& stream);
void TopKSoftmaxBackward(const Tensor& probs, const Tensor& chosen, const Tensor& weights, const Tensor& logz,
                         Renormalize renormalize, const Tensor& dweights, const Tensor& dprob, float z_scale,
                         const Tensor& dlogits, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
