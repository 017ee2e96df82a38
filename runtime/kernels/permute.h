// Token rows to expert order and back. A slot is one (token, choice) pair; slots are sorted by expert, within an expert by
// token. T tokens, D width, E experts, K choices per token, S = T * K slots. "act" is f32 or bf16.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// From chosen_TK (i32): counts_E (i64), slots per expert; slot_TK (i32), where each choice went; token_S (i32), the token
// of each slot. Every choice must be in [0, E).
void SortByExpert(const Tensor& chosen, const Tensor& counts, const Tensor& slot, const Tensor& token, Stream& stream);

// slots_SD[s] = x_TD[token_S[s]]. Both act, alike.
void GatherRows(const Tensor& x, const Tensor& token, const Tensor& slots, Stream& stream);
// Gradient of GatherRows: dx_TD (act or f32, overwritten) = sum over k of dslots_SD[slot_TK[t, k]], k ascending.
void SumSlots(const Tensor& dslots, const Tensor& slot, const Tensor& dx, Stream& stream);

// out_TD (f32) = residual_TD (f32) + sum over k, ascending, of weights_TK * y_SD[slot_TK]. out may be residual.
void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& slot, const Tensor& weights, const Tensor& out,
                  Stream& stream);
// dy_SD (act) [slot_TK] = weights_TK * dout_TD; dweights_TK (f32) = dot(dout_TD, y_SD[slot]). dout is f32. dy may be y.
void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& slot, const Tensor& weights,
                          const Tensor& dy, const Tensor& dweights, Stream& stream);

namespace ref {
void SortByExpert(const Tensor& chosen, const Tensor& counts, const Tensor& slot, const Tensor& token, Stream& stream);
void GatherRows(const Tensor& x, const Tensor& token, const Tensor& slots, Stream& stream);
void SumSlots(const Tensor& dslots, const Tensor& slot, const Tensor& dx, Stream& stream);
void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& slot, const Tensor& weights, const Tensor& out,
                  Stream& stream);
void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& slot, const Tensor& weights,
                          const Tensor& dy, const Tensor& dweights, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
